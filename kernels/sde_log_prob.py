"""Mean log-probability of stored children: eps = (y - a x - b v - c h) / s.

Letters: N parents, M children, D latent elements.
"""

import triton
import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.tile import (
    NUM_WARPS,
    TILE,
    aligned,
    dot,
    finish,
    gaussian_log_prob,
    launch,
    nothing,
    num_tiles,
    one_variant,
    place,
    read,
    row_stride,
    total,
    unweave,
    write,
)
from torch import Tensor


@triton.jit
def _residual(y, rows, x_tile, v_tile, h_tile, left, UNIT: tl.constexpr):
    """eps of the child at `y` and `rows`; 0 past the end of the tile, where all that is read is."""
    a = tl.load(rows).to(tl.float32)
    b = tl.load(rows + 1).to(tl.float32)
    inverse = 1.0 / tl.load(rows + 3).to(tl.float32)
    early, late = read(y, left, UNIT)
    early -= a * x_tile[0] + b * v_tile[0]
    late -= a * x_tile[1] + b * v_tile[1]
    if h_tile is not None:
        c = tl.load(rows + 2).to(tl.float32)
        early -= c * h_tile[0]
        late -= c * h_tile[1]
    return early * inverse, late * inverse


@one_variant
def _sde_log_prob_fwd_kernel(
    x,
    v,
    y,
    rows,
    child_start,
    h,
    partials,
    x_stride,
    v_stride,
    y_stride,
    h_stride,
    num_elements,
    num_tiles,
    UNIT: tl.constexpr,
):
    """Grid: (N tiles,); a program owns a tile of a parent and of all its children.

    x and v are read once: 4 (1 + K) + 2 bytes per element of K children for bf16 velocities.
    """
    n, tile, start, left = place(num_elements, num_tiles, UNIT)
    first = tl.load(child_start + n)
    last = tl.load(child_start + n + 1)
    x_tile = read(x + n * x_stride + start, left, UNIT)
    v_tile = read(v + n * v_stride + start, left, UNIT)
    h_tile = None
    if h is not None:
        h_tile = read(h + n * h_stride + start, left, UNIT)
    rows += 4 * first
    y += first * y_stride + start
    partials += first * num_tiles + tile
    for _ in range(0, (last - first).to(tl.int32)):
        early, late = _residual(y, rows, x_tile, v_tile, h_tile, left, UNIT)
        eps = unweave(early), unweave(late)
        tl.store(partials, dot(eps, eps))
        rows += 4
        y += y_stride
        partials += num_tiles


@one_variant
def _sde_log_prob_fwd_finish_kernel(partials, rows, log_prob, num_elements, num_tiles):
    """Grid: (M,); a program adds a child's partial sums."""
    m = tl.program_id(0).to(tl.int64)
    mean = total(partials, m, num_tiles) / num_elements
    value = gaussian_log_prob(mean, tl.load(rows + 4 * m + 3))
    tl.store(log_prob + m, value.to(tl.float32))


@one_variant
def _sde_log_prob_bwd_kernel(
    grad,
    x,
    v,
    y,
    rows,
    child_start,
    h,
    dv,
    x_stride,
    v_stride,
    y_stride,
    h_stride,
    num_elements,
    num_tiles,
    UNIT: tl.constexpr,
):
    """Grid: (N tiles,); a program owns a tile of a parent and of all its children.

    The bytes of the forward, and dv.
    """
    n, _, start, left = place(num_elements, num_tiles, UNIT)
    first = tl.load(child_start + n)
    last = tl.load(child_start + n + 1)
    x_tile = read(x + n * x_stride + start, left, UNIT)
    v_tile = read(v + n * v_stride + start, left, UNIT)
    h_tile = None
    if h is not None:
        h_tile = read(h + n * h_stride + start, left, UNIT)
    grad += first
    rows += 4 * first
    y += first * y_stride + start
    early, late = nothing()
    for _ in range(0, (last - first).to(tl.int32)):
        k = tl.load(rows + 1) / tl.load(rows + 3)
        scale = (tl.load(grad) * k / num_elements).to(tl.float32)
        if scale != 0.0:
            eps = _residual(y, rows, x_tile, v_tile, h_tile, left, UNIT)
            early += scale * eps[0]
            late += scale * eps[1]
        grad += 1
        rows += 4
        y += y_stride
    write(dv + n * num_elements + start, (early, late), left, UNIT)


def sde_log_prob_fwd(
    x_ND: Tensor,
    v_ND: Tensor,
    y_MD: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    h_ND: Tensor | None,
    log_prob_M: Tensor,
) -> None:
    """Fill log_prob; rows of states have elements side by side, the rest is contiguous."""
    (num_parents, num_elements), num_children = x_ND.shape, len(log_prob_M)
    partials_MT = log_prob_M.new_empty(num_children, num_tiles(num_elements))
    x, v, y, h = states = [aligned(state) for state in (x_ND, v_ND, y_MD, h_ND)]
    strides = [row_stride(state) for state in states]
    arguments = (x, v, y, rows_M4, child_start, h, partials_MT, *strides)
    launch(_sde_log_prob_fwd_kernel, num_parents, num_elements, *arguments)
    sums = (partials_MT, rows_M4, log_prob_M)
    finish(_sde_log_prob_fwd_finish_kernel, num_children, num_elements, *sums)


def sde_log_prob_bwd(
    grad_M: Tensor,
    x_ND: Tensor,
    v_ND: Tensor,
    y_MD: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    h_ND: Tensor | None,
    dv_ND: Tensor,
) -> None:
    """Fill dv."""
    x, v, y, h = states = [aligned(state) for state in (x_ND, v_ND, y_MD, h_ND)]
    strides = [row_stride(state) for state in states]
    tensors = (grad_M, x, v, y, rows_M4, child_start, h, dv_ND)
    launch(_sde_log_prob_bwd_kernel, *dv_ND.shape, *tensors, *strides)


_FORWARD = {
    "x": "*fp32",
    "v": "*bf16",
    "y": "*fp32",
    "rows": "*fp64",
    "child_start": "*i64",
    "partials": "*fp32",
    "x_stride": "i32",
    "v_stride": "i32",
    "y_stride": "i32",
    "h_stride": "i32",
    "num_elements": "i32",
    "num_tiles": "i32",
}
_BACKWARD = {name: kind for name, kind in _FORWARD.items() if name != "partials"}
_BACKWARD |= {"grad": "*fp32", "dv": "*bf16"}
_FINISH = {
    "partials": "*fp32",
    "rows": "*fp64",
    "log_prob": "*fp32",
    "num_elements": "i32",
    "num_tiles": "i32",
}
_FP32, _MULTISTEP = {"v": "*fp32", "dv": "*fp32"}, {"h": "*fp32"}
_TILES, _OCTETS = {"UNIT": TILE}, {"UNIT": 8}

BUILDS = (
    Build(_sde_log_prob_fwd_kernel, _FORWARD, {"h": None, **_TILES}, num_warps=NUM_WARPS),
    Build(_sde_log_prob_fwd_kernel, _FORWARD | _MULTISTEP, _OCTETS, num_warps=NUM_WARPS),
    Build(_sde_log_prob_fwd_finish_kernel, _FINISH, {}, num_warps=NUM_WARPS, streams=False),
    Build(_sde_log_prob_bwd_kernel, _BACKWARD, {"h": None, **_TILES}, num_warps=NUM_WARPS),
    Build(_sde_log_prob_bwd_kernel, _BACKWARD | _FP32 | _MULTISTEP, _OCTETS, num_warps=NUM_WARPS),
)
