"""verl-omni, verl-project/verl-omni at 39809f6: `FlowMatchSDEDiscreteScheduler` and its losses.

Seam: `sample_previous_step(scheduler, ...)`, the method's arguments and results with the scheduler
in front; `flow_grpo_loss` and `grpo_guard_loss`, the `compute_loss` of the classes of those names
(`diffusion_algos.py` at 073521e), with their metrics.

Differs from the host:
- the log-probability of a step without noise is 0; there 0 / 0 gives NaN.
- metrics come from the device in one copy; `ratio_std` of a single sample is 0, there NaN.
- model outputs may be bf16; they are multiplied in fp32.
As there, `std_dev_t` of "sde" is g, not g sqrt(dt), "cps" is -(y - mean)^2, and GRPO-Guard takes
its scale from the batch means of g and sqrt(dt): right only for batches of one timestep.

Not supported: gradients to `sample`; `per_token_timesteps`; `log_prob_mask`; the losses dpo and
distillation; diffusion_nft is `diffusion_nft.policy_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from branchcore import steps
from branchcore.hosts import _seam
from branchcore.noise import Noise
from branchcore.reference import RatioLoss

VERSION = "39809f6"
KINDS = ("cps", "sde", "dance_sde")
_host = _seam.host("verl-omni", VERSION)


class Scheduler(Protocol):
    """What is read of the host's scheduler."""

    sigmas: Tensor
    step_index: int | None

    def index_for_timestep(self, timestep: Any) -> int:
        """Returns the step of a timestep."""
        ...


@_host
def sample_previous_step(
    scheduler: Scheduler,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: _seam.Generators = None,
    per_token_timesteps: Tensor | None = None,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor | None, ...]:
    """Takes one step from every sample's own timestep and scores it.

    Args:
        scheduler: the host's; see `Scheduler`.
        sample: (B, ...) fp32 states.
        model_output: (B, ...) fp32 or bf16, velocity; the only differentiable input.
        timestep: (B,) from the scheduler's timesteps; None = its `step_index`.
        generator: torch's, one or one per sample, for the draw.
        per_token_timesteps: None.
        noise_level: a of "sde", eta of "cps" and "dance_sde".
        prev_sample: (B, ...) the next state to score; None draws it.
        sde_type: "sde", "cps" or "dance_sde".
        return_logprobs: False returns None for them.
        return_sqrt_dt: append sqrt(sigma - sigma').
        include_logprob_normalizer: False leaves out `-log s - log(2 pi) / 2`.
        noise: branchcore's own: names of B draws, instead of torch's generator.

    Returns:
        prev_sample (B, ...), log_prob (B,), prev_sample_mean (B, ...), std_dev_t () or, with
        timestep, (B, 1, ...), and sqrt_dt (B,) if asked for.
    """
    op = "verl_omni.sample_previous_step"
    _seam.chosen(op, "sde_type", sde_type, KINDS)
    if per_token_timesteps is not None:
        raise NotImplementedError(f"{op}: per_token_timesteps must be None, got a tensor")
    pairs, second = _pairs(op, scheduler, timestep, len(sample))
    step = _step(sde_type, noise_level, second)
    moves = [step((), *pair) for pair in pairs]
    x, v = _seam.states(op, sample=sample, model_output=model_output)
    rows, shape = _seam.rows(moves, x), sample.shape
    mean = _seam.child(x, v, rows)
    if prev_sample is not None:
        y = _seam.states(op, sample=sample, prev_sample=prev_sample)[1]
    elif noise is not None:
        y = _seam.child(x, v, rows, noise)
    else:
        y = _seam.drawn(mean, rows, shape, generator)
    log_prob = None
    if return_logprobs:
        missed = _seam.miss(x, v, y, rows)
        constants = include_logprob_normalizer
        gaussian = _seam.gaussian(missed, rows, constants=constants)
        log_prob = -missed if sde_type == "cps" else gaussian
    dt = rows.new_tensor([sigma - after for sigma, after in pairs])
    s = rows[: len(pairs), 3]
    std = (s / dt.sqrt() if sde_type == "sde" else s).to(mean.dtype)
    std = std[0] if timestep is None else std.view(-1, *[1] * (len(shape) - 1))
    found = (y.view(shape), log_prob, mean.view(shape), std)
    if not return_sqrt_dt:
        return found
    return (*found, dt.sqrt().to(mean.dtype).expand(len(sample)).clone())


