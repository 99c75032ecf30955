"""Derivative of qk_norm_rope, q and k apart. Letters: B samples, S tokens, H heads, D channels.

    dx = (dy w - hat mean(dy w hat)) rstd,   dw = sum dy hat,   hat = x rstd,   dy = rotated back

Two launches: tokens, then the weight's partial sums, one per program of the first.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.pairs import (
    SITES,
    Site,
    load_pairs,
    mean_of_pairs,
    store_pairs,
    stream_pairs,
    strides,
    tile,
    weight_pairs,
)
from branchcore.kernels.rounding import cast
from torch import Tensor

ROWS, BLOCK = 1024, 8  # partial sums and channels of a program of the second launch


@triton.jit
def _qk_norm_rope_bwd_kernel(
    grad,
    x,
    weight,
    cos,
    sin,
    dx,
    partials,
    num_positions,
    grad_stride_b,
    grad_stride_s,
    grad_stride_h,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    eps,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    ACROSS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Grid: (B ceil(S / TOKENS),); a program owns TOKENS tokens, one after the other.

    Moves 6 bytes per channel in bf16, and 4 / TOKENS more (over H for a norm per head) if the
    weight has a gradient, whose sums it keeps in registers.
    """
    COUNT: tl.constexpr = NUM_HEADS * D if ACROSS else D
    tiles = tl.cdiv(num_positions, TOKENS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * TOKENS
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)
    x_row = x + sample * x_stride_b + head * (D if x_stride_h is None else x_stride_h)
    grad_row = grad + sample * grad_stride_b
    grad_row += head * (D if grad_stride_h is None else grad_stride_h)
    dx_row = dx + sample * num_positions * (NUM_HEADS * D) + head * D
    w_a, w_b = weight_pairs(weight, head, NUM_HEADS, D, BLOCK_D, ACROSS, HALVES)
    if partials is not None:
        dw_a = tl.zeros((HEADS, BLOCK_D // 2), tl.float32)
        dw_b = tl.zeros((HEADS, BLOCK_D // 2), tl.float32)
    for step in range(0, TOKENS):
        position = first + step + tl.zeros((1, 1), tl.int64)
        inside = position < num_positions
        keep = inside & (head < NUM_HEADS)
        x_a, x_b = stream_pairs(x_row + position * x_stride_s, keep, D, BLOCK_D, HALVES)
        g_a, g_b = stream_pairs(grad_row + position * grad_stride_s, keep, D, BLOCK_D, HALVES)
        if cos is not None:
            cos_a, cos_b = load_pairs(cos + position * D, inside, D, BLOCK_D, HALVES)
            sin_a, sin_b = load_pairs(sin + position * D, inside, D, BLOCK_D, HALVES)
            g_a, g_b = g_a * cos_a + g_b * sin_b, g_b * cos_b - g_a * sin_a
        rstd = tl.rsqrt(mean_of_pairs(x_a * x_a, x_b * x_b, COUNT, ACROSS) + eps)
        x_a, x_b = x_a * rstd, x_b * rstd
        if partials is not None:
            dw_a += g_a * x_a
            dw_b += g_b * x_b
        g_a, g_b = g_a * w_a, g_b * w_b
        mean = mean_of_pairs(g_a * x_a, g_b * x_b, COUNT, ACROSS)
        g_a, g_b = (g_a - x_a * mean) * rstd, (g_b - x_b * mean) * rstd
        store_pairs(dx_row + position * (NUM_HEADS * D), g_a, g_b, keep, D, BLOCK_D, HALVES)
    if partials is not None:
        own = head
        if not ACROSS:
            dw_a = tl.sum(dw_a, axis=0, keep_dims=True)
            dw_b = tl.sum(dw_b, axis=0, keep_dims=True)
            own = tl.zeros((1, 1), tl.int64)
        row = partials + tl.program_id(0).to(tl.int64) * COUNT + own * D
        store_pairs(row, dw_a, dw_b, own < NUM_HEADS, D, BLOCK_D, HALVES)


@triton.jit
def _qk_norm_rope_bwd_weight_kernel(
    partials, dweight, num_rows, num_channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (ceil(channels / BLOCK),); a program adds up all partial sums of BLOCK channels.

    32 bytes of a row: narrower would waste what DRAM gives, wider would leave fewer programs.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        keep = (row < num_rows) & (channel < num_channels)
        total += tl.load(partials + row * num_channels + channel, mask=keep, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    total = cast(total, dweight.dtype.element_ty)
    tl.store(dweight + channel, total, mask=channel < num_channels)


def qk_norm_rope_bwd(
    grad_BSHD: Tensor,
    x_BSHD: Tensor,
    weight: Tensor,
    cos_SD: Tensor | None,
    sin_SD: Tensor | None,
    eps: float,
    pairs: str,
    dx_BSHD: Tensor,
    dweight: Tensor | None,
) -> None:
    """Write the gradients of q or of k and, if wanted, of its weight."""
    num_samples, num_positions, num_heads, num_channels = x_BSHD.shape
    tokens = 1 if dweight is None else _tokens(num_positions)
    grid = num_samples * triton.cdiv(num_positions, tokens)
    sums = None if dweight is None else (grid, weight.numel())
    partials = None if sums is None else x_BSHD.new_empty(sums, dtype=torch.float32)
    launch_grid(
        _qk_norm_rope_bwd_kernel,
        grid,
        *(grad_BSHD, x_BSHD, weight, cos_SD, sin_SD, dx_BSHD, partials, num_positions),
        *strides(grad_BSHD),
        *strides(x_BSHD),
        eps,
        NUM_HEADS=num_heads,
        D=num_channels,
        TOKENS=tokens,
        ACROSS=weight.numel() > num_channels,
        HALVES=pairs == "halves" and cos_SD is not None,
        **tile(num_heads, num_channels)._asdict(),
    )
    if sums is not None:
        launch_grid(
            _qk_norm_rope_bwd_weight_kernel,
            triton.cdiv(weight.numel(), BLOCK),
            *(partials, dweight, *sums),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=8,
        )


def _tokens(num_positions: int) -> int:
    """Give the tokens of a program: few partial sums, yet 256 programs for a sample if it can."""
    return min(max(num_positions // 256, 4), 32)


def _builds(site: Site) -> Iterator[Build]:
    yield site.build(_qk_norm_rope_bwd_kernel, TOKENS=_tokens(4096))
    yield site.build(_qk_norm_rope_bwd_kernel, ("partials",), TOKENS=1)
    second = site.build(_qk_norm_rope_bwd_weight_kernel, ROWS=ROWS, BLOCK=BLOCK)
    yield second._replace(num_warps=8, streams=False)


BUILDS = tuple(build for site in SITES for build in _builds(site))
