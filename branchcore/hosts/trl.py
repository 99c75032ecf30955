"""TRL, huggingface/trl at ce01fd5 (DDPO) and d2b69d7 (GRPO): reward functions and the DDPO loss.

Seam: `GRPOReward` and `DDPOReward` make branchcore rewards of reward functions in TRL's signatures;
`policy_loss` is the loss of `DDPOTrainer.calculate_loss` from the log-probabilities on.

Differs from the host:
- None masks the leaf for all components, up to `reward_max_failed`; there it leaves that function
  out of the row's sum. NaN is an error, there the same as None.
- `completions` are the images, (N, 3, H, W) in [0, 1]; columns of the data set come from `columns`.

Not supported: functions that need `completion_ids` (images have no tokens), asynchronous ones, and
reward models given as modules; `DDPOTrainer.scheduler_step`, which is DDIM's and not a flow's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore.hosts import _seam
from branchcore.rewards import Partial

VERSION = "ce01fd5"


class GRPOReward:
    """A reward function of `GRPOTrainer` as a branchcore reward.

    Args:
        function: `function(prompts=, completions=, **columns)` -> a number or None per completion.
        columns: column of the data set -> prompt -> value, what TRL passes beside the prompts.
        name: of the component; None = the function's.

    Raises:
        NotImplementedError: the function is asynchronous.
        TypeError: it needs arguments that there are none for.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[float | None]],
        columns: Mapping[str, Mapping[str, Any]] | None = None,
        name: str | None = None,
    ) -> None:
        self.function, self.columns = function, dict(columns or {})
        self.name = name or _name(function)
        _check_arguments("trl.GRPOReward", function, {"prompts", "completions", *self.columns})

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns {name: (N,) fp32}, with leaves masked where the function said None."""
        columns: dict[str, list[Any]] = {}
        for column, values in self.columns.items():
            missing = [prompt for prompt in prompts if prompt not in values]
            if missing:
                raise ValueError(
                    f"trl.GRPOReward: columns[{column!r}] must have every prompt, got none for "
                    f"{missing[0]!r}"
                )
            columns[column] = [values[prompt] for prompt in prompts]
        scores = list(self.function(prompts=prompts, completions=images, **columns))
        masked = np.array([score is None for score in scores], dtype=bool)
        numbers = [0.0 if score is None else float(score) for score in scores]
        result = {self.name: torch.tensor(numbers, dtype=torch.float32)}
        if not masked.any():
            return result
        if len(masked) != len(images):
            raise ValueError(
                f"trl.GRPOReward: {self.name} must return {len(images)} numbers, got {len(masked)}"
            )
        return Partial(result, masked, f"{self.name} returned None")


class DDPOReward:
    """A reward function of `DDPOTrainer` as a branchcore reward.

    Args:
        function: `function(images, prompts, prompt_metadata)` -> (rewards, metadata).
        metadata: prompt -> its metadata; None = an empty dict each.
        name: of the component; None = the function's.

    Raises:
        NotImplementedError: the function is asynchronous.
    """

    def __init__(
        self,
        function: Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]],
        metadata: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.function, self.metadata = function, dict(metadata or {})
        self.name = name or _name(function)
        _check_arguments("trl.DDPOReward", function, None)

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns {name: (N,) fp32}; the function's metadata is dropped."""
        metadata = tuple(self.metadata.get(prompt, {}) for prompt in prompts)
        found = self.function(images, tuple(prompts), metadata)
        if not isinstance(found, tuple) or len(found) != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"trl.DDPOReward: {self.name} must return (rewards, metadata), "
                f"got {type(found).__name__}"
            )
        return {self.name: torch.as_tensor(found[0]).detach().float()}


class DDPOLoss(NamedTuple):
    """What `DDPOTrainer.calculate_loss` returns."""

    loss: Tensor
    approx_kl: Tensor
    """mean of half the squared log ratio."""
    clipfrac: Tensor
    """Share of ratios outside the clip range."""


@_seam.host("TRL", VERSION)
def policy_loss(
    log_prob: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    *,
    train_clip_range: float,
    train_adv_clip_max: float,
) -> DDPOLoss:
    """Returns the clipped loss and its two numbers.

    Args:
        log_prob: (B,) now, differentiable.
        log_probs: (B,) of the rollout.
        advantages: (B,).
        train_clip_range: `DDPOConfig.train_clip_range`, 1e-4.
        train_adv_clip_max: `DDPOConfig.train_adv_clip_max`, 5.
    """
    op = "trl.policy_loss"
    _seam.per_sample(op, log_prob, "log_prob", log_probs=log_probs, advantages=advantages)
    log_ratio = log_prob - log_probs.detach()
    result = _seam.clipped(log_ratio, advantages, train_clip_range, train_adv_clip_max)
    with torch.no_grad():
        outside = (log_ratio.exp() - 1.0).abs() > train_clip_range
        approx_kl, share = 0.5 * log_ratio.square().mean(), outside.to(log_ratio.dtype).mean()
    return DDPOLoss(result.loss, approx_kl, share)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_arguments(op: str, function: Callable[..., Any], given: set[str] | None) -> None:
    if isinstance(function, torch.nn.Module):
        raise NotImplementedError(f"{op}: function must be a function, got the module {function}")
    if inspect.iscoroutinefunction(function):
        raise NotImplementedError(f"{op}: function must not be asynchronous, got {_name(function)}")
    if given is None:
        return
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = sorted(set(needed) - given)
    if missing:
        raise TypeError(
            f"{op}: {_name(function)} must need no more than {', '.join(sorted(given))}, got "
            f"{', '.join(missing)}; try columns={{{missing[0]!r}: {{prompt: value}}}}"
        )


__all__ = ["VERSION", "DDPOLoss", "DDPOReward", "GRPOReward", "policy_loss"]
