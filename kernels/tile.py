"""Tiles: what a program owns of a row, how it is read and written, how its sums are added.

A program is one warp and owns `TILE` elements of a parent with all its children. A lane holds
octets: 16 bytes of bf16, two Philox blocks. A value of a tile is a pair, first and last halves of
all octets, (OCTETS, 4) each; noise is a pair of four tensors (OCTETS,), one per place in a half,
made where the elements are, so that no lane needs another's. Sums go through fixed lanes and tiles:
a row's bits do not depend on its batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.rounding import INTERPRETED, cast
from torch import Tensor

# 32 elements a lane: what a parent and a child cost once is spread over more normals than with 16,
# 26 instead of 30 instructions per normal on sm_90, and three warps to a scheduler still hide the
# start of each other. An interpreted program is slow, and so large.
TILE = 2048 if INTERPRETED else 1024
NUM_WARPS = 1
WHOLE = tl.constexpr(TILE)
OCTETS = tl.constexpr(TILE // 8)
PARTIALS = tl.constexpr(256)
HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


def num_tiles(num_elements: int) -> int:
    """Count the tiles of a row."""
    return triton.cdiv(num_elements, TILE)


def one_variant(function: Any) -> Any:
    """Compile a kernel for its dtypes, its absent tensors and its constants alone.

    Triton would else compile anew where an address or a size is a multiple of 16, or 1, with other
    layouts and other fused multiply-adds, and a row alone would have other bits than in its batch.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    constants = [name for name, kind in function.__annotations__.items() if kind is tl.constexpr]
    return triton.jit(function, do_not_specialize=[n for n in names if n not in constants])


def row_stride(states: Tensor | None) -> int:
    """Elements from row to row; 0 without a tensor."""
    return 0 if states is None else states.stride(0)


def aligned(states: Tensor | None) -> Tensor | None:
    """Copy rows of whole octets that do not start on 16 bytes each."""
    if states is None or states.shape[1] % 8 != 0:
        return states
    stride = states.stride(0) * states.element_size() if len(states) > 1 else 0
    misplaced = states.data_ptr() % 16 != 0 or stride % 16 != 0
    return states.clone(memory_format=torch.contiguous_format) if misplaced else states


def unit(num_elements: int) -> int:
    """Say what a row consists of: whole tiles, else whole octets, else elements.

    All but the last may be read 16 bytes at a time, from rows that `aligned` has seen.
    """
    return next(size for size in (TILE, 8, 1) if num_elements % size == 0)


def launch(kernel: Any, num_rows: int, num_elements: int, *arguments: Any) -> None:
    """Start a program per tile of each row; the first argument is on the device of the launch."""
    tiles, constants = num_tiles(num_elements), {"UNIT": unit(num_elements), "num_warps": NUM_WARPS}
    launch_grid(kernel, num_rows * tiles, *arguments, num_elements, tiles, **constants)


def finish(kernel: Any, num_rows: int, num_elements: int, *arguments: Any) -> None:
    """Start a program per row, to add its partial sums."""
    tiles = num_tiles(num_elements)
    launch_grid(kernel, num_rows, *arguments, num_elements, tiles, num_warps=NUM_WARPS)


