"""Grow all children of a wave: y = a x + b v + c h + s eps. Letters: N parents, M children, D."""

import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.noise import blocks, draw, load_key, nothing_cached
from branchcore.kernels.tile import (
    NUM_WARPS,
    TILE,
    aligned,
    finish,
    gaussian_log_prob,
    launch,
    nothing,
    num_tiles,
    one_variant,
    place,
    read,
    row_stride,
    sum_squares,
    total,
    weave,
    write,
)
from torch import Tensor


@one_variant
def _branch_step_fwd_kernel(
    x,
    v,
    h,
    rows,
    child_start,
    key,
    counter,
    mix,
    y,
    partials,
    x_stride,
    v_stride,
    h_stride,
    num_elements,
    num_tiles,
    UNIT: tl.constexpr,
):
    """Grid: (N tiles,); a program owns a tile of a parent and of all its children.

    x and v are read once, a noise stream that siblings share is drawn once: 4 (1 + K) + 2 bytes per
    element of K children for bf16 velocities, and K normals, which is what it waits for.
    """
    n, tile, start, left = place(num_elements, num_tiles, UNIT)
    first = tl.load(child_start + n)
    last = tl.load(child_start + n + 1)
    x_tile = read(x + n * x_stride + start, left, UNIT)
    v_tile = read(v + n * v_stride + start, left, UNIT)
    if h is not None:
        h_tile = read(h + n * h_stride + start, left, UNIT)
    words = load_key(key)
    block, cache = blocks(tile), nothing_cached()
    rows += 4 * first
    counter += 3 * first
    mix += 2 * first
    y += first * num_elements + start
    partials += first * num_tiles + tile
    for _ in range(0, (last - first).to(tl.int32)):
        a = tl.load(rows).to(tl.float32)
        b = tl.load(rows + 1).to(tl.float32)
        s = tl.load(rows + 3)
        eps, cache = draw(words, counter, mix, s == 0.0, block, cache)
        first_half = a * x_tile[0] + b * v_tile[0] + s.to(tl.float32) * weave(eps[0])
        last_half = a * x_tile[1] + b * v_tile[1] + s.to(tl.float32) * weave(eps[1])
        if h is not None:
            c = tl.load(rows + 2).to(tl.float32)
            first_half += c * h_tile[0]
            last_half += c * h_tile[1]
        y_tile = first_half, last_half
        write(y, y_tile, left, UNIT)
        tl.store(partials, sum_squares(eps, left, UNIT))
        rows += 4
        counter += 3
        mix += 2
        y += num_elements
        partials += num_tiles


@one_variant
def _branch_step_fwd_finish_kernel(partials, rows, log_prob, num_elements, num_tiles):
    """Grid: (M,); a program adds a child's partial sums."""
    m = tl.program_id(0).to(tl.int64)
    s = tl.load(rows + 4 * m + 3)
    value = gaussian_log_prob(total(partials, m, num_tiles) / num_elements, s)
    tl.store(log_prob + m, value.to(tl.float32))


@one_variant
def _branch_step_bwd_kernel(
    grad_y,
    coefficient,
    child_start,
    grad,
    grad_y_stride,
    coefficient_stride,
    num_elements,
    num_tiles,
    UNIT: tl.constexpr,
):
    """Grid: (N tiles,); a program gathers a tile of a parent: 4 K + 4 bytes per element."""
    n, _, start, left = place(num_elements, num_tiles, UNIT)
    first = tl.load(child_start + n)
    last = tl.load(child_start + n + 1)
    coefficient += first * coefficient_stride
    grad_y += first * grad_y_stride + start
    early, late = nothing()
    for _ in range(0, (last - first).to(tl.int32)):
        scale = tl.load(coefficient).to(tl.float32)
        grad_y_tile = read(grad_y, left, UNIT)
        early += scale * grad_y_tile[0]
        late += scale * grad_y_tile[1]
        coefficient += coefficient_stride
        grad_y += grad_y_stride
    write(grad + n * num_elements + start, (early, late), left, UNIT)


def branch_step_fwd(
    x_ND: Tensor,
    v_ND: Tensor,
    h_ND: Tensor | None,
    rows_M4: Tensor,
    child_start: Tensor,
    key: Tensor,
    counter_M3: Tensor,
    mix_M2: Tensor,
    y_MD: Tensor,
    log_prob_M: Tensor,
) -> None:
    """Fill y and log_prob; rows of states have elements side by side, the rest is contiguous."""
    num_parents, num_elements = x_ND.shape
    num_children = len(rows_M4)
    partials_MT = log_prob_M.new_empty(num_children, num_tiles(num_elements))
    states = [aligned(state) for state in (x_ND, v_ND, h_ND)]
    strides = [row_stride(state) for state in states]
    edges = (rows_M4, child_start, key, counter_M3, mix_M2, y_MD, partials_MT)
    launch(_branch_step_fwd_kernel, num_parents, num_elements, *states, *edges, *strides)
    sums = (partials_MT, rows_M4, log_prob_M)
    finish(_branch_step_fwd_finish_kernel, num_children, num_elements, *sums)


def branch_step_bwd(
    grad_y_MD: Tensor, coefficient_M: Tensor, child_start: Tensor, grad_ND: Tensor
) -> None:
    """Fill the gradient of x, v or h; rows of grad_y have elements side by side."""
    grads = aligned(grad_y_MD)
    tensors = (grads, coefficient_M, child_start, grad_ND)
    strides = (row_stride(grads), row_stride(coefficient_M))
    launch(_branch_step_bwd_kernel, *grad_ND.shape, *tensors, *strides)


_FORWARD = {
    "x": "*fp32",
    "v": "*bf16",
    "rows": "*fp64",
    "child_start": "*i64",
    "key": "*i64",
    "counter": "*i32",
    "mix": "*fp64",
    "y": "*fp32",
    "partials": "*fp32",
    "x_stride": "i32",
    "v_stride": "i32",
    "h_stride": "i32",
    "num_elements": "i32",
    "num_tiles": "i32",
}
_FINISH = {
    "partials": "*fp32",
    "rows": "*fp64",
    "log_prob": "*fp32",
    "num_elements": "i32",
    "num_tiles": "i32",
}
_BACKWARD = {
    "grad_y": "*fp32",
    "coefficient": "*fp64",
    "child_start": "*i64",
    "grad": "*bf16",
    "grad_y_stride": "i32",
    "coefficient_stride": "i32",
    "num_elements": "i32",
    "num_tiles": "i32",
}
_TILES, _OCTETS = {"UNIT": TILE}, {"UNIT": 8}

BUILDS = (
    Build(_branch_step_fwd_kernel, _FORWARD, {"h": None, **_TILES}, num_warps=NUM_WARPS),
    Build(_branch_step_fwd_kernel, _FORWARD, {"h": None, **_OCTETS}, num_warps=NUM_WARPS),
    Build(
        _branch_step_fwd_kernel,
        _FORWARD | {"v": "*fp32"},
        {"h": None, **_TILES},
        num_warps=NUM_WARPS,
    ),
    Build(_branch_step_fwd_kernel, _FORWARD | {"h": "*fp32"}, _TILES, num_warps=NUM_WARPS),
    Build(_branch_step_fwd_finish_kernel, _FINISH, {}, num_warps=NUM_WARPS, streams=False),
    Build(_branch_step_bwd_kernel, _BACKWARD, _TILES, num_warps=NUM_WARPS),
    Build(_branch_step_bwd_kernel, _BACKWARD | {"grad": "*fp32"}, _OCTETS, num_warps=NUM_WARPS),
)
