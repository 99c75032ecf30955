"""p = mean(Delta eps) per edge and q = mean(Delta^2) per node, Delta = v - v_old.

Letters: N nodes, E trained edges, D latent elements.
"""

import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.noise import blocks, draw, load_key, nothing_cached, silence
from branchcore.kernels.tile import (
    NUM_WARPS,
    TILE,
    add_scaled,
    aligned,
    dot,
    finish,
    launch,
    num_tiles,
    one_variant,
    place,
    read,
    row_stride,
    total,
    unweave,
    weave,
    write,
)
from torch import Tensor


@one_variant
def _edge_dots_fwd_kernel(
    v,
    v_old,
    child_start,
    key,
    counter,
    mix,
    dots,
    squares,
    v_stride,
    v_old_stride,
    num_elements,
    num_tiles,
    UNIT: tl.constexpr,
):
    """Grid: (N tiles,); a program owns a tile of a node and of all its edges.

    Delta stays in registers while their noise is made again: both velocities once, 4 bytes per
    element in bf16, and K normals for K edges.
    """
    n, tile, start, left = place(num_elements, num_tiles, UNIT)
    now = read(v + n * v_stride + start, left, UNIT)
    old = read(v_old + n * v_old_stride + start, left, UNIT)
    delta = unweave(now[0] - old[0]), unweave(now[1] - old[1])
    tl.store(squares + n * num_tiles + tile, dot(delta, delta))
    if child_start is not None:
        first = tl.load(child_start + n)
        last = tl.load(child_start + n + 1)
        words, block, cache = load_key(key), blocks(tile), nothing_cached()
        counter += 3 * first
        mix += 2 * first
        dots += first * num_tiles + tile
        for _ in range(0, (last - first).to(tl.int32)):
            eps, cache = draw(words, counter, mix, False, block, cache)
            tl.store(dots, dot(delta, eps))
            counter += 3
            mix += 2
            dots += num_tiles


@one_variant
def _edge_dots_fwd_finish_kernel(dots, squares, p, q, num_edges, num_elements, num_tiles):
    """Grid: (E + N,); a program adds the partial sums of an edge, or of a node."""
    row = tl.program_id(0).to(tl.int64)
    if row < num_edges:
        mean = total(dots, row, num_tiles) / num_elements
        tl.store(p + row, mean.to(tl.float32))
    else:
        row -= num_edges
        mean = total(squares, row, num_tiles) / num_elements
        tl.store(q + row, mean.to(tl.float32))


@one_variant
def _edge_dots_bwd_kernel(
    grad_p,
    grad_q,
    v,
    v_old,
    child_start,
    key,
    counter,
    mix,
    dv,
    v_stride,
    v_old_stride,
    num_elements,
    num_tiles,
    UNIT: tl.constexpr,
):
    """Grid: (N tiles,); a program owns a tile of a node and of all its edges.

    Writes dv, 2 bytes per element in bf16, and draws K normals; reads the velocities only where
    grad_q is not 0, and on the first update, where there is no v_old, none.
    """
    n, tile, start, left = place(num_elements, num_tiles, UNIT)
    sums = silence()
    if child_start is not None:
        first = tl.load(child_start + n)
        last = tl.load(child_start + n + 1)
        words, block, cache = load_key(key), blocks(tile), nothing_cached()
        counter += 3 * first
        mix += 2 * first
        grad_p += first
        for _ in range(0, (last - first).to(tl.int32)):
            grad = tl.load(grad_p)
            eps, cache = draw(words, counter, mix, grad == 0.0, block, cache)
            sums = add_scaled(sums, grad, eps)
            counter += 3
            mix += 2
            grad_p += 1
    dv_tile = weave(sums[0]), weave(sums[1])
    if v_old is not None:
        twice = 2.0 * tl.load(grad_q + n)
        if twice != 0.0:
            now = read(v + n * v_stride + start, left, UNIT)
            old = read(v_old + n * v_old_stride + start, left, UNIT)
            dv_tile = (
                dv_tile[0] + twice * (now[0] - old[0]),
                dv_tile[1] + twice * (now[1] - old[1]),
            )
    scale = 1.0 / num_elements
    dv_tile = scale * dv_tile[0], scale * dv_tile[1]
    write(dv + n * num_elements + start, dv_tile, left, UNIT)


