"""What the released trainers compute in eager torch: the baseline of every op's time.

Children are expanded per edge, noise is torch.randn, the loss subtracts two log-probabilities of
stored children. Letters: N parents, K children of each, M = N K, D latent elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

A, B, S = 1.02, -0.11, 0.37
CLIP = (1e-4, 1e-4)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def log_prob(y_MD: Tensor, mean_MD: Tensor) -> Tensor:
    """Average the Gaussian log-density over elements, (M,)."""
    log_prob_MD = -((y_MD - mean_MD) ** 2) / (2 * S**2) - math.log(S) - HALF_LOG_2PI
    return log_prob_MD.mean(1)


def means(x_ND: Tensor, v_ND: Tensor, num_children: int) -> Tensor:
    """Expand parents to their children's means, (M, D)."""
    x_MD, v_MD = (t.float().repeat_interleave(num_children, 0) for t in (x_ND, v_ND))
    return A * x_MD + B * v_MD


def step(x_ND: Tensor, v_ND: Tensor, num_children: int) -> tuple[Tensor, Tensor]:
    """Grow children: expand, draw, step, and the log-probability."""
    mean_MD = means(x_ND, v_ND, num_children)
    y_MD = mean_MD + S * torch.randn_like(mean_MD)
    return y_MD, log_prob(y_MD, mean_MD)


def ratio_loss(
    log_prob_M: Tensor, log_prob_old_M: Tensor, advantage_M2: Tensor, weight_M: Tensor
) -> Tensor:
    """Clip the ratio of two log-probabilities, one advantage per sign, and sum."""
    ratio = torch.exp(log_prob_M - log_prob_old_M)
    clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
    plus, minus = advantage_M2.unbind(1)
    loss_M = minus * torch.maximum(ratio, clipped) - plus * torch.minimum(ratio, clipped)
    return (weight_M * loss_M).sum()
