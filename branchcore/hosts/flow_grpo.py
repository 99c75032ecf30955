"""Flow-GRPO's step, log-probability and losses, with its own signatures.

Host: yifan123/flow_grpo, `diffusers_patch/sd3_sde_with_logprob.py` at 54809b5 (sde_type, return
values) and the loss in `scripts/train_sd3.py` at 74db691; its forks import the same function. It
gets latents of any layout with the batch first: SD3 (B, C, H, W), FLUX (B, L, C), Wan
(B, C, F, H, W).
Seam: import `sde_step_with_logprob` from here, and write `clipped_loss` for the loss's lines.
`branchcore.updates` takes over a whole iteration.

What differs, on purpose:
- states of float64 stay float64; the host rounds everything to float32;
- coefficients are computed in float64 on the host, once per call, from one copy of the timesteps;
- a deterministic step (noise_level 0) has log-probability 0; the host has NaN, 0/0, with "sde";
- the state has no gradient: asking for one is an error;
- of a CPU generator and CUDA latents the noise is drawn on the CPU, as diffusers does.
What looks like a bug in the host and is kept, so that results are the same:
- log-probabilities are means over the latent's elements, not sums: the ratio of the joint density
  is their number times as far from 1, and a clip range means something else at every resolution;
- with "cps" the log-probability lacks 1 / (2 s^2), so that its clip range is in other units;
- the KL divides by g^2 instead of g^2 dt; `kl_loss(..., sqrt_dt=)` gives the true one.
Not supported: the host's versions before July 2025 (`determistic=`), `ode_step_with_logprob`.

Letters: B latents of a call, D elements of one, T steps of the schedule.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from branchcore.hosts import _seam
from branchcore.objective import check_clip
from branchcore.reference import RatioLoss
from branchcore.steps import Row, Step, cps, euler, flow_sde

VERSION = "54809b5"
KINDS = ("sde", "cps")
_STEP, _LOSS, _KL = "flow_grpo.sde_step_with_logprob", "flow_grpo.clipped_loss", "flow_grpo.kl_loss"
_host = _seam.host("Flow-GRPO", VERSION)


@_host
def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """Takes one stochastic step and gives the log-probability of its result, or of a stored one.

    Args:
        self: the scheduler, with its `timesteps` (T,) and `sigmas` (T + 1,) set.
        model_output: (B, ...) velocity v = eps - x0, any float dtype; differentiable.
        timestep: (B,) or (1,) of the scheduler's timesteps.
        sample: (B, ...) states, no gradient.
        noise_level: the paper's a ("sde") or eta ("cps"); 0 is the Euler step.
        prev_sample: (B, ...) stored results, which are scored; None = draw them.
        generator: of the noise; one, or one per latent.
        sde_type: "sde" or "cps".
        return_sqrt_dt: return a fifth value.

    Returns:
        prev_sample (B, ...); log_prob (B,), nats per element ("cps": minus the mean square);
        prev_sample_mean (B, ...), differentiable; std_dev_t (n, 1, ...) with n timesteps, which is
        g of "sde", the step's std of "cps"; with return_sqrt_dt also sqrt(dt) (n, 1, ...). All
        fp32, fp64 where the states are.

    Numerics: equal states, velocity and result give equal bits in the rollout and in training.
    Raises:
        ValueError: shapes do not match, or the scheduler is no flow-matching schedule with this
            timestep.
        NotImplementedError: a gradient of the states.
    Source: Flow-GRPO eq. 9; Flow-CPS.
    """
    given = {"model_output": model_output}
    given |= {} if prev_sample is None else {"prev_sample": prev_sample}
    x, v, *stored = _seam.states(_STEP, sample=_seam.single(sample), **given)
    steps, std, sqrt_dt = _steps(self, timestep, len(x), float(noise_level), sde_type)
    rows = _seam.rows(steps, x)
    mean = _seam.child(x, v, rows)
    y = stored[0].to(mean.dtype) if stored else _seam.drawn(mean, rows, sample.shape, generator)
    miss = _seam.miss(x, v, y, rows)
    log_prob = -miss if sde_type == "cps" and noise_level else _seam.gaussian(miss, rows)
    ones = (1,) * (sample.ndim - 1)
    found = (
        y.view(sample.shape),
        log_prob,
        mean.view(sample.shape),
        mean.new_tensor(std).view(-1, *ones),
    )
    return (*found, mean.new_tensor(sqrt_dt).view(-1, *ones)) if return_sqrt_dt else found


def clipped_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
) -> RatioLoss:
    """Takes the mean clipped loss of a batch, `max(-A r, -A clip r)`, in one launch.

    Args:
        log_prob: (B,) fp32 or fp64, of the current policy; differentiable.
        old_log_prob: (B,) of the rollout.
        advantages: (B,).
        clip_range: the ratio is clipped to 1 - it and 1 + it.
        adv_clip_max: advantages are clamped to it, as the host does.

    Returns:
        The loss, and `RatioStats`: sums over the batch of what was clipped and of |ratio - 1|.

    Source: `scripts/train_sd3.py` of the host.
    """
    _seam.per_sample(_LOSS, log_prob, "log_prob", old_log_prob=old_log_prob, advantages=advantages)
    check_clip(_LOSS, (clip_range, clip_range))
    log_ratio = log_prob - old_log_prob.detach().to(log_prob.dtype)
    return _seam.clipped(log_ratio, advantages, clip_range, adv_clip_max)


def kl_loss(
    prev_sample_mean: Tensor,
    prev_sample_mean_ref: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor | None = None,
) -> Tensor:
    """Takes the mean KL of a batch to the reference policy, per latent element.

    Args:
        prev_sample_mean: (B, ...) of the policy; differentiable.
        prev_sample_mean_ref: (B, ...) of the reference.
        std_dev_t: (n, 1, ...) as the step returned it, n = 1 or B.
        sqrt_dt: (n, 1, ...) of a step with return_sqrt_dt: the true KL of two Gaussians of std
            g sqrt(dt). None = the host's, which lacks it: 1 / dt smaller. "cps" needs none.

    Returns:
        (), the mean over the batch.
    """
    reference, mean = _seam.states(
        _KL, prev_sample_mean_ref=prev_sample_mean_ref.detach(), prev_sample_mean=prev_sample_mean
    )
    scale = std_dev_t if sqrt_dt is None else std_dev_t * sqrt_dt
    if scale.numel() not in (1, len(mean)):
        raise ValueError(
            f"{_KL}: std_dev_t must have 1 or {len(mean)} elements, got {scale.numel()}"
        )
    return (_seam.distance(mean, reference) / (2.0 * scale.flatten().square())).mean()


def _steps(
    scheduler: Any, timestep: Tensor, count: int, noise_level: float, sde_type: str
) -> tuple[list[Row], list[float], list[float]]:
    """Returns the step of every timestep, the host's std_dev_t, and sqrt(dt)."""
    _seam.chosen(_STEP, "sde_type", sde_type, KINDS)
    if not (noise_level >= 0.0 and math.isfinite(noise_level)):
        raise ValueError(f"{_STEP}: noise_level must be finite and >= 0, got {noise_level}")
    if timestep.ndim != 1 or len(timestep) not in {1, count}:
        raise ValueError(
            f"{_STEP}: timestep must be (1,) or ({count},), got {tuple(timestep.shape)}"
        )
    times, asked, sigmas = _schedule(scheduler, timestep)
    index = {time: i for i, time in enumerate(times)}
    unknown = [time for time in asked if time not in index]
    if unknown:
        raise ValueError(
            f"{_STEP}: timestep must be of the scheduler's {len(times)} from {times[0]:g} to "
            f"{times[-1]:g}, got {unknown[0]:g}; try set_timesteps() with the rollout's steps"
        )
    step: Step = euler
    if noise_level > 0.0:
        step = cps(noise_level) if sde_type == "cps" else flow_sde(noise_level, sigmas[1])
    levels = [(sigmas[index[time]], sigmas[index[time] + 1]) for time in asked]
    rows = [step((), sigma, below) for sigma, below in levels]
    sqrt_dt = [math.sqrt(sigma - below) for sigma, below in levels]
    if sde_type == "cps":
        return rows, [row.s for row in rows], sqrt_dt
    return rows, [row.s / root for row, root in zip(rows, sqrt_dt, strict=True)], sqrt_dt


def _schedule(scheduler: Any, timestep: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Returns the scheduler's timesteps, those asked for, and its noise levels, in one copy each.

    Raises:
        ValueError: they are not those of a flow-matching schedule.
    """
    own, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    if not isinstance(own, Tensor) or not isinstance(sigmas, Tensor):
        raise ValueError(
            f"{_STEP}: scheduler must have tensors timesteps and sigmas, got "
            f"{type(scheduler).__name__} without; try FlowMatchEulerDiscreteScheduler"
        )
    levels: list[float] = sigmas.double().tolist()
    falls = all(above > below for above, below in itertools.pairwise(levels))
    if len(levels) != len(own) + 1 or not falls or levels[0] > 1.0 or levels[-1] < 0.0:
        raise ValueError(
            f"{_STEP}: scheduler must have T timesteps and T + 1 sigmas that fall within [0, 1], "
            f"got {len(own)} and {len(levels)} from {levels[0]:g} to {levels[-1]:g}; "
            "try set_timesteps()"
        )
    both: list[float] = torch.cat([own.to(timestep.device), timestep]).tolist()
    return both[: len(own)], both[len(own) :], levels


__all__ = ["KINDS", "VERSION", "clipped_loss", "kl_loss", "sde_step_with_logprob"]
