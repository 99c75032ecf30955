"""A pipeline with prompts encoded: what a rollout and an update call.

The velocity is v = eps - x0 at x_sigma = (1 - sigma) x0 + sigma eps. Letters: N rows of a call, P
prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from branchcore.credit import Floats
from branchcore.models.family import Text
from branchcore.models.sharing import Rows
from branchcore.plan import Ints

if TYPE_CHECKING:
    from branchcore.models.flow_model import FlowModel


TEXT_STEP = 64
"""A call pads its texts to its longest one, rounded up to this: few shapes, often shared."""


class _HostRows(NamedTuple):
    sigma: Floats
    prompt: NDArray[np.integer]


class _Announced(NamedTuple):
    sigma: Tensor
    prompt: Tensor
    host: _HostRows


class PromptedFlow:
    """The `VelocityModel` of a model and its prompts; shares the model's weights.

    Args:
        model: the policy.
        text: (P, ...) conditioning; the last row is the negative prompt's if there is guidance.
    """

    variable_length = False

    def __init__(self, model: FlowModel, text: Text) -> None:
        self.model, self.text = model, text
        self.latent_shape = model.latent_shape
        self._null = len(next(iter(text.values()))) - 1 if model.guidance > 1.0 else None
        own, step = model.family.text_lengths(text), TEXT_STEP
        self._lengths = None if own is None else np.minimum(-(-own // step) * step, own.max())
        self._announced: _Announced | None = None

    def row_tokens(self, prompt: Ints) -> Ints:
        """Returns (N,) tokens of latent and padded text of rows with these prompts.

        Raises:
            NotImplementedError: the family pads all prompts alike.
        """
        family = self.model.family
        if self._lengths is None:
            raise NotImplementedError(
                f"row_tokens: texts must keep their length, got padded {family.name}; try max_batch"
            )
        latent = family.pack(torch.empty(1, *self.latent_shape, device="meta"))
        return latent.shape[1] + self._lengths[prompt]

    def announce(
        self,
        sigma: Tensor,
        prompt: Tensor,
        host_sigma: Floats,
        host_prompt: NDArray[np.integer],
    ) -> None:
        """Tells what a coming call's sigma and prompt hold, which saves copies from the device.

        Used for the next call, if it has these very tensors; any other reads its own.
        """
        self._announced = _Announced(sigma, prompt, _HostRows(host_sigma, host_prompt))

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the guided velocity (N, *latent_shape) of the policy."""
        return self._velocity(self.model.module, x, sigma, prompt)

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the guided velocity of the frozen base policy."""
        with self.model.as_reference() as module:
            return self._velocity(module, x, sigma, prompt)

    def _velocity(self, module: nn.Module, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        model, family = self.model, self.model.family
        host = self._host_rows(sigma, prompt)
        packed = family.pack(x.to(model.dtype))
        if model.guidance == 1.0:
            return family.unpack(
                self._predict(module, packed, sigma, prompt, host), self.latent_shape
            )
        if self._null is None:
            raise ValueError(
                f"velocity: guidance must be 1 for prompts without a negative one, got "
                f"{model.guidance}; try with_prompts() after setting it"
            )
        null, null_host = torch.full_like(prompt, self._null), np.full_like(host.prompt, self._null)
        if torch.is_grad_enabled() and not model.train_uncond:
            with torch.no_grad():
                uncond = self._predict(module, packed, sigma, null, host._replace(prompt=null_host))
            cond = self._predict(module, packed, sigma, prompt, host)
        else:
            both = _HostRows(
                np.concatenate([host.sigma] * 2), np.concatenate([host.prompt, null_host])
            )
            twice = self._predict(
                module, torch.cat([packed] * 2), sigma.repeat(2), torch.cat([prompt, null]), both
            )
            cond, uncond = twice.chunk(2)
        if cond.dtype in (torch.bfloat16, torch.float16):
            cond, uncond = cond.float(), uncond.float()
        return family.unpack(family.guide(cond, uncond, model.guidance), self.latent_shape)

    def _host_rows(self, sigma: Tensor, prompt: Tensor) -> _HostRows:
        told, self._announced = self._announced, None
        if told is not None and told.sigma is sigma and told.prompt is prompt:
            return told.host
        return _HostRows(sigma.double().cpu().numpy(), prompt.cpu().numpy())

    def _predict(
        self, module: nn.Module, packed: Tensor, sigma: Tensor, prompt: Tensor, host: _HostRows
    ) -> Tensor:
        text = {name: value[prompt] for name, value in self.text.items()}
        model, family = self.model, self.model.family
        if model.rollout_predict is not None and not torch.is_grad_enabled():
            return model.rollout_predict(module, packed, sigma, text)  # of few fixed shapes
        if self._lengths is not None:
            text = family.cut(text, int(self._lengths[host.prompt].max(initial=0)))
        sharing = model.frozen_sharing if module is model.frozen else model.sharing
        if sharing is None:
            return family.predict(module, packed, sigma, text, self.latent_shape)
        with sharing.using(Rows(host.sigma, host.prompt, packed.device)):
            return family.predict(module, packed, sigma, text, self.latent_shape)