def _pairs(
    op: str, scheduler: Any, timestep: Tensor | None, size: int
) -> tuple[list[tuple[float, float]], float]:
    sigmas = _seam.field(op, scheduler, "sigmas")
    if timestep is None:
        index = _seam.field(op, scheduler, "step_index")
        if index is None:
            raise ValueError(f"{op}: timestep must be given before the scheduler's first step")
        where = [index]
    else:
        if timestep.shape != (size,):
            raise ValueError(f"{op}: timestep must be ({size},), got {tuple(timestep.shape)}")
        find = _seam.field(op, scheduler, "index_for_timestep")
        where = [int(find(t)) for t in timestep]
    _, _, second = _seam.levels(op, sigmas, where[0])
    table = sigmas.tolist()
    pairs = [(table[i], table[i + 1]) for i in where]
    for pair in pairs:
        _seam.falling(op, *pair)
    return pairs, second


def _step(sde_type: str, level: float, second: float) -> steps.Step:
    if level == 0.0:
        return steps.euler
    if sde_type == "cps":
        return steps.cps(level)
    return steps.dance_sde(level) if sde_type == "dance_sde" else steps.flow_sde(level, second)


@_host
def flow_grpo_loss(
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the clipped loss and its metrics: `FlowGRPOLoss.compute_loss`.

    Args:
        old_log_prob: (B,) of the rollout.
        log_prob: (B,) differentiable.
        advantages: (B,).
        config: the host's; reads diffusion_loss.clip_ratio and .adv_clip_max.
        rollout_is_weights: (B,) weights of the terms, >= 0; the mean is over B, as there.
    """
    op = "verl_omni.flow_grpo_loss"
    _seam.per_sample(op, log_prob, "log_prob", old_log_prob=old_log_prob, advantages=advantages)
    log_ratio = log_prob - old_log_prob.detach()
    result, clip = _clipped(op, log_ratio, advantages, config, rollout_is_weights)
    return result.loss, _metrics(log_ratio, log_ratio, clip)


@_host
def grpo_guard_loss(
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    old_prev_sample_mean: Tensor,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Returns GRPO-Guard's loss and its metrics: `GRPOGuardLoss.compute_loss`.

    log r = (log p - log p_old + mean((mu - mu_old)^2) / (2 s^2)) s, s = mean g mean sqrt(dt), and
    the loss is divided by dt.

    Args:
        old_log_prob: (B,) of the rollout.
        log_prob: (B,) differentiable.
        advantages: (B,).
        config: the host's; reads diffusion_loss.clip_ratio and .adv_clip_max.
        old_prev_sample_mean: (B, ...) of the rollout.
        prev_sample_mean: (B, ...) differentiable.
        std_dev_t: g, as `sample_previous_step` returns it.
        sqrt_dt: (B,).
        rollout_is_weights: (B,) weights of the terms, >= 0.

    Source: GRPO-Guard, arXiv 2510.22319.
    """
    op = "verl_omni.grpo_guard_loss"
    _seam.per_sample(op, log_prob, "log_prob", old_log_prob=old_log_prob, advantages=advantages)
    old, mean = _seam.states(
        op, old_prev_sample_mean=old_prev_sample_mean.detach(), prev_sample_mean=prev_sample_mean
    )
    root = sqrt_dt.detach().mean()
    scale = root * std_dev_t.detach().mean()
    drift = _seam.distance(mean, old) / (2.0 * scale.square())
    log_ratio = log_prob - old_log_prob.detach()
    guarded = (log_ratio + drift) * scale
    result, clip = _clipped(op, guarded, advantages, config, rollout_is_weights)
    return result.loss / root.square(), _metrics(log_ratio, guarded, clip)


def _clipped(
    op: str, log_ratio: Tensor, advantages: Tensor, config: Any, weights: Tensor | None
) -> tuple[RatioLoss, float]:
    options = _seam.field(op, config, "diffusion_loss")
    clip, bound = (float(_seam.field(op, options, n)) for n in ("clip_ratio", "adv_clip_max"))
    if weights is not None:
        _seam.per_sample(op, log_ratio, "log_prob", rollout_is_weights=weights)
    return _seam.clipped(log_ratio, advantages, clip, bound, weights), clip


def _metrics(log_ratio: Tensor, log_scaled: Tensor, clip: float) -> dict[str, float]:
    with torch.no_grad():
        ratio = log_scaled.exp()
        above, below = ratio - 1.0 > clip, 1.0 - ratio > clip
        numbers = {
            "actor/ppo_kl": -log_ratio.mean(),
            "actor/pg_clipfrac": (above | below).to(ratio.dtype).mean(),
            "actor/pg_clipfrac_higher": above.to(ratio.dtype).mean(),
            "actor/pg_clipfrac_lower": below.to(ratio.dtype).mean(),
            "actor/ratio_mean": ratio.mean(),
            "actor/ratio_std": ratio.std() if len(ratio) > 1 else torch.zeros_like(ratio[0]),
        }
        values: Sequence[float] = torch.stack(list(numbers.values())).tolist()
    return dict(zip(numbers, values, strict=True))


__all__ = ["KINDS", "VERSION", "flow_grpo_loss", "grpo_guard_loss", "sample_previous_step"]
