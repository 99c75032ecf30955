"""The site between two sublayers of a diffusion transformer: add, normalise, modulate.

    r = x + gate y,    out = (norm(r) weight + bias) (1 + scale) + shift

Letters: B samples, S tokens, C channels, R modulation rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from branchcore.reference.edges import wide


class GateNormModulate(NamedTuple):
    """What a block carries on, and what its next sublayer reads."""

    residual_BSC: Tensor
    """(B, S, C) dtype of x, the residual stream r; x itself where there is no branch."""
    out_BSC: Tensor
    """(B, S, C) dtype of x, the modulated norm of r."""


class BackwardInputs(NamedTuple):
    """What the backward takes, in the order of its schema."""

    grad_out_BSC: Tensor
    grad_residual_BSC: Tensor | None
    residual_BSC: Tensor
    y_BSC: Tensor | None
    """For the gradient of the gate only; None if that is not wanted."""
    moments_2BS: Tensor
    scale_RC: Tensor | None
    shift_RC: Tensor | None
    row_B: Tensor
    gate_RC: Tensor | None
    weight_C: Tensor | None
    bias_C: Tensor | None
    y_dtype: torch.dtype
    reduce: bool
    """Whether any gradient that sums over tokens is wanted."""
    centred: bool

    def reduced(self) -> tuple[Tensor | None, ...]:
        """List what has a gradient that sums over tokens: scale, shift, gate, weight, bias."""
        gate_RC = None if self.y_BSC is None else self.gate_RC
        found = self.scale_RC, self.shift_RC, gate_RC, self.weight_C, self.bias_C
        return found if self.reduce else (None,) * len(found)


def gate_norm_modulate(
    x_BSC: Tensor,
    scale_RC: Tensor | None,
    shift_RC: Tensor | None,
    row_B: Tensor,
    *,
    y_BSC: Tensor | None = None,
    gate_RC: Tensor | None = None,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> GateNormModulate:
    """See `branchcore.ops.gate_norm_modulate`."""
    dtype, residual_BSC = wide(x_BSC.dtype), x_BSC
    if y_BSC is not None:
        gated_BSC = y_BSC.to(dtype)
        if gate_RC is not None:
            gated_BSC = gate_RC.to(dtype)[row_B, None] * gated_BSC
        residual_BSC = (x_BSC.to(dtype) + gated_BSC).to(x_BSC.dtype)
    mean_BS, rstd_BS = moments(residual_BSC, norm == "layer", eps)
    out_BSC = (residual_BSC.to(dtype) - mean_BS[..., None]) * rstd_BS[..., None]
    if weight_C is not None:
        out_BSC = out_BSC * weight_C.to(dtype)
    if bias_C is not None:
        out_BSC = out_BSC + bias_C.to(dtype)
    if scale_RC is not None:
        out_BSC = out_BSC * (1.0 + scale_RC.to(dtype)[row_B, None])
    if shift_RC is not None:
        out_BSC = out_BSC + shift_RC.to(dtype)[row_B, None]
    return GateNormModulate(residual_BSC, out_BSC.to(x_BSC.dtype))


def moments(r_BSC: Tensor, centred: bool, eps: float) -> Tensor:
    """Give the mean of each token (0 unless centred) and 1 / sqrt(variance + eps), (2, B, S)."""
    wide_BSC = r_BSC.to(wide(r_BSC.dtype))
    mean_BS = wide_BSC.mean(2) if centred else torch.zeros_like(wide_BSC[..., 0])
    variance_BS = (wide_BSC - mean_BS[..., None]).square().mean(2)
    return torch.stack((mean_BS, (variance_BS + eps).rsqrt()))


def gate_norm_modulate_backward(*inputs: Any) -> tuple[Tensor, ...]:
    """Give the gradients of x, y, scale, shift, gate, weight and bias; see `BackwardInputs`.

    With n = (r - mean) rstd, g = grad_out and p = g (1 + scale) weight:
    dr = grad_residual + rstd (p - mean_C(p) - n mean_C(p n)), without mean_C(p) unless centred;
    dx = dr, dy = gate dr. One that is not wanted is empty, and dy without a gate: it is dx.
    """
    i = BackwardInputs(*inputs)
    dtype = wide(i.residual_BSC.dtype)
    mean_BS1, rstd_BS1 = i.moments_2BS[..., None]
    n_BSC, g_BSC = (i.residual_BSC.to(dtype) - mean_BS1) * rstd_BS1, i.grad_out_BSC.to(dtype)
    p_BSC = g_BSC if i.weight_C is None else g_BSC * i.weight_C.to(dtype)
    if i.scale_RC is not None:
        p_BSC = p_BSC * (1.0 + i.scale_RC.to(dtype)[i.row_B, None])
    dr_BSC = p_BSC - n_BSC * (p_BSC * n_BSC).mean(2, keepdim=True)
    dr_BSC = rstd_BS1 * (dr_BSC - p_BSC.mean(2, keepdim=True) if i.centred else dr_BSC)
    if i.grad_residual_BSC is not None:
        dr_BSC = dr_BSC + i.grad_residual_BSC.to(dtype)
    dy_BSC = dr_BSC.new_empty(0)
    if i.gate_RC is not None:
        dy_BSC = i.gate_RC.to(dtype)[i.row_B, None] * dr_BSC
    y_BC = None if i.y_BSC is None else (dr_BSC * i.y_BSC.to(dtype)).sum(1)
    sums = _add_samples(i, (g_BSC * n_BSC).sum(1), g_BSC.sum(1), y_BC)
    reduced = (
        i.residual_BSC.new_empty(0) if grad is None or like is None else grad.to(like.dtype)
        for grad, like in zip(sums, i.reduced(), strict=True)
    )
    return dr_BSC.to(i.residual_BSC.dtype), dy_BSC.to(i.y_dtype), *reduced


def _add_samples(
    i: BackwardInputs, a_BC: Tensor, g_BC: Tensor, y_BC: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Turn A = sum_S g n, G = sum_S g and Y = sum_S dr y of each sample into gradients.

    Over the samples of a row: dscale = weight A + bias G, dshift = G, dgate = Y; and over all
    samples: dweight = sum (1 + scale) A, dbias = sum (1 + scale) G.
    """

    def rows(values_BC: Tensor | None, table_RC: Tensor | None) -> Tensor | None:
        if values_BC is None or table_RC is None:
            return None
        return values_BC.new_zeros(table_RC.shape).index_add(0, i.row_B, values_BC)

    scaled_BC = a_BC if i.weight_C is None else a_BC * i.weight_C.to(a_BC.dtype)
    if i.bias_C is not None:
        scaled_BC = scaled_BC + g_BC * i.bias_C.to(a_BC.dtype)
    factor_BC = torch.ones_like(a_BC)
    if i.scale_RC is not None:
        factor_BC = 1.0 + i.scale_RC.to(a_BC.dtype)[i.row_B]
    affine = (factor_BC * a_BC).sum(0), (factor_BC * g_BC).sum(0)
    return rows(scaled_BC, i.scale_RC), rows(g_BC, i.shift_RC), rows(y_BC, i.gate_RC), *affine
