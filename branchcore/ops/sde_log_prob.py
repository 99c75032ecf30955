"""Log-probability of stored children, for trainers that keep samples instead of noise."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.reference.edges import wide


def sde_log_prob(
    x_ND: Tensor,
    v_ND: Tensor,
    y_MD: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    h_ND: Tensor | None = None,
) -> Tensor:
    """Score each stored child under its parent's step, per latent element.

    Args:
        x_ND: (N, D) fp32 or bf16, parent states.
        v_ND: (N, D) fp32 or bf16, velocities at the parents; the only differentiable input.
        y_MD: (M, D) fp32, children grouped by parent.
        rows_M4: (M, 4) fp64, (a, b, c, s) of each child's step, s > 0.
        child_start: (N + 1,) int64, children of n are rows child_start[n]:child_start[n + 1].
        h_ND: (N, D) fp32 or bf16, x0 predictions of the parents' parents. None means that every c
            is 0, which is not checked.

    Returns:
        (M,) fp32, nats per latent element.

    Numerics: fp32 partial sums of fixed blocks, added in float64 in a fixed order: the same bits
        for any batch composition. A difference of two fp32 log-probabilities is good to 4e-8;
        `edge_dots` gives the log-ratio itself to 1e-10. All-fp64 input runs the reference in fp64.
    Source: Flow-GRPO eq. 9 with the mean over elements that its code uses.
    """
    op = "sde_log_prob"
    num_parents, num_elements = _check.matrix(op, "x_ND", x_ND)
    num_children = _check.length(op, "rows_M4", rows_M4)
    shape, device, states = (num_parents, num_elements), x_ND.device, _check.states(x_ND)
    _check.tensor(op, "x_ND", x_ND, shape, states, device)
    _check.tensor(op, "v_ND", v_ND, shape, states, device)
    _check.tensor(op, "y_MD", y_MD, (num_children, num_elements), (wide(x_ND.dtype),), device)
    _check.tensor(op, "rows_M4", rows_M4, (num_children, 4), _check.ROW, device)
    _check.tensor(op, "child_start", child_start, (num_parents + 1,), _check.INDEX, device)
    if h_ND is not None:
        _check.tensor(op, "h_ND", h_ND, shape, states, device)
    return _forward(x_ND, v_ND, y_MD, rows_M4, child_start, h_ND)


def _cpp(*inputs: Tensor) -> Tensor:
    log_prob_M = _fake(*inputs)
    _dispatch.native().sde_log_prob(*inputs, log_prob_M)
    return log_prob_M


def _cuda(*inputs: Tensor) -> Tensor:
    log_prob_M = _fake(*inputs)
    _dispatch.cuda().sde_log_prob(
        *_ready(*inputs),
        log_prob_M,
        _dispatch.cuda_partials(len(log_prob_M), inputs[2]),
        *_dispatch.stream(log_prob_M),
    )
    return log_prob_M


def _triton(*inputs: Tensor) -> Tensor:
    log_prob_M = _fake(*inputs)
    _dispatch.triton_kernels("sde_log_prob").sde_log_prob_fwd(*_ready(*inputs), log_prob_M)
    return log_prob_M


def _ready(*inputs: Tensor | None) -> Iterator[Tensor | None]:
    """Lay out (x, v, y, rows, child_start, h) as GPU kernels read them."""
    for place, value in enumerate(inputs):
        index = place in (3, 4)
        yield _dispatch.contiguous(value) if index else _dispatch.dense(value)


def _fake(*inputs: Tensor) -> Tensor:
    y_MD = inputs[2]
    return y_MD.new_empty(len(y_MD))


def _cpp_backward(*inputs: Tensor) -> Tensor:
    dv_ND = _fake_backward(*inputs)
    _dispatch.native().sde_log_prob_backward(*inputs, dv_ND)
    return dv_ND


def _cuda_backward(grad_M: Tensor, *inputs: Tensor) -> Tensor:
    dv_ND = _fake_backward(grad_M, *inputs)
    _dispatch.cuda().sde_log_prob_backward(
        grad_M, *_ready(*inputs), dv_ND, *_dispatch.stream(dv_ND)
    )
    return dv_ND


def _triton_backward(grad_M: Tensor, *inputs: Tensor) -> Tensor:
    dv_ND = _fake_backward(grad_M, *inputs)
    kernels = _dispatch.triton_kernels("sde_log_prob")
    kernels.sde_log_prob_bwd(grad_M.contiguous(), *_ready(*inputs), dv_ND)
    return dv_ND


def _fake_backward(*inputs: Tensor) -> Tensor:
    v_ND = inputs[2]
    return torch.empty_like(v_ND, memory_format=torch.contiguous_format)


_forward = _dispatch.define(
    "sde_log_prob(Tensor x, Tensor v, Tensor y, Tensor rows, Tensor child_start, Tensor? h)"
    " -> Tensor",
    {"cuda": _cuda, "triton": _triton, "cpp": _cpp, "reference": reference.sde_log_prob},
    _fake,
)
_backward = _dispatch.define(
    "sde_log_prob_backward(Tensor grad, Tensor x, Tensor v, Tensor y, Tensor rows,"
    " Tensor child_start, Tensor? h) -> Tensor",
    {
        "cuda": _cuda_backward,
        "triton": _triton_backward,
        "cpp": _cpp_backward,
        "reference": reference.sde_log_prob_backward,
    },
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
    return (None, _backward(grad_M, *ctx.saved_tensors), None, None, None, None)


_dispatch.register_autograd("sde_log_prob", _autograd, _setup_context)


F32, BF16 = torch.float32, torch.bfloat16


def _build(
    counts: tuple[int, ...] = (2, 0, 6, 1),
    num_elements: int = 2053,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    h: bool = False,
    strided: bool = False,
) -> testing.Inputs:
    shape, num_children = (len(counts), num_elements), sum(counts)
    rows = torch.tensor([[1.02, -0.11, 0.0, 0.37], [0.9, -0.2, 0.05 * h, 0.2]]).double()
    return {
        "x_ND": testing.normal(shape, dtypes[0], 0, strided),
        "v_ND": testing.normal(shape, dtypes[1], 1, strided),
        "y_MD": testing.normal((num_children, num_elements), F32, 2, strided),
        "rows_M4": rows[torch.arange(num_children) % 2],
        "child_start": testing.child_starts(counts),
        "h_ND": testing.normal(shape, dtypes[0], 3, strided) if h else None,
    }


SPEC = testing.OpSpec(
    name="sde_log_prob",
    op=sde_log_prob,
    reference=reference.sde_log_prob,
    build=_build,
    cases=(
        testing.Case("ragged children, one parent without", {}),
        testing.Case("multistep rows", {"h": True}),
        testing.Case("states bf16", {"dtypes": (BF16, F32), "h": True}),
        testing.Case("velocity bf16, as models give it", {"dtypes": (F32, BF16)}),
        testing.Case("not contiguous", {"strided": True}),
        testing.Case("one element, one parent, one child", {"counts": (1,), "num_elements": 1}),
        testing.Case("digits: 8 x 8 latents", {"counts": (4,) * 9, "num_elements": 64}),
        testing.Case("no children at all", {"counts": (0, 0)}),
        testing.Case("no parents", {"counts": ()}),
    ),
    num_bytes=lambda inputs: testing.num_bytes(
        inputs["x_ND"], inputs["v_ND"], inputs["y_MD"], inputs["h_ND"]
    ),
    results=("log_prob_M",),
    differentiable=("v_ND",),
)
