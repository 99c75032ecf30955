"""Derivative of group normalisation and SiLU. Letters: B images, P positions, C channels, G groups.

Four launches, tiles as in the forward; z is recomputed from x and the saved statistics.

    partials   (B tiles)   dy, x -> sum dz and sum dz xhat of every channel
    combine    (B G)       tiles -> the same per image; weighted means over each group
    parameters (C / 64)    images -> dbias, dweight
    apply      (B tiles)   dy, x -> dx = rstd (w dz - <w dz> - xhat <w dz xhat>)

Bytes per element of size e: 5 e, and 16 / (positions of a tile) for the partials.
"""

import torch
import triton
import triton.language as tl
from branchcore.kernels.build import Build
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

CHANNELS = 64
PARAMETERS = {"BLOCK_B": 32, "BLOCK_C": CHANNELS}


@triton.jit
def _before_activation(grad, centred, scale_C, bias_C, SILU: tl.constexpr):
    """Turn dy into dz, the derivative by z = scale centred + bias."""
    if SILU:
        z = centred * scale_C[None, :] + bias_C[None, :]
        gate = sigmoid(z)
        grad = grad * (gate * (1.0 + z * (1.0 - gate)))
    return grad


@triton.jit
def _group_norm_silu_bwd_partials_kernel(
    grad,
    x,
    weight,
    bias,
    statistics,
    partials,
    num_positions,
    tile_positions,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
):
    program = tl.program_id(0)
    image, start, count = place(program, num_positions, tile_positions)
    slot, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    offsets = slot[:, None] * C + c[None, :]
    grad += start * C
    x += start * C
    mean_C = per_channel(statistics, image, c, 0, C, G)
    rstd_C = per_channel(statistics, image, c, 1, C, G)
    scale_C, bias_C = parameter(weight, c, C) * rstd_C, parameter(bias, c, C)
    dbias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_P):
        # beyond the end the gradient reads as 0, and so does all that is summed
        valid = (slot < count - first)[:, None] & (c < C)[None, :]
        centred = read(x + offsets, valid, EVEN) - mean_C[None, :]
        dz = _before_activation(read(grad + offsets, valid, EVEN), centred, scale_C, bias_C, SILU)
        dbias += dz
        dweight += dz * centred
        grad += BLOCK_P * C
        x += BLOCK_P * C
    partials += program.to(tl.int64) * 2 * C
    tl.store(partials + c, tl.sum(dbias, axis=0), mask=c < C)
    tl.store(partials + C + c, tl.sum(dweight, axis=0) * rstd_C, mask=c < C)


