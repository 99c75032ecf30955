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
- a deterministic step (noise_level 0) has log-probability 0; the host has 0/0 there, NaN;
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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from branchcore import ops
from branchcore.noise import NO_STREAM, Noise
from branchcore.objective import check_clip
from branchcore.reference import RatioLoss
from branchcore.steps import Row, Step, cps, euler, flow_sde

_STEP = "sde_step_with_logprob"


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
    _check_states(model_output, sample, prev_sample)
    rows, std, sqrt_dt = _rows(self, timestep, len(sample), float(noise_level), sde_type)
    x, v = _flat(sample), _flat_velocity(model_output, sample)
    count, device = len(x), x.device
    row_B4 = torch.tensor([row[:4] for row in rows], dtype=torch.float64, device=device)
    row_B4 = row_B4.expand(count, 4).contiguous()
    start = torch.arange(count + 1, device=device)
    still_B4 = row_B4 * row_B4.new_tensor([1.0, 1.0, 1.0, 0.0])
    mean = ops.branch_step(x, v, still_B4, start, _no_noise(count, device)).y_MD
    if prev_sample is not None:
        y = _flat(prev_sample).to(mean.dtype)
    else:
        eps = _draw(sample.shape, generator, device, mean.dtype)
        y = mean + row_B4[:, 3:].to(mean.dtype) * eps.flatten(1)
    if sde_type == "cps":
        log_prob = -(y.detach() - mean).square().mean(1)
    elif noise_level == 0.0:
        log_prob = mean.new_zeros(count)
    else:
        log_prob = ops.sde_log_prob(x, v, y.detach(), row_B4, start)
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
    name = "clipped_loss"
    if log_prob.ndim != 1 or not log_prob.shape == old_log_prob.shape == advantages.shape:
        shapes = [tuple(t.shape) for t in (log_prob, old_log_prob, advantages)]
        raise ValueError(f"{name}: log_prob, old_log_prob, advantages must be (B,), got {shapes}")
    check_clip(name, (clip_range, clip_range))
    count, device = len(log_prob), log_prob.device
    clamped = advantages.detach().double().clamp(-adv_clip_max, adv_clip_max)
    return ops.ratio_loss(
        log_prob - old_log_prob.detach().to(log_prob.dtype),
        torch.zeros_like(log_prob),
        torch.arange(count + 1, device=device),
        torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device).repeat(count, 1),
        torch.stack([clamped.clamp(min=0.0), (-clamped).clamp(min=0.0)], dim=1),
        torch.full((count,), 1.0 / max(count, 1), dtype=torch.float64, device=device),
        (clip_range, clip_range),
    )


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
    if prev_sample_mean.shape != prev_sample_mean_ref.shape:
        raise ValueError(
            f"kl_loss: prev_sample_mean_ref must be {tuple(prev_sample_mean.shape)}, got "
            f"{tuple(prev_sample_mean_ref.shape)}"
        )
    scale = std_dev_t if sqrt_dt is None else std_dev_t * sqrt_dt
    if scale.numel() not in (1, len(prev_sample_mean)):
        raise ValueError(
            f"kl_loss: std_dev_t must have 1 or {len(prev_sample_mean)} elements, got "
            f"{scale.numel()}"
        )
    reference = prev_sample_mean_ref.detach().flatten(1).to(prev_sample_mean.dtype)
    q_B = ops.edge_dots(prev_sample_mean.flatten(1), reference).q_N
    return (q_B / (2.0 * scale.flatten().square())).mean()


def _check_states(model_output: Tensor, sample: Tensor, prev_sample: Tensor | None) -> None:
    for name, value in (("model_output", model_output), ("prev_sample", prev_sample)):
        if value is not None and value.shape != sample.shape:
            raise ValueError(
                f"{_STEP}: {name} must be {tuple(sample.shape)} like sample, got "
                f"{tuple(value.shape)}"
            )
    if sample.ndim < 2:
        raise ValueError(f"{_STEP}: sample must be (B, ...), got {tuple(sample.shape)}")
    if sample.requires_grad:
        raise NotImplementedError(
            f"{_STEP}: sample must have no gradient, got one that requires it; try detach()"
        )


def _flat(states: Tensor) -> Tensor:
    wide = states if states.dtype == torch.float64 else states.float()
    return wide.flatten(1).detach()


def _flat_velocity(model_output: Tensor, sample: Tensor) -> Tensor:
    """Returns (B, D) in a dtype that the ops take with these states: bf16 stays as it is."""
    v = model_output.flatten(1)
    if sample.dtype == torch.float64:
        return v.double()
    return v if v.dtype in (torch.float32, torch.bfloat16) else v.float()


def _rows(
    scheduler: Any, timestep: Tensor, count: int, noise_level: float, sde_type: str
) -> tuple[list[Row], list[float], list[float]]:
    """Returns the step of every timestep, the host's std_dev_t, and sqrt(dt)."""
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"{_STEP}: sde_type must be 'sde' or 'cps', got {sde_type!r}")
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


def _no_noise(count: int, device: torch.device) -> Noise:
    return Noise(
        torch.zeros(3, dtype=torch.int64, device=device),
        torch.full((count, 3), NO_STREAM, dtype=torch.int32, device=device),
        torch.zeros(count, 2, dtype=torch.float64, device=device),
    )


def _draw(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Draws the numbers that the host draws: of one generator, or a latent of each."""
    if isinstance(generator, list) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, list):
        where = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{_STEP}: generator must be one or {shape[0]}, one per latent, got {len(generator)}"
        )
    one = (1, *shape[1:])
    return torch.cat([_draw(one, each, device, dtype) for each in generator])
