"""The two dot products that carry every policy-gradient objective."""

from typing import Any

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.noise import Noise
from branchcore.reference import EdgeDots
from branchcore.reference.edges import wide


def edge_dots(
    v_ND: Tensor,
    v_old_ND: Tensor | None,
    child_start: Tensor | None = None,
    noise: Noise | None = None,
) -> EdgeDots:
    """Project a velocity change on the noise of the edges that left the node, and square it.

    With Delta = v - v_old: p = mean(Delta * eps) and q = mean(Delta^2) over the latent elements.

    Args:
        v_ND: (N, D) fp32 or bf16, velocities now; the only differentiable input.
        v_old_ND: (N, D) fp32 or bf16, velocities of the rollout. None means stop_gradient(v_ND):
            exact zeros without any work, and a backward of one pass.
        child_start: (N + 1,) int64, trained edges of n are child_start[n]:child_start[n + 1].
            None (with noise None): no edges.
        noise: E draws, those of the rollout.

    Returns:
        `EdgeDots` of p_E (E,) and q_N (N,), fp32.

    Numerics: noise is made again in registers; fp32 partial sums of fixed blocks, added in float64
        in a fixed order: the same bits for any batch composition. In the backward an edge whose
        gradient is 0 draws no noise. All-fp64 input runs the reference in fp64.
    Source: log p_new(y) - log p_old(y) = k p - k^2 q / 2 with k = b / s, times D.
    """
    op = "edge_dots"
    num_nodes, num_elements = _check.matrix(op, "v_ND", v_ND)
    shape, device, states = (num_nodes, num_elements), v_ND.device, _check.states(v_ND)
    _check.tensor(op, "v_ND", v_ND, shape, states, device)
    if v_old_ND is not None:
        _check.tensor(op, "v_old_ND", v_old_ND, shape, states, device)
    if child_start is None or noise is None:
        if child_start is not noise:
            raise ValueError(f"{op}: child_start and noise must be given together, got one of them")
        return EdgeDots(*_forward(v_ND, v_old_ND, None, None, None, None))
    _check.tensor(op, "child_start", child_start, (num_nodes + 1,), _check.INDEX, device)
    _check.noise(op, noise, device=device)
    return EdgeDots(*_forward(v_ND, v_old_ND, child_start, *noise))


def _edges(child_start: Tensor | None, *noise: Any) -> tuple[Tensor | None, Noise | None]:
    return child_start, None if child_start is None else Noise(*noise)


def _empty(v_ND: Tensor, counter_E3: Tensor | None) -> tuple[Tensor, Tensor]:
    num_edges, dtype = 0 if counter_E3 is None else len(counter_E3), wide(v_ND.dtype)
    return v_ND.new_empty(num_edges, dtype=dtype), v_ND.new_empty(len(v_ND), dtype=dtype)


def _cpp(v_ND: Tensor, v_old_ND: Tensor | None, *edges: Tensor | None) -> tuple[Tensor, Tensor]:
    p_E, q_N = _empty(v_ND, edges[2])
    if v_old_ND is None:
        return p_E.zero_(), q_N.zero_()
    _dispatch.native().edge_dots(v_ND, v_old_ND, *edges, p_E, q_N)
    return p_E, q_N


def _cuda(v_ND: Tensor, v_old_ND: Tensor | None, *edges: Tensor | None) -> tuple[Tensor, Tensor]:
    p_E, q_N = _empty(v_ND, edges[2])
    if v_old_ND is None:
        return p_E.zero_(), q_N.zero_()
    _dispatch.cuda().edge_dots(
        _dispatch.dense(v_ND),
        _dispatch.dense(v_old_ND),
        *(_dispatch.contiguous(part) for part in edges),
        p_E,
        q_N,
        _dispatch.cuda_partials(len(p_E), v_ND),
        _dispatch.cuda_partials(len(q_N), v_ND),
        *_dispatch.stream(v_ND),
    )
    return p_E, q_N


def _triton(v_ND: Tensor, v_old_ND: Tensor | None, *edges: Tensor | None) -> tuple[Tensor, Tensor]:
    p_E, q_N = _empty(v_ND, edges[2])
    if v_old_ND is None:
        return p_E.zero_(), q_N.zero_()
    _dispatch.triton_kernels("edge_dots").edge_dots_fwd(
        _dispatch.dense(v_ND),
        _dispatch.dense(v_old_ND),
        *(_dispatch.contiguous(part) for part in edges),
        p_E,
        q_N,
    )
    return p_E, q_N


def _reference(
    v_ND: Tensor, v_old_ND: Tensor | None, *edges: Tensor | None
) -> tuple[Tensor, Tensor]:
    if v_old_ND is None:
        p_E, q_N = _empty(v_ND, edges[2])
        return p_E.zero_(), q_N.zero_()
    return reference.edge_dots(v_ND, v_old_ND, *_edges(*edges))