@triton.jit
def _group_norm_silu_bwd_combine_kernel(
    partials,
    weight,
    sums,
    means,
    num_positions,
    tile_positions,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_positions, tile_positions)
    size: tl.constexpr = C // G
    image = (program // G).to(tl.int64)
    t, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    channel = (program % G) * size + c
    partials += image * num_tiles * (2 * C)
    offsets = t[:, None] * (2 * C) + channel[None, :]
    dbias = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        valid = (t < num_tiles - first)[:, None] & (c < size)[None, :]
        dbias += tl.load(partials + first * (2 * C) + offsets, mask=valid, other=0.0)
        dweight += tl.load(partials + first * (2 * C) + C + offsets, mask=valid, other=0.0)
    dbias_c, dweight_c = tl.sum(dbias, axis=0), tl.sum(dweight, axis=0)
    sums += image * (2 * C) + channel
    tl.store(sums, dbias_c, mask=c < size)
    tl.store(sums + C, dweight_c, mask=c < size)
    weight_c = tl.load(weight + channel, mask=c < size, other=0.0).to(tl.float32)
    inverse = 1.0 / (num_positions * 1.0 * size)
    tl.store(means + 2 * program, tl.sum(weight_c * dbias_c, axis=0) * inverse)
    tl.store(means + 2 * program + 1, tl.sum(weight_c * dweight_c, axis=0) * inverse)


@triton.jit
def _group_norm_silu_bwd_parameters_kernel(
    sums,
    dbias,
    dweight,
    num_images,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, c = tl.arange(0, BLOCK_B), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = b[:, None] * (2 * C) + c[None, :]
    sum_dbias = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    sum_dweight = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, num_images, BLOCK_B):
        valid = (b < num_images - first)[:, None] & (c < C)[None, :]
        sum_dbias += tl.load(sums + offsets, mask=valid, other=0.0)
        sum_dweight += tl.load(sums + C + offsets, mask=valid, other=0.0)
        sums += BLOCK_B * 2 * C
    dbias_C = cast(tl.sum(sum_dbias, axis=0), dbias.dtype.element_ty)
    dweight_C = cast(tl.sum(sum_dweight, axis=0), dweight.dtype.element_ty)
    tl.store(dbias + c, dbias_C, mask=c < C)
    tl.store(dweight + c, dweight_C, mask=c < C)


@triton.jit
def _group_norm_silu_bwd_kernel(
    grad,
    x,
    weight,
    bias,
    statistics,
    means,
    dx,
    num_positions,
    tile_positions,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
):
    # last tile first, as in the forward
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, start, count = place(program, num_positions, tile_positions)
    slot, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    offsets = slot[:, None] * C + c[None, :]
    grad += start * C
    x += start * C
    dx += start * C
    mean_C = per_channel(statistics, image, c, 0, C, G)
    rstd_C = per_channel(statistics, image, c, 1, C, G)
    scale_C, bias_C = parameter(weight, c, C) * rstd_C, parameter(bias, c, C)
    shift_C = per_channel(means, image, c, 0, C, G) * rstd_C
    slope_C = per_channel(means, image, c, 1, C, G) * rstd_C * rstd_C
    for first in range(0, count, BLOCK_P):
        valid = (slot < count - first)[:, None] & (c < C)[None, :]
        centred = read(x + offsets, valid, EVEN) - mean_C[None, :]
        dz = _before_activation(read(grad + offsets, valid, EVEN), centred, scale_C, bias_C, SILU)
        out = dz * scale_C[None, :] - (centred * slope_C[None, :] + shift_C[None, :])
        if EVEN:
            tl.store(dx + offsets, cast(out, dx.dtype.element_ty))
        else:
            tl.store(dx + offsets, cast(out, dx.dtype.element_ty), mask=valid)
        grad += BLOCK_P * C
        x += BLOCK_P * C
        dx += BLOCK_P * C


def group_norm_silu_bwd(
    grad_BPC: Tensor,
    x_BPC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_BG2: Tensor,
    silu: bool,
    dx_BPC: Tensor,
    dweight_C: Tensor,
    dbias_C: Tensor,
) -> None:
    """Write the three gradients; all tensors are contiguous."""
    num_images, num_positions, num_channels = x_BPC.shape
    num_groups = statistics_BG2.shape[1]
    if x_BPC.numel() == 0:
        for sum_C in (dweight_C, dbias_C):
            sum_C.zero_()
        return
    tiles = Tiles.of(num_positions, num_channels)
    sizes, programs = (num_positions, tiles.tile_positions), num_images * tiles.num_tiles
    options = {"num_warps": NUM_WARPS}
    partials = x_BPC.new_empty((programs, 2, num_channels), dtype=torch.float32)
    sums_B2C = partials.new_empty(num_images, 2, num_channels)
    means_BG2 = partials.new_empty(num_images, num_groups, 2)
    inputs = grad_BPC, x_BPC, weight_C, bias_C, statistics_BG2
    activation = {"G": num_groups, "SILU": silu, **tiles.constants, **options}
    combine = combine_constants(num_channels, num_groups) | options
    first, second = _group_norm_silu_bwd_partials_kernel, _group_norm_silu_bwd_combine_kernel
    launch_grid(first, programs, *inputs, partials, *sizes, **activation)
    sums = (partials, weight_C, sums_B2C, means_BG2, *sizes)
    launch_grid(second, num_images * num_groups, *sums, **combine)
    third, blocks = _group_norm_silu_bwd_parameters_kernel, triton.cdiv(num_channels, CHANNELS)
    parameters = (sums_B2C, dbias_C, dweight_C, num_images)
    launch_grid(third, blocks, *parameters, C=num_channels, **PARAMETERS, **options)
    last = _group_norm_silu_bwd_kernel
    launch_grid(last, programs, *inputs, means_BG2, dx_BPC, *sizes, **activation)


def _builds(shape: Shape) -> tuple[Build, ...]:
    state, fp32 = f"*{shape.dtype}", "*fp32"
    inputs = {"grad": state, "x": state, "weight": state, "bias": state, "statistics": fp32}
    combined = {"partials": fp32, "weight": state, "sums": fp32, "means": fp32}
    sums = {"sums": fp32, "dbias": state, "dweight": state, "num_images": "i32"}
    constants = PARAMETERS | {"C": shape.num_channels}
    parameters = Build(
        _group_norm_silu_bwd_parameters_kernel, sums, constants, (), NUM_WARPS, streams=False
    )
    return (
        shape.over_tiles(
            _group_norm_silu_bwd_partials_kernel, inputs | {"partials": fp32}, **shape.activation()
        ),
        shape.over_groups(_group_norm_silu_bwd_combine_kernel, combined),
        parameters,
        shape.over_tiles(
            _group_norm_silu_bwd_kernel, inputs | {"means": fp32, "dx": state}, **shape.activation()
        ),
    )


BACKWARD_BUILDS: tuple[Build, ...] = tuple(build for shape in SHAPES for build in _builds(shape))