def edge_dots_fwd(
    v_ND: Tensor,
    v_old_ND: Tensor,
    child_start: Tensor | None,
    key: Tensor | None,
    counter_E3: Tensor | None,
    mix_E2: Tensor | None,
    p_E: Tensor,
    q_N: Tensor,
) -> None:
    """Fill p and q; rows of v and v_old have elements side by side, the rest is contiguous."""
    (num_nodes, num_elements), num_edges = v_ND.shape, len(p_E)
    tiles = num_tiles(num_elements)
    dots_ET, squares_NT = p_E.new_empty(num_edges, tiles), q_N.new_empty(num_nodes, tiles)
    edges = (child_start, key, counter_E3, mix_E2)
    velocities = [aligned(velocity) for velocity in (v_ND, v_old_ND)]
    strides = [row_stride(velocity) for velocity in velocities]
    arguments = (*velocities, *edges, dots_ET, squares_NT, *strides)
    launch(_edge_dots_fwd_kernel, num_nodes, num_elements, *arguments)
    sums = (dots_ET, squares_NT, p_E, q_N, num_edges)
    finish(_edge_dots_fwd_finish_kernel, num_edges + num_nodes, num_elements, *sums)


def edge_dots_bwd(
    grad_p_E: Tensor,
    grad_q_N: Tensor,
    v_ND: Tensor | None,
    v_old_ND: Tensor | None,
    child_start: Tensor | None,
    key: Tensor | None,
    counter_E3: Tensor | None,
    mix_E2: Tensor | None,
    dv_ND: Tensor,
) -> None:
    """Fill dv; without v_old it is the sum over edges alone."""
    edges = (child_start, key, counter_E3, mix_E2)
    velocities = [aligned(velocity) for velocity in (v_ND, v_old_ND)]
    strides = [row_stride(velocity) for velocity in velocities]
    arguments = (grad_p_E, grad_q_N, *velocities, *edges, dv_ND, *strides)
    launch(_edge_dots_bwd_kernel, *dv_ND.shape, *arguments)


_INTEGERS = dict.fromkeys(("v_stride", "v_old_stride", "num_elements", "num_tiles"), "i32")
_EDGES = {"child_start": "*i64", "key": "*i64", "counter": "*i32", "mix": "*fp64"}
_NO_EDGES = dict.fromkeys(_EDGES)
_BF16 = {"v": "*bf16", "v_old": "*bf16", **_INTEGERS}
_SUMS = {"dots": "*fp32", "squares": "*fp32"}
_FORWARD = _BF16 | _EDGES | _SUMS
_FINISH = {
    **_SUMS,
    "p": "*fp32",
    "q": "*fp32",
    "num_edges": "i32",
    "num_elements": "i32",
    "num_tiles": "i32",
}
_GRADS = {"grad_p": "*fp32", "grad_q": "*fp32"}
_BACKWARD = _BF16 | _EDGES | _GRADS | {"dv": "*bf16"}
_FIRST_UPDATE = {name: kind for name, kind in _BACKWARD.items() if name not in ("v", "v_old")}
_FP32 = {"v": "*fp32", "v_old": "*fp32"}
_TILES, _OCTETS = {"UNIT": TILE}, {"UNIT": 8}

BUILDS = (
    Build(_edge_dots_fwd_kernel, _FORWARD, _TILES, num_warps=NUM_WARPS),
    Build(_edge_dots_fwd_kernel, _FORWARD | _FP32, _OCTETS, num_warps=NUM_WARPS),
    Build(_edge_dots_fwd_kernel, _BF16 | _SUMS, _NO_EDGES | _TILES, num_warps=NUM_WARPS),
    Build(_edge_dots_fwd_finish_kernel, _FINISH, {}, num_warps=NUM_WARPS, streams=False),
    Build(_edge_dots_bwd_kernel, _BACKWARD, _TILES, num_warps=NUM_WARPS),
    Build(_edge_dots_bwd_kernel, _BACKWARD | _FP32 | {"dv": "*fp32"}, _OCTETS, num_warps=NUM_WARPS),
    # stores 16 bytes at a time and loads no states at all
    Build(
        _edge_dots_bwd_kernel,
        _FIRST_UPDATE,
        {"v": None, "v_old": None, **_TILES},
        num_warps=NUM_WARPS,
        streams=False,
    ),
)
