"""Grow all children of a wave in one pass over its parents."""

from typing import Any

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.noise import Noise
from branchcore.reference import BranchStep
from branchcore.reference.edges import wide


def branch_step(
    x_ND: Tensor,
    v_ND: Tensor,
    rows_M4: Tensor,
    child_start: Tensor,
    noise: Noise,
    h_ND: Tensor | None = None,
) -> BranchStep:
    """Grow all children of a wave: y = a x + b v + c h + s eps.

    Args:
        x_ND: (N, D) fp32 or bf16, parent states; differentiable, like v_ND and h_ND.
        v_ND: (N, D) fp32 or bf16, velocities at the parents.
        rows_M4: (M, 4) fp64, (a, b, c, s) of each child's step.
        child_start: (N + 1,) int64, children of n are rows child_start[n]:child_start[n + 1].
        noise: M draws; rows with s = 0 draw nothing.
        h_ND: (N, D) fp32 or bf16, x0 predictions of the parents' parents. None means that every c
            is 0, which is not checked.

    Returns:
        `BranchStep` of y_MD (M, D) and log_prob_M (M,), fp32; the latter in nats per latent
        element, mean(-eps^2 / 2) - log s - log(2 pi) / 2, and 0 where s = 0. It is a function of
        the noise only and has no gradient.

    Numerics: x and v are read once per parent, noise is made in registers; fp32 with a fixed order
        of sums: the same bits for any batch composition. All-fp64 input runs the reference in fp64.
    Source: the affine form of every Euler, SDE and multistep update of flow matching.
    """
    op = "branch_step"
    num_parents, num_elements = _check.matrix(op, "x_ND", x_ND)
    num_children = _check.length(op, "rows_M4", rows_M4)
    shape, device, states = (num_parents, num_elements), x_ND.device, _check.states(x_ND)
    _check.tensor(op, "x_ND", x_ND, shape, states, device)
    _check.tensor(op, "v_ND", v_ND, shape, states, device)
    _check.tensor(op, "rows_M4", rows_M4, (num_children, 4), _check.ROW, device)
    _check.tensor(op, "child_start", child_start, (num_parents + 1,), _check.INDEX, device)
    _check.noise(op, noise, num_children, device)
    if h_ND is not None:
        _check.tensor(op, "h_ND", h_ND, shape, states, device)
    return BranchStep(*_forward(x_ND, v_ND, h_ND, rows_M4, child_start, *noise))


def _cpp(*inputs: Any) -> tuple[Tensor, Tensor]:
    outputs = _fake(*inputs)
    _dispatch.native().branch_step(*inputs, *outputs)
    return outputs


def _cuda(*inputs: Any) -> tuple[Tensor, Tensor]:
    y_MD, log_prob_M = _fake(*inputs)
    states = (_dispatch.dense(state) for state in inputs[:3])
    rest = (value.contiguous() for value in inputs[3:])
    partials_MT = _dispatch.cuda_partials(len(y_MD), y_MD)
    _dispatch.cuda().branch_step(
        *states, *rest, y_MD, log_prob_M, partials_MT, *_dispatch.stream(y_MD)
    )
    return y_MD, log_prob_M


def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    outputs = _fake(*inputs)
    states = (_dispatch.dense(state) for state in inputs[:3])
    rest = (value.contiguous() for value in inputs[3:])
    _dispatch.triton_kernels("branch_step").branch_step_fwd(*states, *rest, *outputs)
    return outputs


def _reference(
    x_ND: Tensor,
    v_ND: Tensor,
    h_ND: Tensor | None,
    rows_M4: Tensor,
    child_start: Tensor,
    *noise: Tensor,
) -> tuple[Tensor, Tensor]:
    return reference.branch_step(x_ND, v_ND, rows_M4, child_start, Noise(*noise), h_ND)


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    x_ND, _, _, rows_M4, *_ = inputs
    y_MD = x_ND.new_empty(len(rows_M4), x_ND.shape[1], dtype=wide(x_ND.dtype))
    return y_MD, y_MD.new_empty(len(rows_M4))


def _cpp_backward(*inputs: Any) -> Tensor:
    grad_ND = _fake_backward(*inputs)
    _dispatch.native().branch_step_backward(*inputs[:3], grad_ND)
    return grad_ND


def _cuda_backward(*inputs: Any) -> Tensor:
    grad_ND = _fake_backward(*inputs)
    grad_y_MD, coefficient_M, child_start, _ = inputs
    _dispatch.cuda().branch_step_backward(
        _dispatch.dense(grad_y_MD),
        coefficient_M,
        child_start.contiguous(),
        grad_ND,
        *_dispatch.stream(grad_ND),
    )
    return grad_ND


