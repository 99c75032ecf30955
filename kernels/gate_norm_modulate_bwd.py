"""The gradients of gate_norm_modulate: one pass over everything, then sums for the tables."""

from typing import Any

import triton
import triton.language as tl
from branchcore.kernels import gate_norm_modulate_sums as sums
from branchcore.kernels.build import Build
from branchcore.kernels.gate_norm_modulate_wide import _gate_norm_modulate_bwd_wide_kernel
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.modulation import (
    AFFINE,
    FROZEN,
    NO_BRANCH,
    SITES,
    Site,
    block_of,
    load_once,
    means,
    row_factor,
    strides,
    table_row,
    terms,
)
from branchcore.kernels.rounding import cast
from torch import Tensor, float32

NARROW = 4096  # channels whose sums fit into registers beside two tokens


@triton.jit
def _gate_norm_modulate_bwd_kernel(
    grad_out,
    grad_residual,
    residual,
    y,
    moments,
    scale,
    row,
    gate,
    weight,
    dx,
    dy,
    partials,
    g_sample,
    g_token,
    q_sample,
    q_token,
    r_sample,
    r_token,
    y_sample,
    y_token,
    scale_row,
    gate_row,
    num_tokens,
    num_channels,
    num_all,
    CENTRED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (B ceil(S / TOKENS),); a program walks over TOKENS tokens of a sample.

    Moves 12 bytes per element in bf16 with a branch and its gate's gradient (grad_residual,
    grad_out, r, y in; dx, dy back), and 24 / TOKENS for partial sums. What the reductions over
    channels wait for is loaded a token ahead; the rest arrives while they run. The tables are read
    again for each token, from L1: registers hold the three sums.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(num_tokens, TOKENS)
    sample = program // tiles
    first = (program % tiles) * TOKENS
    count = tl.minimum(num_tokens - first, TOKENS).to(tl.int32)
    channel = tl.arange(0, BLOCK)
    exists = channel < num_channels
    index = tl.load(row + sample)
    sum_gn = tl.zeros([BLOCK], tl.float32)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_y = tl.zeros([BLOCK], tl.float32)

    g_row = grad_out + sample * g_sample + first * g_token
    r_row = residual + sample * r_sample + first * r_token
    if grad_residual is not None:
        q_row = grad_residual + sample * q_sample + first * q_token
    if y is not None:
        y_row = y + sample * y_sample + first * y_token
    place = moments + sample * num_tokens + first
    target = (sample * num_tokens + first) * num_channels
    next_g, next_r = load_once(g_row + channel, exists), load_once(r_row + channel, exists)
    next_mean, next_rstd = tl.load(place), tl.load(place + num_all)

    for step in range(0, count):
        g, r, mean, rstd = next_g, next_r, next_mean, next_rstd
        if grad_residual is not None:
            q = load_once(q_row + channel, exists)
            q_row += q_token
        if y is not None:
            y_c = load_once(y_row + channel, exists)
            y_row += y_token
        g_row += g_token
        r_row += r_token
        place += 1
        more = step + 1 < count
        follows = channel < tl.where(more, num_channels, 0)
        next_g, next_r = load_once(g_row + channel, follows), load_once(r_row + channel, follows)
        next_mean = tl.load(place, mask=more, other=0.0)
        next_rstd = tl.load(place + num_all, mask=more, other=0.0)

        factor_c = row_factor(scale, weight, index, scale_row, channel, exists)
        g, n, p = terms(g, r, mean, rstd, factor_c)
        if partials is not None:
            sum_gn += g * n
            sum_g += g
        slope, level = means(p * n, p, rstd / num_channels, CENTRED)
        dr = p * rstd - level - n * slope
        if grad_residual is not None:
            dr += q.to(tl.float32)
        tl.store(dx + target + channel, cast(dr, dx.dtype.element_ty), mask=exists)
        if gate is not None:
            gate_c = table_row(gate, index, gate_row, channel, exists)
            tl.store(dy + target + channel, cast(dr * gate_c, dy.dtype.element_ty), mask=exists)
        if y is not None:
            sum_y += dr * y_c.to(tl.float32)
        target += num_channels

    if partials is not None:
        at = partials + program * (2 if y is None else 3) * num_channels + channel
        tl.store(at, sum_gn, mask=exists)
        tl.store(at + num_channels, sum_g, mask=exists)
        if y is not None:
            tl.store(at + 2 * num_channels, sum_y, mask=exists)


