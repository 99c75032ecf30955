"""The clipped ratio loss on (E,) vectors, its gradient and its statistics.

    l = lin p_e - quad q_n,   r = exp(l)
    loss = sum_e w_e (-A+ min(r, clip r) + A- max(r, clip r)),   clip r to [1 - low, 1 + high]

A+, A- >= 0, and min(r, clip r) = min(r, 1 + high), max(r, clip r) = max(r, 1 - low).
Letters: N nodes, E trained edges.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from branchcore.reference.edges import parents, sum_children


class RatioStats(NamedTuple):
    """Numerators and denominators over the edges of non-zero weight; 0-d tensors, never synced."""

    edges: Tensor
    """Number of edges with non-zero weight: the denominator of the others."""
    clipped_low: Tensor
    """Number of edges with A- > 0 whose gradient the lower bound cuts."""
    clipped_high: Tensor
    """Number of edges with A+ > 0 whose gradient the upper bound cuts."""
    sum_abs_dev: Tensor
    """Sum of |r - 1|."""
    max_abs_dev: Tensor
    """Maximum of |r - 1|, 0 without edges."""
    sum_log_ratio_sq: Tensor
    """Sum of l^2."""
    sum_log_ratio: Tensor
    """Sum of l."""
    clipped_noise: Tensor
    """Number of cut edges whose l is beyond the bound's by less than the noise floor."""


class RatioLoss(NamedTuple):
    """The loss and what it met on the way."""

    loss: Tensor
    """() fp32 (fp64 if p is)."""
    stats: RatioStats
    """0-d tensors of the same dtype, without gradient."""


def log_ratio(p_E: Tensor, q_N: Tensor, child_start: Tensor, exponent_E2: Tensor) -> Tensor:
    """Evaluate lin p - quad q in float64, (E,)."""
    lin_E, quad_E = exponent_E2.unbind(1)
    return lin_E * p_E.double() - quad_E * q_N.double()[parents(child_start, len(p_E))]


def ratio_loss(
    p_E: Tensor,
    q_N: Tensor,
    child_start: Tensor,
    exponent_E2: Tensor,
    advantage_E2: Tensor,
    weight_E: Tensor,
    clip: tuple[float, float],
    floor: float = 0.0,
) -> RatioLoss:
    """See `branchcore.ops.ratio_loss`."""
    low, high = 1.0 - clip[0], 1.0 + clip[1]
    plus_E, minus_E = advantage_E2.double().unbind(1)
    l_E = torch.where(weight_E == 0, 0.0, log_ratio(p_E, q_N, child_start, exponent_E2))
    r_E = l_E.exp()
    gain_E = torch.where(plus_E > 0, plus_E * r_E.clamp(max=high), 0.0)
    pain_E = torch.where(minus_E > 0, minus_E * r_E.clamp(min=low), 0.0)
    loss = (weight_E.double() * (pain_E - gain_E)).sum()
    with torch.no_grad():
        live_E, dev_E = weight_E != 0, (r_E - 1.0).abs()
        low_E = live_E & (minus_E > 0) & (r_E < low)
        high_E = live_E & (plus_E > 0) & (r_E > high)
        near_low_E = low_E & (r_E >= low * math.exp(-floor))
        near_high_E = high_E & (r_E <= high * math.exp(floor))
        stats = (
            live_E.sum(),
            low_E.sum(),
            high_E.sum(),
            dev_E.sum(),
            torch.cat((dev_E, dev_E.new_zeros(1))).max(),
            l_E.square().sum(),
            l_E.sum(),
            near_low_E.sum() + near_high_E.sum(),
        )
    return RatioLoss(loss.to(p_E.dtype), RatioStats(*(value.to(p_E.dtype) for value in stats)))


def ratio_loss_backward(
    p_E: Tensor,
    q_N: Tensor,
    child_start: Tensor,
    exponent_E2: Tensor,
    advantage_E2: Tensor,
    weight_E: Tensor,
    clip: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Differentiate the loss: dL/dl = w r (A- [r >= 1 - low] - A+ [r <= 1 + high])."""
    low, high = 1.0 - clip[0], 1.0 + clip[1]
    plus_E, minus_E = advantage_E2.double().unbind(1)
    l_E = torch.where(weight_E == 0, 0.0, log_ratio(p_E, q_N, child_start, exponent_E2))
    r_E = l_E.exp()
    slope_E = torch.where((minus_E > 0) & (r_E >= low), minus_E * r_E, 0.0)
    slope_E = slope_E - torch.where((plus_E > 0) & (r_E <= high), plus_E * r_E, 0.0)
    grad_l_E1 = (weight_E.double() * slope_E)[:, None]
    grad_p_E, grad_q_E = (grad_l_E1 * exponent_E2).unbind(1)
    return grad_p_E.to(p_E.dtype), -sum_children(grad_q_E, child_start).to(q_N.dtype)