@triton.jit
def place(num_elements, num_tiles, UNIT: tl.constexpr):
    """Row of a program, tile of the row, its first element, and how many elements it has."""
    program = tl.program_id(0)
    tile = program % num_tiles
    first = tile.to(tl.int64) * WHOLE
    left = tl.minimum(num_elements - first, WHOLE).to(tl.int32)
    if UNIT > 1:
        left = tl.multiple_of(left, 8)
    return (program // num_tiles).to(tl.int64), tile, first, left


@triton.jit
def _places(start, count: tl.constexpr, UNIT: tl.constexpr):
    """Where the first `count` elements of each octet are: in the tile, and in memory."""
    at = tl.arange(0, OCTETS)[:, None] * 8 + tl.arange(0, count)[None, :]
    pointers = start + at
    if UNIT > 1:
        size: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
        pointers = tl.multiple_of(pointers, [size, 16])
    return at, pointers


@triton.jit
def _load(pointers, exists, UNIT: tl.constexpr):
    values = tl.load(pointers) if UNIT == WHOLE else tl.load(pointers, mask=exists, other=0.0)
    return values.to(tl.float32)


@triton.jit
def read(start, left, UNIT: tl.constexpr):
    """A tile as fp32; 0 past its end."""
    if start.dtype.element_ty == tl.bfloat16:
        at, pointers = _places(start, 8, UNIT)
        octets = _load(pointers, at < left, UNIT)
        pair = tl.split(octets.reshape([OCTETS, 2, 4]).trans(0, 2, 1))
    else:
        at, first = _places(start, 4, UNIT)
        _, last = _places(start + 4, 4, UNIT)
        pair = _load(first, at < left, UNIT), _load(last, at + 4 < left, UNIT)
    return pair


@triton.jit
def nothing():
    """A tile of zeros."""
    zero = tl.zeros([OCTETS, 4], tl.float32)
    return zero, zero


@triton.jit
def write(start, values, left, UNIT: tl.constexpr):
    """Store a tile in the dtype of its row; only what exists of it."""
    if start.dtype.element_ty == tl.bfloat16:
        at, pointers = _places(start, 8, UNIT)
        octets = tl.join(values[0], values[1]).trans(0, 2, 1).reshape([OCTETS, 8])
        tl.store(pointers, cast(octets, tl.bfloat16), None if UNIT == WHOLE else at < left)
    else:
        at, first = _places(start, 4, UNIT)
        _, last = _places(start + 4, 4, UNIT)
        tl.store(first, values[0], None if UNIT == WHOLE else at < left)
        tl.store(last, values[1], None if UNIT == WHOLE else at + 4 < left)


@triton.jit
def weave(four):
    """Put four tensors (OCTETS,), one per place in a half, in the order of the elements."""
    even, odd = tl.join(four[0], four[2]), tl.join(four[1], four[3])
    return tl.join(even, odd).reshape([OCTETS, 4])


@triton.jit
def unweave(half):
    """The four tensors that `weave` put together."""
    even, odd = tl.split(half.reshape([OCTETS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _trim(eps, rest):
    a, b = eps
    return (
        tl.where(rest > 0, a[0], 0.0),
        tl.where(rest > 1, a[1], 0.0),
        tl.where(rest > 2, a[2], 0.0),
        tl.where(rest > 3, a[3], 0.0),
    ), (
        tl.where(rest > 4, b[0], 0.0),
        tl.where(rest > 5, b[1], 0.0),
        tl.where(rest > 6, b[2], 0.0),
        tl.where(rest > 7, b[3], 0.0),
    )


@triton.jit
def add_scaled(eps, scale, other):
    """eps + scale other, both noise of a tile."""
    a, b = eps
    c, d = other
    return (
        (a[0] + scale * c[0], a[1] + scale * c[1], a[2] + scale * c[2], a[3] + scale * c[3]),
        (b[0] + scale * d[0], b[1] + scale * d[1], b[2] + scale * d[2], b[3] + scale * d[3]),
    )


@triton.jit
def _octet_dots(eps, other):
    a, b = eps
    c, d = other
    first = a[0] * c[0] + a[1] * c[1] + a[2] * c[2] + a[3] * c[3]
    return first + (b[0] * d[0] + b[1] * d[1] + b[2] * d[2] + b[3] * d[3])


@triton.jit
def dot(eps, other):
    """Sum of the products of two tiles of noise, one of which is 0 past the end."""
    return tl.sum(_octet_dots(eps, other), axis=0)


@triton.jit
def sum_squares(eps, left, UNIT: tl.constexpr):
    """Sum of the squares of what exists of a tile of noise."""
    rest = left - tl.arange(0, OCTETS) * 8
    if UNIT == 1:
        eps = _trim(eps, rest)
    sums = _octet_dots(eps, eps)
    if UNIT == 8:
        sums = tl.where(rest > 0, sums, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def total(partials, row, num_tiles):
    """Add a row's partial sums in float64, in an order that only their number decides."""
    at = tl.arange(0, PARTIALS)
    start = partials + row * num_tiles
    sums = tl.zeros([PARTIALS], tl.float64)
    for first in range(0, num_tiles, PARTIALS):
        sums += tl.load(start + first + at, mask=first + at < num_tiles, other=0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def gaussian_log_prob(mean_square, s):
    """Mean log-probability per element, from the mean of eps^2; 0 if s is 0. All float64."""
    value = -0.5 * mean_square - tl.log(tl.where(s == 0.0, 1.0, s)) - HALF_LOG_2PI
    return tl.where(s == 0.0, 0.0, value)
