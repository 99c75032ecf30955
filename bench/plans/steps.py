"""The released trainers' arithmetic of one edge, in their own form; nothing here is the engine's.

Sources: DanceGRPO and BranchGRPO `flux_step`; Flow-GRPO `sde_step_with_logprob`, which MixGRPO,
TempFlow-GRPO and Granular-GRPO copy; MixGRPO `dpm_step`; GRPO-Guard's loss in
scripts/train_sd3_GRPO_Guard.py of Flow-GRPO.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Level = float | Tensor
"""A noise level: one for all rows, or (n, 1, ..., 1)."""


class Seen(NamedTuple):
    """A noise level and the image predicted there: what a multistep solver remembers."""

    sigma: float
    x0: Tensor


def root(x: Level) -> Level:
    return x**0.5


def dance_step(
    x: Tensor, v: Tensor, sigma: Level, next_sigma: Level, eta: float
) -> tuple[Tensor, Level]:
    """Returns mean and std of DanceGRPO's step, written with the score as `flux_step` has it."""
    dsigma = next_sigma - sigma
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    return x + dsigma * v - 0.5 * eta**2 * score * dsigma, eta * root(-dsigma)


def flow_step(
    x: Tensor, v: Tensor, sigma: float, next_sigma: float, level: float, sigma_1: float
) -> tuple[Tensor, float]:
    """Returns mean and std of Flow-GRPO's step; sigma_1 stands in for sigma = 1 in the root."""
    dsigma = next_sigma - sigma
    g = level * math.sqrt(sigma / (1 - (sigma_1 if sigma == 1 else sigma)))
    drift = x * (1 + g**2 / (2 * sigma) * dsigma)
    return drift + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dsigma, g * math.sqrt(-dsigma)


def euler_step(x: Tensor, v: Tensor, sigma: float, next_sigma: float) -> Tensor:
    return x + (next_sigma - sigma) * v


def half_log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.copysign(math.inf, 0.5 - sigma)
    return math.log(1 - sigma) - math.log(sigma)


def dpm_step(x: Tensor, here: Seen, before: Seen | None, next_sigma: float) -> Tensor:
    """Returns DPM-Solver++(2M)'s step in the midpoint form; order 1 without `before` and to 0."""
    h = half_log_snr(next_sigma) - half_log_snr(here.sigma)
    slope = torch.zeros_like(x)
    if before is not None and next_sigma > 0:
        r0 = (half_log_snr(here.sigma) - half_log_snr(before.sigma)) / h
        slope = (here.x0 - before.x0) / r0
    alpha = 1 - next_sigma
    return next_sigma / here.sigma * x - alpha * (math.exp(-h) - 1) * (here.x0 + 0.5 * slope)


def log_prob(y: Tensor, mean: Tensor, std: Level) -> Tensor:
    """Returns (n,) log-probabilities, the mean over latent elements as in every release."""
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    dense = -((y.detach() - mean) ** 2) / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi)
    return dense.flatten(1).mean(1)


def ppo_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def clipped_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Returns (n,) PPO losses and ratios."""
    ratio = torch.exp(new - old)
    return ppo_loss(ratio, advantage, clip), ratio.detach()


def ratio_norm(new: Tensor, old: Tensor, mean: Tensor, old_mean: Tensor, std: float) -> Tensor:
    """Returns (n,) ratios of GRPO-Guard: the bias of the log-ratio removed, and its 1 / std."""
    bias = ((mean - old_mean) ** 2).flatten(1).mean(1) / (2 * std**2)
    return torch.exp((new - old + bias) * std)


def group_advantage(
    rewards: np.ndarray,
    group: np.ndarray,
    ddof: int,
    eps: float,
    floor: float = 0.0,
    clip: float = 5.0,
) -> np.ndarray:
    """Returns clipped z-scores within each group; 0 for one member or a std below the floor."""
    out = np.zeros(len(rewards))
    for g in np.unique(group):
        mine = rewards[group == g]
        if len(mine) > 1 and mine.std(ddof=ddof) >= floor:
            out[group == g] = (mine - mine.mean()) / (mine.std(ddof=ddof) + eps)
    return out.clip(-clip, clip)