def gate_norm_modulate_bwd(
    grad_out_BSC: Tensor,
    grad_residual_BSC: Tensor | None,
    residual_BSC: Tensor,
    y_BSC: Tensor | None,
    moments_2BS: Tensor,
    scale_RC: Tensor | None,
    row_B: Tensor,
    gate_RC: Tensor | None,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    centred: bool,
    dx_BSC: Tensor,
    dy_BSC: Tensor | None,
    *tables: Tensor | None,
) -> None:
    """Write dx, dy, and those of the tables' gradients that are wanted.

    `tables` are the gradients of (scale, shift, gate, weight, bias), None for one not wanted; the
    gate's needs y_BSC.
    """
    num_samples, num_tokens, num_channels = residual_BSC.shape
    tokens, partials_PKC = tokens_of(num_tokens), None
    num_tiles = num_samples * triton.cdiv(num_tokens, tokens)
    if any(grad is not None for grad in tables):
        shape = num_tiles, 2 if y_BSC is None else 3, num_channels
        partials_PKC = residual_BSC.new_empty(shape, dtype=float32)
    kernel, launch = _shape(num_channels)
    if residual_BSC.numel() > 0:
        launch_grid(
            kernel,
            num_tiles,
            *(grad_out_BSC, grad_residual_BSC, residual_BSC, y_BSC, moments_2BS),
            *(scale_RC, row_B, gate_RC, weight_C, dx_BSC, dy_BSC, partials_PKC),
            *strides(2, grad_out_BSC, grad_residual_BSC, residual_BSC, y_BSC),
            *strides(1, scale_RC, gate_RC),
            *(num_tokens, num_channels, num_samples * num_tokens),
            CENTRED=centred,
            TOKENS=tokens,
            **launch,
        )
    if partials_PKC is not None:
        sums.gate_norm_modulate_sums(partials_PKC, scale_RC, row_B, weight_C, bias_C, *tables)


def _shape(num_channels: int) -> tuple[Any, dict[str, int]]:
    """Give the kernel, its blocks and its warps: one block of channels, or two of a wide token.

    A thread has 16 elements, up to 24 of a wide token: 16-byte loads by warps of 32 and of 64.
    """
    block = block_of(num_channels)
    if block <= NARROW:
        num_warps = max(1, block // 512)
        return _gate_norm_modulate_bwd_kernel, {"BLOCK": block, "num_warps": num_warps}
    high = triton.next_power_of_2(num_channels - NARROW)
    return _gate_norm_modulate_bwd_wide_kernel, {"LOW": NARROW, "HIGH": high, "num_warps": 8}


def tokens_of(num_tokens: int) -> int:
    """Give the tokens of a tile.

    Few enough for hundreds of programs from 8 samples, enough that the partial sums cost little:
    2 / TOKENS of the traffic.
    """
    if num_tokens <= 512:
        return 16
    if num_tokens <= 4096:
        return 32
    return 64 if num_tokens <= 16384 else 128


def _build(site: Site) -> Build:
    kernel, constants = _shape(site.num_channels)
    num_warps = constants.pop("num_warps")
    return site.build(
        kernel, num_warps, constants | {"CENTRED": site.centred, "TOKENS": tokens_of(1024)}
    )


_BARE = ((*AFFINE, *FROZEN), (*AFFINE, *NO_BRANCH))
BUILDS = (
    *(_build(site) for site in SITES),
    *(_build(Site(width, absent=absent)) for width in (1536, 6144) for absent in _BARE),
    *sums.BUILDS,
)
