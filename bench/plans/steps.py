"""The released trainers' arithmetic of one edge, in their own form; nothing here is the engine's.

Sources: DanceGRPO and BranchGRPO `flux_step`; Flow-GRPO `sde_step_with_logprob`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Level = float | Tensor
"""A noise level: one for all rows, or (n, 1, ..., 1)."""


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


def log_prob(y: Tensor, mean: Tensor, std: Level) -> Tensor:
    """Returns (n,) log-probabilities, the mean over latent elements as in every release."""
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    dense = -((y.detach() - mean) ** 2) / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi)
    return dense.flatten(1).mean(1)


def clipped_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Returns (n,) PPO losses and ratios."""
    ratio = torch.exp(new - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio.detach()


def group_advantage(
    rewards: np.ndarray, group: np.ndarray, ddof: int, eps: float, floor: float = 0.0
) -> np.ndarray:
    """Returns clipped z-scores within each group; 0 for one member or a std below the floor."""
    out = np.zeros(len(rewards))
    for g in np.unique(group):
        mine = rewards[group == g]
        if len(mine) > 1 and mine.std(ddof=ddof) >= floor:
            out[group == g] = (mine - mine.mean()) / (mine.std(ddof=ddof) + eps)
    return out.clip(-5, 5)
