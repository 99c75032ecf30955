"""Grow all children of a wave: y = a x + b v + c h + s eps.

Letters: N parents, M children, D latent elements.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from branchcore.noise import Noise
from branchcore.reference.edges import parents, sum_children, wide
from branchcore.reference.philox_normal import philox_normal, silence

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class BranchStep(NamedTuple):
    """The children of a wave."""

    y_MD: Tensor
    """(M, D) fp32 (fp64 if x is), children grouped by parent."""
    log_prob_M: Tensor
    """(M,) same dtype, nats per latent element; 0 where s = 0. A function of the noise only."""


def branch_step(
    x_ND: Tensor,
    v_ND: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    noise: Noise,
    h_ND: Tensor | None = None,
) -> BranchStep:
    """See `branchcore.ops.branch_step`."""
    dtype, parent_M = wide(x_ND.dtype), parents(child_start, len(rows_M4))
    a, b, c, s = rows_M4.to(dtype).unbind(1)
    still_M = rows_M4[:, 3] == 0
    eps_MD = philox_normal(silence(noise, still_M), x_ND.shape[1], dtype)
    y_MD = a[:, None] * x_ND.to(dtype)[parent_M] + b[:, None] * v_ND.to(dtype)[parent_M]
    if h_ND is not None:
        y_MD = y_MD + c[:, None] * h_ND.to(dtype)[parent_M]
    log_s_M = rows_M4[:, 3].log().to(dtype)
    log_prob_M = -0.5 * eps_MD.square().mean(1) - log_s_M - HALF_LOG_2PI
    return BranchStep(y_MD + s[:, None] * eps_MD, torch.where(still_M, 0.0, log_prob_M))


def branch_step_backward(
    grad_y_MD: Tensor, coefficient_M: Tensor, child_start: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gather the gradient of x, v or h: its coefficient times grad_y, added over the children."""
    weighted_MD = coefficient_M.to(grad_y_MD.dtype)[:, None] * grad_y_MD
    return sum_children(weighted_MD, child_start).to(dtype)
