"""Mean Gaussian log-probability of stored children. Letters: N parents, M children, D elements."""

from torch import Tensor

from branchcore.reference.branch_step import HALF_LOG_2PI
from branchcore.reference.edges import parents, sum_children, wide


def residual(
    x_ND: Tensor,
    v_ND: Tensor,
    y_MD: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    h_ND: Tensor | None,
) -> Tensor:
    """Recover eps = (y - a x - b v - c h) / s, (M, D)."""
    dtype, parent_M = wide(y_MD.dtype), parents(child_start, len(y_MD))
    a, b, c, s = rows_M4.to(dtype).unbind(1)
    mean_MD = a[:, None] * x_ND.to(dtype)[parent_M] + b[:, None] * v_ND.to(dtype)[parent_M]
    if h_ND is not None:
        mean_MD = mean_MD + c[:, None] * h_ND.to(dtype)[parent_M]
    return (y_MD.to(dtype) - mean_MD) / s[:, None]


def sde_log_prob(
    x_ND: Tensor,
    v_ND: Tensor,
    y_MD: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    h_ND: Tensor | None = None,
) -> Tensor:
    """See `branchcore.ops.sde_log_prob`."""
    eps_MD = residual(x_ND, v_ND, y_MD, rows_M4, child_start, h_ND)
    log_s_M = rows_M4[:, 3].log().to(eps_MD.dtype)
    return -0.5 * eps_MD.square().mean(1) - log_s_M - HALF_LOG_2PI


def sde_log_prob_backward(
    grad_M: Tensor,
    x_ND: Tensor,
    v_ND: Tensor,
    y_MD: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    h_ND: Tensor | None,
) -> Tensor:
    """Gather dL/dv = sum_m g_m (b/s)_m eps_m / D over the children, in v's dtype."""
    eps_MD = residual(x_ND, v_ND, y_MD, rows_M4, child_start, h_ND)
    scale_M = grad_M * (rows_M4[:, 1] / rows_M4[:, 3]).to(grad_M.dtype) / v_ND.shape[1]
    return sum_children(scale_M[:, None] * eps_MD, child_start).to(v_ND.dtype)
