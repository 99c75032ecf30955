"""RMSNorm and rotary embedding of queries and keys. Specification: reference/qk_norm_rope.py.

Letters: B samples, S tokens, H heads, D channels of a head.
"""

import triton
import triton.language as tl
from branchcore.kernels import qk_norm_rope_bwd as backward
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.pairs import (
    SITES,
    load_pairs,
    mean_of_pairs,
    store_pairs,
    stream_pairs,
    strides,
    tile,
    weight_pairs,
)
from branchcore.kernels.qk_norm_rope_bwd import qk_norm_rope_bwd
from torch import Tensor

__all__ = ["BUILDS", "qk_norm_rope_bwd", "qk_norm_rope_fwd"]


@triton.jit
def _qk_norm_rope_fwd_kernel(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    num_positions,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACROSS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Grid: (B S,); a program owns a token's queries and keys, which share its cos and sin.

    Moves 4 bytes per channel in bf16. All heads at once: their loads are in flight together, and
    a norm across them needs no second look.
    """
    Q_COUNT: tl.constexpr = Q_HEADS * D if ACROSS else D
    K_COUNT: tl.constexpr = K_HEADS * D if ACROSS else D
    token = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // num_positions).to(tl.int64)
    position = (tl.program_id(0) % num_positions).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)
    q_row = q + sample * q_stride_b + position * q_stride_s
    k_row = k + sample * k_stride_b + position * k_stride_s
    q_row += head * (D if q_stride_h is None else q_stride_h)
    k_row += head * (D if k_stride_h is None else k_stride_h)
    # all at once: no load moves in front of a sum over threads
    q_a, q_b = stream_pairs(q_row, head < Q_HEADS, D, BLOCK_D, HALVES)
    k_a, k_b = stream_pairs(k_row, head < K_HEADS, D, BLOCK_D, HALVES)
    if cos is not None:
        inside = position < num_positions
        cos_a, cos_b = load_pairs(cos + position * D, inside, D, BLOCK_D, HALVES)
        sin_a, sin_b = load_pairs(sin + position * D, inside, D, BLOCK_D, HALVES)
    q_rstd = tl.rsqrt(mean_of_pairs(q_a * q_a, q_b * q_b, Q_COUNT, ACROSS) + eps)
    k_rstd = tl.rsqrt(mean_of_pairs(k_a * k_a, k_b * k_b, K_COUNT, ACROSS) + eps)
    # weights are near, in the first-level cache, and many in a norm across heads
    w_a, w_b = weight_pairs(q_weight, head, Q_HEADS, D, BLOCK_D, ACROSS, HALVES)
    q_a, q_b = q_a * q_rstd * w_a, q_b * q_rstd * w_b
    w_a, w_b = weight_pairs(k_weight, head, K_HEADS, D, BLOCK_D, ACROSS, HALVES)
    k_a, k_b = k_a * k_rstd * w_a, k_b * k_rstd * w_b
    if cos is not None:
        q_a, q_b = q_a * cos_a - q_b * sin_a, q_b * cos_b + q_a * sin_b
        k_a, k_b = k_a * cos_a - k_b * sin_a, k_b * cos_b + k_a * sin_b
    q_row = q_out + token * (Q_HEADS * D) + head * D
    k_row = k_out + token * (K_HEADS * D) + head * D
    store_pairs(q_row, q_a, q_b, head < Q_HEADS, D, BLOCK_D, HALVES)
    store_pairs(k_row, k_a, k_b, head < K_HEADS, D, BLOCK_D, HALVES)


def qk_norm_rope_fwd(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_SD: Tensor | None,
    sin_SD: Tensor | None,
    eps: float,
    pairs: str,
    q_out_BSHD: Tensor,
    k_out_BSHD: Tensor,
) -> None:
    """Write normalised and rotated queries and keys in one launch."""
    num_samples, num_positions, q_heads, num_channels = q_BSHD.shape
    k_heads = k_BSHD.shape[2]
    launch_grid(
        _qk_norm_rope_fwd_kernel,
        num_samples * num_positions,
        *(q_BSHD, k_BSHD, q_weight, k_weight, cos_SD, sin_SD, q_out_BSHD, k_out_BSHD),
        num_positions,
        *strides(q_BSHD),
        *strides(k_BSHD),
        eps,
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        D=num_channels,
        ACROSS=max(q_weight.numel(), k_weight.numel()) > num_channels,
        HALVES=pairs == "halves" and cos_SD is not None,
        **tile(max(q_heads, k_heads), num_channels)._asdict(),
    )


BUILDS = (*(site.build(_qk_norm_rope_fwd_kernel) for site in SITES), *backward.BUILDS)
