"""The second stage of gate_norm_modulate's backward: partial sums become gradients of tables."""

from collections.abc import Iterator

import triton
import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.modulation import SITES, row_factor, strides, table_row
from branchcore.kernels.rounding import cast
from torch import Tensor

TILES, SAMPLES, BLOCK = 16, 8, 128  # of a program: tiles and samples in flight, channels


@triton.jit
def _gate_norm_modulate_bwd_samples_kernel(
    partials, sums, num_tiles, num_columns, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (B, ceil(columns / BLOCK)); a program adds up the tiles of a sample, TILES at once."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < num_columns
    tile = tl.arange(0, TILES)[:, None]
    at = partials + (sample * num_tiles + tile) * num_columns + column[None, :]
    total = tl.zeros([TILES, BLOCK], tl.float32)
    for first in range(0, num_tiles, TILES):
        total += tl.load(at, mask=(first + tile < num_tiles) & exists[None, :], other=0.0)
        at += TILES * num_columns
    tl.store(sums + sample * num_columns + column, tl.sum(total, axis=0), mask=exists)


@triton.jit
def _gate_norm_modulate_bwd_rows_kernel(
    sums,
    row,
    weight,
    bias,
    dscale,
    dshift,
    dgate,
    num_samples,
    num_channels,
    num_columns,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (R, ceil(C / BLOCK)); a program adds up the samples of a modulation row, in order.

    It looks at all samples, SAMPLES in flight, and loads those of its row: adding 0 for the others
    changes no bit.
    """
    index = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < num_channels
    sum_gn = tl.zeros([BLOCK], tl.float32)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_y = tl.zeros([BLOCK], tl.float32)
    at = sums + channel
    for first in range(0, num_samples, SAMPLES):
        for step in tl.static_range(SAMPLES):
            own = tl.load(row + first + step, mask=first + step < num_samples, other=-1)
            mine = channel < tl.where(own == index, num_channels, 0)
            sum_gn += tl.load(at, mask=mine, other=0.0)
            sum_g += tl.load(at + num_channels, mask=mine, other=0.0)
            if dgate is not None:
                sum_y += tl.load(at + 2 * num_channels, mask=mine, other=0.0)
            at += num_columns
    target = index * num_channels + channel
    if dscale is not None:
        if weight is not None:
            sum_gn *= table_row(weight, 0, 0, channel, exists)
        if bias is not None:
            sum_gn += sum_g * table_row(bias, 0, 0, channel, exists)
        tl.store(dscale + target, cast(sum_gn, dscale.dtype.element_ty), mask=exists)
    if dshift is not None:
        tl.store(dshift + target, cast(sum_g, dshift.dtype.element_ty), mask=exists)
    if dgate is not None:
        tl.store(dgate + target, cast(sum_y, dgate.dtype.element_ty), mask=exists)


@triton.jit
def _gate_norm_modulate_bwd_affine_kernel(
    sums,
    scale,
    row,
    dweight,
    dbias,
    scale_row,
    num_samples,
    num_channels,
    num_columns,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (ceil(C / BLOCK),); a program adds up all samples, in order, SAMPLES in flight."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < num_channels
    sum_gn = tl.zeros([BLOCK], tl.float32)
    sum_g = tl.zeros([BLOCK], tl.float32)
    at = sums + channel
    for first in range(0, num_samples, SAMPLES):
        for step in tl.static_range(SAMPLES):
            there = first + step < num_samples
            index = tl.load(row + first + step, mask=there, other=0)
            inside = channel < tl.where(there, num_channels, 0)
            factor_c = row_factor(scale, None, index, scale_row, channel, inside)
            sum_gn += factor_c * tl.load(at, mask=inside, other=0.0)
            sum_g += factor_c * tl.load(at + num_channels, mask=inside, other=0.0)
            at += num_columns
    if dweight is not None:
        tl.store(dweight + channel, cast(sum_gn, dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + channel, cast(sum_g, dbias.dtype.element_ty), mask=exists)


def gate_norm_modulate_sums(
    partials_PKC: Tensor,
    scale_RC: Tensor | None,
    row_B: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    dscale_RC: Tensor | None,
    dshift_RC: Tensor | None,
    dgate_RC: Tensor | None,
    dweight_C: Tensor | None,
    dbias_C: Tensor | None,
) -> None:
    """Write the gradients that are not None; those of rows to no sample are 0.

    partials_PKC has P = B x tiles sums of each kind K: of g n, of g, and, for the gate, of dr y.
    """
    (num_samples,), (num_partials, num_kinds, num_channels) = row_B.shape, partials_PKC.shape
    num_columns = num_kinds * num_channels
    sums_BKC = partials_PKC.new_empty(num_samples, num_kinds, num_channels)
    options = {"BLOCK": BLOCK}
    if sums_BKC.numel() > 0:
        grid = num_samples, triton.cdiv(num_columns, BLOCK)
        launch_grid(
            _gate_norm_modulate_bwd_samples_kernel,
            grid,
            partials_PKC,
            sums_BKC,
            num_partials // num_samples,
            num_columns,
            TILES=TILES,
            num_warps=4,
            **options,
        )
    sizes, blocks = (num_samples, num_channels, num_columns), triton.cdiv(num_channels, BLOCK)
    options |= {"SAMPLES": SAMPLES, "num_warps": 1}
    rows = [len(grad) for grad in (dscale_RC, dshift_RC, dgate_RC) if grad is not None]
    if rows:
        inputs = (sums_BKC, row_B, weight_C, bias_C)
        grads = (dscale_RC, dshift_RC, dgate_RC)
        grid = rows[0], blocks
        launch_grid(_gate_norm_modulate_bwd_rows_kernel, grid, *inputs, *grads, *sizes, **options)
    if not (dweight_C is None and dbias_C is None):
        launch_grid(
            _gate_norm_modulate_bwd_affine_kernel,
            blocks,
            sums_BKC,
            scale_RC,
            row_B,
            dweight_C,
            dbias_C,
            *strides(1, scale_RC),
            *sizes,
            **options,
        )


def _builds() -> Iterator[Build]:
    constants = {"SAMPLES": SAMPLES, "BLOCK": BLOCK}
    yield SITES[0].build(
        _gate_norm_modulate_bwd_samples_kernel, 4, {"TILES": TILES, "BLOCK": BLOCK}
    )
    for site in SITES:
        yield site.build(_gate_norm_modulate_bwd_rows_kernel, 1, constants)
        if "weight" not in site.absent:
            yield site.build(_gate_norm_modulate_bwd_affine_kernel, 1, constants)


BUILDS = tuple(build._replace(streams=False) for build in _builds())
