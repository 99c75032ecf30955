"""Group normalisation and SiLU of channels-last activations, forward.

Letters: B images, P positions, C channels, G groups. Three launches; `group_norm_tiles` cuts the
tiles by P and C alone, so an image's bits do not depend on its batch.

    partials (B tiles)   x -> mean and M2 of every channel: Welford per thread, Chan across threads
    combine  (B G)       tiles and channels of a group -> mean and rstd, by Chan about a pivot
    apply    (B tiles)   x -> y

Partials are per channel because a group may be 3 or 10 channels wide. Bytes per element of size e:
3 e, and 16 / (positions of a tile) for the partials.
"""

import torch
import triton
import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.group_norm_silu_bwd import BACKWARD_BUILDS, group_norm_silu_bwd
from branchcore.kernels.group_norm_tiles import (
    NUM_WARPS,
    SHAPES,
    Shape,
    Tiles,
    combine_constants,
    parameter,
    per_channel,
    place,
    read,
    sigmoid,
)
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.rounding import cast
from torch import Tensor

__all__ = ["BUILDS", "group_norm_silu_bwd", "group_norm_silu_fwd"]


@triton.jit
def _group_norm_silu_fwd_partials_kernel(
    x,
    partials,
    num_positions,
    tile_positions,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    _, start, count = place(program, num_positions, tile_positions)
    slot, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    offsets = slot[:, None] * C + c[None, :]
    x += start * C
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    seen = 0.0
    for first in range(0, count, BLOCK_P):
        valid = (slot < count - first)[:, None] & (c < C)[None, :]
        values = read(x + offsets, valid, EVEN)
        delta = values - mean
        if not EVEN:
            delta = tl.where(valid, delta, 0.0)
        seen += 1.0
        mean += delta * (1.0 / seen)
        m2 += delta * (values - mean)
        x += BLOCK_P * C
    # the slots of a block may have seen different numbers of positions
    weight = ((count - slot + (BLOCK_P - 1)) // BLOCK_P).to(tl.float32)[:, None]
    inverse = 1.0 / count.to(tl.float32)
    mean_C = tl.sum(mean * weight, axis=0) * inverse
    # the sum above has rounded: with a large mean, by more than the means differ
    rest = mean - mean_C[None, :]
    shift_C = tl.sum(weight * rest, axis=0) * inverse
    rest -= shift_C[None, :]
    mean_C += shift_C
    m2_C = tl.sum(m2 + weight * rest * rest, axis=0)
    partials += program.to(tl.int64) * 2 * C
    tl.store(partials + c, mean_C, mask=c < C)
    tl.store(partials + C + c, m2_C, mask=c < C)


@triton.jit
def _group_norm_silu_fwd_combine_kernel(
    partials,
    statistics,
    num_positions,
    tile_positions,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_positions, tile_positions)
    size: tl.constexpr = C // G
    partials += (program // G).to(tl.int64) * num_tiles * (2 * C) + (program % G) * size
    t, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    offsets = t[:, None] * (2 * C) + c[None, :]
    inverse = 1.0 / (num_positions * 1.0 * size)
    # any value near the mean will do: differences from it are small and nearly exact
    pivot = tl.load(partials)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        valid = (t < num_tiles - first)[:, None] & (c < size)[None, :]
        count = tl.minimum(num_positions - (t + first) * tile_positions, tile_positions)
        mean = tl.load(partials + first * (2 * C) + offsets, mask=valid, other=0.0)
        total += tl.where(valid, (mean - pivot) * count.to(tl.float32)[:, None], 0.0)
    rest = tl.sum(tl.sum(total, axis=1), axis=0) * inverse
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        valid = (t < num_tiles - first)[:, None] & (c < size)[None, :]
        count = tl.minimum(num_positions - (t + first) * tile_positions, tile_positions)
        mean = tl.load(partials + first * (2 * C) + offsets, mask=valid, other=0.0)
        m2 = tl.load(partials + first * (2 * C) + C + offsets, mask=valid, other=0.0)
        away = (mean - pivot) - rest
        total += tl.where(valid, m2 + away * away * count.to(tl.float32)[:, None], 0.0)
    variance = tl.sum(tl.sum(total, axis=1), axis=0) * inverse
    tl.store(statistics + 2 * program, pivot + rest)
    tl.store(statistics + 2 * program + 1, tl.rsqrt(variance + eps))


@triton.jit
def _group_norm_silu_fwd_kernel(
    x,
    weight,
    bias,
    statistics,
    y,
    num_positions,
    tile_positions,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
):
    # last tile first: of an activation larger than L2, that is the part which is still there
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, start, count = place(program, num_positions, tile_positions)
    slot, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    offsets = slot[:, None] * C + c[None, :]
    x += start * C
    y += start * C
    mean_C = per_channel(statistics, image, c, 0, C, G)
    scale_C = parameter(weight, c, C) * per_channel(statistics, image, c, 1, C, G)
    bias_C = parameter(bias, c, C)
    for first in range(0, count, BLOCK_P):
        valid = (slot < count - first)[:, None] & (c < C)[None, :]
        # subtract first: x scale - mean scale would lose the digits that a large mean has
        z = (read(x + offsets, valid, EVEN) - mean_C[None, :]) * scale_C[None, :] + bias_C[None, :]
        if SILU:
            z = z * sigmoid(z)
        if EVEN:
            tl.store(y + offsets, cast(z, y.dtype.element_ty))
        else:
            tl.store(y + offsets, cast(z, y.dtype.element_ty), mask=valid)
        x += BLOCK_P * C
        y += BLOCK_P * C


def group_norm_silu_fwd(
    x_BPC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
    silu: bool,
    y_BPC: Tensor,
    statistics_BG2: Tensor,
) -> None:
    """Write y and every group's mean and 1 / sqrt(var + eps); all tensors are contiguous."""
    num_images, num_positions, num_channels = x_BPC.shape
    num_groups = statistics_BG2.shape[1]
    if x_BPC.numel() == 0:
        return
    tiles = Tiles.of(num_positions, num_channels)
    sizes, programs = (num_positions, tiles.tile_positions), num_images * tiles.num_tiles
    options = {"num_warps": NUM_WARPS}
    partials = x_BPC.new_empty((programs, 2, num_channels), dtype=torch.float32)
    combine = combine_constants(num_channels, num_groups)
    activation = {"G": num_groups, "SILU": silu, **tiles.constants}
    first, second = _group_norm_silu_fwd_partials_kernel, _group_norm_silu_fwd_combine_kernel
    launch_grid(first, programs, x_BPC, partials, *sizes, **tiles.constants, **options)
    sums = (partials, statistics_BG2, *sizes, eps)
    launch_grid(second, num_images * num_groups, *sums, **combine, **options)
    inputs = (x_BPC, weight_C, bias_C, statistics_BG2)
    launch_grid(
        _group_norm_silu_fwd_kernel, programs, *inputs, y_BPC, *sizes, **activation, **options
    )


def _builds(shape: Shape) -> tuple[Build, ...]:
    state, fp32 = f"*{shape.dtype}", "*fp32"
    applied = {"x": state, "weight": state, "bias": state, "statistics": fp32, "y": state}
    return (
        shape.over_tiles(_group_norm_silu_fwd_partials_kernel, {"x": state, "partials": fp32}),
        shape.over_groups(
            _group_norm_silu_fwd_combine_kernel,
            {"partials": fp32, "statistics": fp32},
            eps="fp32",
        ),
        shape.over_tiles(_group_norm_silu_fwd_kernel, applied, **shape.activation()),
    )


BUILDS: tuple[Build, ...] = (
    tuple(build for shape in SHAPES for build in _builds(shape)) + BACKWARD_BUILDS
)
