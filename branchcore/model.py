"""What the engine asks of a model: a velocity per node, a decoder, a trainable module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.credit import Floats
from branchcore.packing import TokenBudget
from branchcore.plan import Ints


class VelocityModel(Protocol):
    """A flow model whose prompts are encoded: the only thing a rollout and an update call.

    Velocity convention: v = eps - x0 at x_sigma = (1 - sigma) x0 + sigma eps. Rows of one call may
    have different sigmas and prompts; a row's result must not depend on its neighbours beyond
    rounding. Guidance and conditioning-time conventions live in the adapter.
    """

    latent_shape: tuple[int, ...]

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the velocity.

        Args:
            x: (N, *latent_shape) states.
            sigma: (N,) noise levels, dtype of x.
            prompt: (N,) int64, index of each row's prompt.

        Returns:
            (N, *latent_shape), any float dtype; differentiable in the trained parameters.
        """
        ...

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the frozen base policy's velocity; only called when the objective has a KL."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A `VelocityModel` that says how long its rows are, which `gradient(max_tokens=)` asks."""

    variable_length: bool
    """Whether a call takes rows of different length without padding: it costs the sum of its rows.
    Otherwise only rows of one length share a call when calls are filled by tokens."""

    def row_tokens(self, prompt: Ints) -> Ints:
        """Returns (N,) int64 tokens, at least 1, of rows with these (N,) prompt indices."""
        ...


class Model(Protocol):
    """What the trainer drives."""

    module: torch.nn.Module
    latent_shape: tuple[int, ...]

    def with_prompts(self, prompts: Sequence[str]) -> VelocityModel:
        """Returns a view of the model that knows these prompts, each encoded once."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (L, ...) of latents (L, *latent_shape) at sigma 0."""
        ...


def decoded(model: Model, x_ND: Tensor, max_batch: int | None) -> Tensor:
    """Returns the images (N, ...) of flat states at sigma 0, without a graph; no call if N is 0.

    Args:
        model: the policy.
        x_ND: (N, D) states.
        max_batch: images of a call at most; None = all at once.
    """
    latents = x_ND.view(len(x_ND), *model.latent_shape)
    if not len(latents):
        return latents
    with torch.no_grad():
        return torch.cat([model.decode(part) for part in latents.split(max_batch or len(latents))])


def token_budget(
    model: VelocityModel, prompt: NDArray[np.integer], max_tokens: int | None
) -> TokenBudget | None:
    """Asks the model how long rows are; None where calls are not filled by tokens.

    Args:
        model: the policy.
        prompt: (M,) prompt indices of a plan's rows.
        max_tokens: of a call; None = no budget.

    Raises:
        TypeError: the model does not count tokens.
        ValueError: its count has another shape, or is no positive integer.
        NotImplementedError: see the model.
    """
    if max_tokens is None:
        return None
    if not isinstance(model, CountsTokens):
        raise TypeError(
            "gradient: model must have row_tokens and variable_length for max_tokens, got "
            f"{type(model).__name__}; try max_batch"
        )
    tokens = np.asarray(model.row_tokens(prompt.astype(np.int64)))
    if tokens.shape != prompt.shape or tokens.dtype.kind not in "iu" or (tokens < 1).any():
        raise ValueError(
            f"row_tokens: result must be {prompt.shape} integers, at least 1, got {tokens.shape} "
            f"{tokens.dtype} from {tokens.min(initial=1)}"
        )
    return TokenBudget(tokens.astype(np.int64), max_tokens, model.variable_length)


def check_tokens(model: Model, prompts: Sequence[str], max_tokens: int | None) -> None:
    """Raises unless calls of an update may be filled by tokens.

    Args:
        model: the policy.
        prompts: of the run; the first one's row must fit.
        max_tokens: of a call; None = no budget.

    Raises:
        TypeError: the model does not count tokens.
        NotImplementedError: its family pads all prompts alike.
        ValueError: a row is longer than a call.
    """
    if max_tokens is None:
        return
    first = np.zeros(1, dtype=np.int64)
    budget = token_budget(model.with_prompts(prompts[:1]), first, max_tokens)
    if budget is not None and budget.tokens_M[0] > max_tokens:
        raise ValueError(
            f"check_tokens: max_tokens must hold a row of {budget.tokens_M[0]}, got {max_tokens}"
        )


def call_velocity(
    model: VelocityModel,
    x_ND: Tensor,
    sigma_N: Tensor,
    prompt_N: Tensor,
    *,
    reference: bool = False,
    host: tuple[Floats, NDArray[np.integer]] | None = None,
) -> Tensor:
    """Calls the model on flat states and returns the flat velocity, (N, D).

    bf16 and fp32 velocities stay as they are, fp16 becomes fp32; fp64 states make them fp64.

    Args:
        model: the policy.
        x_ND: (N, D) states.
        sigma_N: (N,) noise levels, dtype of the states.
        prompt_N: (N,) int64 prompt indices.
        reference: call the base policy instead.
        host: the same (sigma, prompt) on the host. A model that has `announce(sigma, prompt,
            host_sigma, host_prompt)` is told them right before the call, so that finding rows in
            common needs no sync; it may use them for a call with these very tensors only.

    Raises:
        ValueError: the model returned another shape.
        TypeError: the model returned something else than a float tensor.
    """
    shape = (len(x_ND), *model.latent_shape)
    call = model.reference_velocity if reference else model.velocity
    announce = getattr(model, "announce", None)
    if announce is not None and host is not None:
        announce(sigma_N, prompt_N, *host)
    v = call(x_ND.view(shape), sigma_N, prompt_N)
    if not isinstance(v, Tensor) or not v.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        got = v.dtype if isinstance(v, Tensor) else type(v).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{call.__name__}: result must be a float tensor, got {got}")
    if tuple(v.shape) != shape:
        raise ValueError(f"{call.__name__}: result must be {shape}, got {tuple(v.shape)}")
    v = v.reshape(len(x_ND), -1)
    if x_ND.dtype == torch.float64:
        return v.double()
    return v if v.dtype in (torch.float32, torch.bfloat16) else v.float()
