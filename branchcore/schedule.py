"""Noise schedules: sigmas (T + 1,) float64, from sigma_0 = 1 (noise) down to sigma_T = 0 (image).

`x_sigma = (1 - sigma) x0 + sigma eps`; T is the number of sampling steps.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def _shift(t: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return shift * t / (1.0 + (shift - 1.0) * t)


def _check(name: str, steps: int, shift: float = 1.0) -> None:
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
    if not shift > 0.0:
        raise ValueError(f"{name}: shift must be positive, got {shift}")


def shifted_linear(steps: int, shift: float = 1.0) -> NDArray[np.float64]:
    """Returns `k t / (1 + (k - 1) t)` on an even grid t = 1..0.

    >>> from branchcore import schedule
    >>> schedule.shifted_linear(4, shift=3).tolist()
    [1.0, 0.9, 0.75, 0.5, 0.0]

    Args:
        steps: T, number of sampling steps.
        shift: k; 3 for FLUX in DanceGRPO, MixGRPO, BranchGRPO; 1 leaves the grid linear.

    Source: DanceGRPO `sd3_time_shift`; BranchGRPO uses the same.
    """
    _check("shifted_linear", steps, shift)
    return _shift(np.linspace(1.0, 0.0, steps + 1), shift)


def truncated_times(steps: int, shift: float = 3.0) -> NDArray[np.float64]:
    """Returns the (T,) conditioning times of DanceGRPO's released code, int(1000 sigma) / 1000.

    Its sigmas are fp32, so 0.875 becomes 0.874; an adapter that must reproduce it conditions on
    these while the steps use `shifted_linear`.

    Source: DanceGRPO `run_sample_step`; BranchGRPO and MixGRPO do the same.
    """
    _check("truncated_times", steps, shift)
    t = np.linspace(1.0, 0.0, steps + 1, dtype=np.float32)
    sigma = np.float32(shift) * t / (np.float32(1.0) + np.float32(shift - 1.0) * t)
    return np.floor(np.float32(1000.0) * sigma[:-1]).astype(np.float64) / 1000.0


def flow_match_euler(steps: int, shift: float = 3.0) -> NDArray[np.float64]:
    """Returns the sigmas of diffusers' FlowMatchEulerDiscreteScheduler, double shift included.

    Its table of 1000 training sigmas is shifted, sampled evenly, and shifted once more.

    Args:
        steps: T, number of sampling steps.
        shift: the scheduler's `shift`; 3 for SD3 and SD3.5.

    Source: diffusers `scheduling_flow_match_euler_discrete.py`; SD3.5 in Flow-GRPO and TempFlow.
    """
    _check("flow_match_euler", steps, shift)
    ends = _shift(np.array([1.0, 1.0 / 1000.0]), shift)
    return np.append(_shift(np.linspace(ends[0], ends[1], steps), shift), 0.0)


def flux_dynamic(
    steps: int,
    image_tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> NDArray[np.float64]:
    """Returns FLUX's schedule, `e^mu / (e^mu + 1/t - 1)` on t = 1..1/T, then 0.

    Args:
        steps: T, number of sampling steps.
        image_tokens: packed latent tokens, 1024 at 512 px; mu is linear in it.
        base_shift: mu at `base_tokens`.
        max_shift: mu at `max_tokens`.
        base_tokens: lower anchor of the line.
        max_tokens: upper anchor of the line.

    Source: diffusers `calculate_shift` and the exponential time shift of FLUX.1-dev.
    """
    _check("flux_dynamic", steps)
    if image_tokens < 1:
        raise ValueError(f"flux_dynamic: image_tokens must be at least 1, got {image_tokens}")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    factor = math.exp(base_shift + slope * (image_tokens - base_tokens))
    t = np.linspace(1.0, 1.0 / steps, steps)
    return np.append(factor / (factor + (1.0 / t - 1.0)), 0.0)