def _fake(v_ND: Tensor, _: Tensor | None, *edges: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(v_ND, edges[2])


def _cpp_backward(*inputs: Any) -> Tensor:
    dv_ND = _fake_backward(*inputs)
    _dispatch.native().edge_dots_backward(*inputs[:-2], dv_ND)
    return dv_ND


def _cuda_backward(*inputs: Any) -> Tensor:
    dv_ND = _fake_backward(*inputs)
    grad_p_E, grad_q_N, v_ND, v_old_ND, *edges = inputs[:-2]
    _dispatch.cuda().edge_dots_backward(
        grad_p_E.contiguous(),
        grad_q_N.contiguous(),
        _dispatch.dense(v_ND),
        _dispatch.dense(v_old_ND),
        *(_dispatch.contiguous(part) for part in edges),
        dv_ND,
        *_dispatch.stream(dv_ND),
    )
    return dv_ND


def _triton_backward(*inputs: Any) -> Tensor:
    dv_ND = _fake_backward(*inputs)
    grad_p_E, grad_q_N, v_ND, v_old_ND, *edges = inputs[:-2]
    _dispatch.triton_kernels("edge_dots").edge_dots_bwd(
        grad_p_E.contiguous(),
        grad_q_N.contiguous(),
        _dispatch.dense(v_ND),
        _dispatch.dense(v_old_ND),
        *(_dispatch.contiguous(part) for part in edges),
        dv_ND,
    )
    return dv_ND


def _reference_backward(
    grad_p_E: Tensor,
    grad_q_N: Tensor,
    v_ND: Tensor | None,
    v_old_ND: Tensor | None,
    *rest: Any,
) -> Tensor:
    *edges, num_elements, dtype = rest
    difference = None if v_ND is None or v_old_ND is None else (v_ND, v_old_ND)
    return reference.edge_dots_backward(
        grad_p_E, grad_q_N, difference, *_edges(*edges), num_elements, dtype
    )


def _fake_backward(*inputs: Any) -> Tensor:
    grad_q_N, num_elements, dtype = inputs[1], *inputs[-2:]
    return grad_q_N.new_empty(len(grad_q_N), num_elements, dtype=dtype)


_forward = _dispatch.define(
    "edge_dots(Tensor v, Tensor? v_old, Tensor? child_start, Tensor? key, Tensor? counter,"
    " Tensor? mix) -> (Tensor, Tensor)",
    {"cuda": _cuda, "triton": _triton, "cpp": _cpp, "reference": _reference},
    _fake,
)
_backward = _dispatch.define(
    "edge_dots_backward(Tensor grad_p, Tensor grad_q, Tensor? v, Tensor? v_old,"
    " Tensor? child_start, Tensor? key, Tensor? counter, Tensor? mix, SymInt num_elements,"
    " ScalarType dtype) -> Tensor",
    {
        "cuda": _cuda_backward,
        "triton": _triton_backward,
        "cpp": _cpp_backward,
        "reference": _reference_backward,
    },
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    v_ND, v_old_ND, *edges = inputs
    ctx.num_elements, ctx.dtype = v_ND.shape[1], v_ND.dtype
    # on policy the values of v are not needed: do not keep them alive
    ctx.save_for_backward(None if v_old_ND is None else v_ND, v_old_ND, *edges)


def _autograd(ctx: Any, grad_p_E: Tensor, grad_q_N: Tensor) -> tuple[Tensor | None, ...]:
    dv_ND = _backward(grad_p_E, grad_q_N, *ctx.saved_tensors, ctx.num_elements, ctx.dtype)
    return (dv_ND, *[None] * 5)


_dispatch.register_autograd("edge_dots", _autograd, _setup_context)


F32, BF16 = torch.float32, torch.bfloat16


def _build(
    counts: tuple[int, ...] = (2, 0, 6, 1),
    num_elements: int = 2053,
    dtypes: tuple[torch.dtype, torch.dtype | None] = (F32, F32),
    kinds: tuple[str, ...] = testing.KINDS,
    strided: bool = False,
    edges: bool = True,
) -> testing.Inputs:
    shape = (len(counts), num_elements)
    v_ND = testing.normal(shape, dtypes[0], 0, strided)
    v_old_ND = None
    if dtypes[1] is not None:
        v_old_ND = (v_ND.float() + 0.01 * testing.normal(shape, F32, 1, strided)).to(dtypes[1])
    return {
        "v_ND": v_ND,
        "v_old_ND": v_old_ND,
        "child_start": testing.child_starts(counts) if edges else None,
        "noise": testing.draws(counts, kinds) if edges else None,
    }


SPEC = testing.OpSpec(
    name="edge_dots",
    op=edge_dots,
    reference=reference.edge_dots,
    build=_build,
    cases=(
        testing.Case("ragged edges, one node without, every kind of draw", {}),
        testing.Case("both velocities bf16, as models give them", {"dtypes": (BF16, BF16)}),
        testing.Case("new velocity bf16, old fp32", {"dtypes": (BF16, F32)}),
        testing.Case("on policy: old is stop_gradient(v)", {"dtypes": (F32, None)}),
        testing.Case("on policy in bf16", {"dtypes": (BF16, None)}),
        testing.Case("no edges: KL to a reference", {"edges": False}),
        testing.Case("not contiguous", {"strided": True}),
        testing.Case("one element, one node, one edge", {"counts": (1,), "num_elements": 1}),
        testing.Case("digits: 8 x 8 latents", {"counts": (4,) * 9, "num_elements": 64}),
        testing.Case("nodes without edges", {"counts": (0, 0)}),
        testing.Case("no nodes", {"counts": ()}),
        testing.Case("siblings share a stream", {"kinds": ("mixed",), "num_elements": 4096}),
    ),
    # on policy there is nothing to read: the forward is zeros
    num_bytes=lambda inputs: (
        0 if inputs["v_old_ND"] is None else testing.num_bytes(inputs["v_ND"], inputs["v_old_ND"])
    ),
    differentiable=("v_ND",),
    # sine and cosine to 2^-21: at most 3.3 with errors of that size and the worst signs
    gpu_factor=4.0,
)
