"""RMS normalisation and rotary embedding of queries and keys.

    y = x / sqrt(mean x^2 + eps) * w,   out = y cos + turn(y) sin

The mean is over the D channels of a head if w is (D,), over all H D channels of a token if w is
(H D,). turn maps a pair (a, b) to (-b, a); its transpose is its negative. A pair is (2i, 2i + 1)
("interleaved") or (i, i + D/2) ("halves"). Letters: B samples, S tokens, H heads, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from branchcore.reference.edges import wide


class QKNormRope(NamedTuple):
    """Normalised, rotated queries and keys."""

    q_BSHD: Tensor
    """(B, S, H, D), dtype of the queries given."""
    k_BSHD: Tensor
    """(B, S, H, D), dtype of the keys given."""


def qk_norm_rope(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_SD: Tensor | None = None,
    sin_SD: Tensor | None = None,
    eps: float = 1e-6,
    pairs: str = "interleaved",
) -> QKNormRope:
    """See `branchcore.ops.qk_norm_rope`."""

    def one(x_BSHD: Tensor, weight: Tensor) -> Tensor:
        rstd, weight_HD = scales(x_BSHD, weight, eps)
        y_BSHD = x_BSHD.to(rstd.dtype) * rstd * weight_HD
        if cos_SD is not None and sin_SD is not None:
            y_BSHD = y_BSHD * cos_SD[:, None] + turn(y_BSHD, pairs) * sin_SD[:, None]
        return y_BSHD.to(x_BSHD.dtype)

    return QKNormRope(one(q_BSHD, q_weight), one(k_BSHD, k_weight))


def scales(x_BSHD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give 1 / sqrt(mean x^2 + eps), broadcastable to x, and the weight as (1 or H, D)."""
    dtype, num_channels = wide(x_BSHD.dtype), x_BSHD.shape[3]
    axes = 3 if weight.numel() == num_channels else (2, 3)
    mean = x_BSHD.to(dtype).square().mean(axes, keepdim=True)
    return (mean + eps).rsqrt(), weight.to(dtype).view(-1, num_channels)


def turn(y_BSHD: Tensor, pairs: str) -> Tensor:
    """Turn every pair of channels by a quarter: (a, b) -> (-b, a)."""
    if pairs == "halves":
        a, b = y_BSHD.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)
    a, b = y_BSHD[..., 0::2], y_BSHD[..., 1::2]
    return torch.stack((-b, a), dim=-1).flatten(-2)


def qk_norm_rope_backward(
    grad_BSHD: Tensor,
    x_BSHD: Tensor,
    weight: Tensor,
    cos_SD: Tensor | None,
    sin_SD: Tensor | None,
    eps: float,
    pairs: str,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of x, q or k, and of its weight, or nothing of (0,)."""
    rstd, weight_HD = scales(x_BSHD, weight, eps)
    dy_BSHD = grad_BSHD.to(rstd.dtype)
    if cos_SD is not None and sin_SD is not None:
        dy_BSHD = dy_BSHD * cos_SD[:, None] - turn(dy_BSHD * sin_SD[:, None], pairs)
    hat_BSHD, dhat_BSHD = x_BSHD.to(rstd.dtype) * rstd, dy_BSHD * weight_HD
    axes = 3 if len(weight_HD) == 1 else (2, 3)
    mean = (hat_BSHD * dhat_BSHD).mean(axes, keepdim=True)
    dx_BSHD = (rstd * (dhat_BSHD - hat_BSHD * mean)).to(x_BSHD.dtype)
    if not with_weight:
        return dx_BSHD, weight.new_empty(0)
    dweight = (dy_BSHD * hat_BSHD).flatten(2).sum((0, 1)).view(-1, *weight.shape).sum(0)
    return dx_BSHD, dweight.to(weight.dtype)
