"""The two dot products that carry every objective, in velocity space.

With Delta = v - v_old and means over the D latent elements:

    p_e = mean(Delta * eps_e) for each trained edge e,    q_n = mean(Delta^2) for each node n.

Letters: N nodes, E trained edges, D latent elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from branchcore.noise import Noise
from branchcore.reference.edges import parents, sum_children, wide
from branchcore.reference.philox_normal import philox_normal, silence


class EdgeDots(NamedTuple):
    """What a velocity change means to the edges that left the node."""

    p_E: Tensor
    """(E,) fp32 (fp64 if v is), mean(Delta * eps) per edge."""
    q_N: Tensor
    """(N,) same dtype, mean(Delta^2) per node."""


def edge_dots(
    v_ND: Tensor,
    v_old_ND: Tensor | None,
    child_start: Tensor | None = None,
    noise: Noise | None = None,
) -> EdgeDots:
    """See `branchcore.ops.edge_dots`."""
    dtype = wide(v_ND.dtype)
    old_ND = v_ND.detach() if v_old_ND is None else v_old_ND
    delta_ND = v_ND.to(dtype) - old_ND.to(dtype)
    q_N = delta_ND.square().mean(1)
    if child_start is None or noise is None:
        return EdgeDots(q_N.new_zeros(0), q_N)
    eps_ED = philox_normal(noise, v_ND.shape[1], dtype)
    return EdgeDots((delta_ND[parents(child_start, len(eps_ED))] * eps_ED).mean(1), q_N)


def edge_dots_backward(
    grad_p_E: Tensor,
    grad_q_N: Tensor,
    difference: tuple[Tensor, Tensor] | None,
    child_start: Tensor | None,
    noise: Noise | None,
    num_elements: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gather dL/dv = (sum_e gp_e eps_e + 2 gq_n Delta_n) / D; `difference` is (v, v_old)."""
    dv_ND = grad_q_N.new_zeros(len(grad_q_N), num_elements)
    if difference is not None:
        v_ND, v_old_ND = (value.to(grad_q_N.dtype) for value in difference)
        dv_ND = dv_ND + 2.0 * grad_q_N[:, None] * (v_ND - v_old_ND)
    if child_start is not None and noise is not None:
        eps_ED = philox_normal(silence(noise, grad_p_E == 0), num_elements, grad_p_E.dtype)
        dv_ND = dv_ND + sum_children(grad_p_E[:, None] * eps_ED, child_start)
    return (dv_ND / num_elements).to(dtype)