def _triton_backward(*inputs: Any) -> Tensor:
    grad_ND = _fake_backward(*inputs)
    grad_y_MD, coefficient_M, child_start, _ = inputs
    _dispatch.triton_kernels("branch_step").branch_step_bwd(
        _dispatch.dense(grad_y_MD), coefficient_M, child_start.contiguous(), grad_ND
    )
    return grad_ND


def _fake_backward(*inputs: Any) -> Tensor:
    grad_y_MD, _, child_start, dtype = inputs
    return grad_y_MD.new_empty(len(child_start) - 1, grad_y_MD.shape[1], dtype=dtype)


_forward = _dispatch.define(
    "branch_step(Tensor x, Tensor v, Tensor? h, Tensor rows, Tensor child_start, Tensor key,"
    " Tensor counter, Tensor mix) -> (Tensor, Tensor)",
    {"cuda": _cuda, "triton": _triton, "cpp": _cpp, "reference": _reference},
    _fake,
)
_backward = _dispatch.define(
    "branch_step_backward(Tensor grad_y, Tensor coefficient, Tensor child_start, ScalarType dtype)"
    " -> Tensor",
    {
        "cuda": _cuda_backward,
        "triton": _triton_backward,
        "cpp": _cpp_backward,
        "reference": reference.branch_step_backward,
    },
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *states, rows_M4, child_start, _, _, _ = inputs
    ctx.save_for_backward(rows_M4, child_start)
    ctx.dtypes = [None if state is None else state.dtype for state in states]
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_y_MD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    rows_M4, child_start = ctx.saved_tensors
    grads = (
        _backward(grad_y_MD, rows_M4[:, column], child_start, ctx.dtypes[column])
        if ctx.needs_input_grad[column]
        else None
        for column in range(3)
    )
    return (*grads, *[None] * 5)


_dispatch.register_autograd("branch_step", _autograd, _setup_context)


F32, BF16 = torch.float32, torch.bfloat16


def _build(
    counts: tuple[int, ...] = (2, 0, 6, 1),
    num_elements: int = 2053,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
    kinds: tuple[str, ...] = testing.KINDS,
    strided: bool = False,
) -> testing.Inputs:
    shape = (len(counts), num_elements)
    # an SDE step, a multistep SDE step, an ODE step: the last draws nothing
    rows = torch.tensor([[1.02, -0.11, 0.0, 0.37], [0.9, -0.2, 0.05, 0.2], [1.0, -0.1, 0.0, 0.0]])
    states = [testing.normal(shape, t, seed, strided) for seed, t in enumerate(dtypes)]
    return {
        "x_ND": states[0],
        "v_ND": states[1],
        "rows_M4": rows.double()[torch.arange(sum(counts)) % 3],
        "child_start": testing.child_starts(counts),
        "noise": testing.draws(counts, kinds),
        "h_ND": states[2],
    }


def _num_bytes(inputs: testing.Inputs) -> int:
    states = (inputs["x_ND"], inputs["v_ND"], inputs["h_ND"])
    return testing.num_bytes(*states) + 4 * len(inputs["rows_M4"]) * states[0].shape[1]


SPEC = testing.OpSpec(
    name="branch_step",
    op=branch_step,
    reference=reference.branch_step,
    build=_build,
    cases=(
        testing.Case("ragged children, one parent without, every kind of draw and row", {}),
        testing.Case("states bf16, velocity fp32", {"dtypes": (BF16, F32, BF16)}),
        testing.Case("velocity bf16, as models give it", {"dtypes": (F32, BF16, F32)}),
        testing.Case("not contiguous", {"strided": True, "dtypes": (F32, BF16, F32)}),
        testing.Case("one element, one parent, one child", {"counts": (1,), "num_elements": 1}),
        testing.Case("digits: 8 x 8 latents", {"counts": (4,) * 9, "num_elements": 64}),
        testing.Case("no children at all", {"counts": (0, 0)}),
        testing.Case("no parents", {"counts": ()}),
        testing.Case("plain own noise only", {"kinds": ("own",), "num_elements": 4096}),
    ),
    num_bytes=_num_bytes,
    differentiable=("x_ND", "v_ND", "h_ND"),
    # sine and cosine to 2^-21: at most 3.3 with errors of that size and the worst signs
    gpu_factor=4.0,
)
