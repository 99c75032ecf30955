"""Everything between two sublayers of a diffusion transformer's block, in one pass."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.reference import GateNormModulate
from branchcore.reference.edges import wide
from branchcore.reference.gate_norm_modulate import BackwardInputs, moments

Norm = Literal["layer", "rms"]


def gate_norm_modulate(
    x_BSC: Tensor,
    scale_RC: Tensor | None,
    shift_RC: Tensor | None,
    row_B: Tensor,
    *,
    y_BSC: Tensor | None = None,
    gate_RC: Tensor | None = None,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> GateNormModulate:
    """Add a gated branch to the residual stream, normalise it over the channels, and modulate.

    r = x + gate y, out = (norm(r) weight + bias) (1 + scale) + shift, where each sample takes its
    row of the tables: nodes of a tree that share a prompt and a noise level share a row. What is
    None is left out.

    Args:
        x_BSC: (B, S, C) fp32 or bf16, the residual stream; a view of a joint sequence is not copied
            on a GPU as long as the channels of a token lie next to each other. Differentiable, like
            all that follows but row_B.
        scale_RC: (R, C) fp32 or bf16; None in the cross attention of Wan.
        shift_RC: (R, C) fp32 or bf16; None in blocks with RMSNorm (Lumina 2, Mochi).
        row_B: (B,) int64, row of each sample, from 0 to R - 1; on a GPU that is not checked.
        y_BSC: (B, S, C) fp32 or bf16, output of the sublayer; None before the first one.
        gate_RC: (R, C) fp32 or bf16, only with y_BSC; None behind the cross attention of Wan.
        weight_C: (C,) fp32 or bf16, of the norm.
        bias_C: (C,) fp32 or bf16, of a LayerNorm.
        norm: "layer" subtracts the mean, "rms" does not.
        eps: added to the variance or to the mean square.

    Returns:
        `GateNormModulate` of residual_BSC, which is x_BSC itself without y_BSC, and out_BSC, both
        in the dtype of x_BSC.

    Numerics: fp32 throughout; r is rounded to the dtype of x_BSC and out is the norm of the rounded
        r, so that a later recomputation from r agrees. A token's bits, and those of a row's
        gradients, do not depend on the rest of the batch; weight and bias sum over all of it. Mean
        and 1 / sqrt(variance + eps) are kept for the backward: 8 bytes per token against 2 C per
        tensor, and they save two reductions per token. y_BSC is kept only for a gate with a
        gradient. All-fp64 input runs the reference in fp64.
    Raises:
        NotImplementedError: the Triton kernels hold at most C = 6,144.
    Source: the blocks of SD3, FLUX, Qwen-Image and Wan in diffusers 0.42; Wan's rounds as here, the
        others also round the norm and its product with 1 + scale.
    """
    _check_states(x_BSC, y_BSC)
    _check_tables(x_BSC, {"scale_RC": scale_RC, "shift_RC": shift_RC, "gate_RC": gate_RC}, row_B)
    _check_affine(x_BSC, weight_C, bias_C, norm)
    _check.positive(_OP, "eps", eps)
    if y_BSC is None and gate_RC is not None:
        raise ValueError(f"{_OP}: gate_RC must be None without y_BSC, got a tensor")
    tables = scale_RC, shift_RC, row_B, y_BSC, gate_RC, weight_C, bias_C
    residual_BSC, out_BSC, _ = _forward(x_BSC, *tables, norm == "layer", eps)
    return GateNormModulate(x_BSC if y_BSC is None else residual_BSC, out_BSC)


_OP = "gate_norm_modulate"


def _check_states(x_BSC: Tensor, y_BSC: Tensor | None) -> None:
    _check.length(_OP, "x_BSC", x_BSC)
    if x_BSC.dim() != 3:
        raise ValueError(f"{_OP}: x_BSC must be (B, S, C), got {tuple(x_BSC.shape)}")
    states, shape = _check.states(x_BSC), tuple(x_BSC.shape)
    _check.tensor(_OP, "x_BSC", x_BSC, shape, states, x_BSC.device)
    if y_BSC is not None:
        _check.tensor(_OP, "y_BSC", y_BSC, shape, states, x_BSC.device)


def _check_tables(x_BSC: Tensor, tables: dict[str, Tensor | None], row_B: Tensor) -> None:
    (num_samples, _, num_channels), device = x_BSC.shape, x_BSC.device
    _check.tensor(_OP, "row_B", row_B, (num_samples,), _check.INDEX, device)
    given = {name: table for name, table in tables.items() if table is not None}
    if not given:
        raise ValueError(
            f"{_OP}: one of {', '.join(tables)} must be a tensor, got None for all; "
            "try torch.nn.functional.layer_norm or rms_norm"
        )
    num_rows = _check.length(_OP, *next(iter(given.items())))
    for name, table in given.items():
        _check.tensor(_OP, name, table, (num_rows, num_channels), _check.states(x_BSC), device)


def _check_affine(x_BSC: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, norm: str) -> None:
    for name, value in (("weight_C", weight_C), ("bias_C", bias_C)):
        if value is not None:
            shape, states = (x_BSC.shape[2],), _check.states(x_BSC)
            _check.tensor(_OP, name, value, shape, states, x_BSC.device)
    if norm not in ("layer", "rms"):
        raise ValueError(f"{_OP}: norm must be 'layer' or 'rms', got {norm!r}")
    if norm == "rms" and bias_C is not None:
        raise ValueError(f"{_OP}: bias_C must be None with norm='rms', got a tensor")


def _reference(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_BSC, scale_RC, shift_RC, row_B, y_BSC, gate_RC, weight_C, bias_C, centred, eps = inputs
    residual_BSC, out_BSC = reference.gate_norm_modulate(
        *(x_BSC, scale_RC, shift_RC, row_B),
        y_BSC=y_BSC,
        gate_RC=gate_RC,
        weight_C=weight_C,
        bias_C=bias_C,
        norm="layer" if centred else "rms",
        eps=eps,
    )
    moments_2BS = moments(residual_BSC, centred, eps)
    return (x_BSC.new_empty(0) if y_BSC is None else residual_BSC), out_BSC, moments_2BS


def _triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, centred, eps = inputs
    outputs = _fake(*inputs)
    _dispatch.triton_kernels(_OP).gate_norm_modulate_fwd(
        *map(_dispatch.dense, tensors), centred, eps, *_written(inputs, outputs)
    )
    return outputs


def _cpp(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, centred, eps = inputs
    outputs = _fake(*inputs)
    *states, moments_2BS = _written(inputs, outputs)
    _dispatch.native().gate_norm_modulate(
        *map(_matrix, tensors), centred, eps, *map(_matrix, states), moments_2BS.flatten(1)
    )
    return outputs


def _written(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
    """Take the residual stream out where it is x: an op may not return its input."""
    return outputs if inputs[4] is not None else (None, *outputs[1:])


def _matrix(tensor: Tensor | None) -> Tensor | None:
    """Give tokens as rows, and a weight of the norm as the only row; row_B stays a vector."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_BSC, y_BSC = inputs[0], inputs[4]
    return (
        x_BSC.new_empty(0 if y_BSC is None else x_BSC.shape),
        x_BSC.new_empty(x_BSC.shape),
        x_BSC.new_empty((2, *x_BSC.shape[:2]), dtype=wide(x_BSC.dtype)),
    )


def _triton_backward(*inputs: Any) -> tuple[Tensor, ...]:
    i, grads = BackwardInputs(*inputs), _fake_backward(*inputs)
    tensors = *i[:6], i.row_B, i.gate_RC, i.weight_C, i.bias_C
    _dispatch.triton_kernels(_OP).gate_norm_modulate_bwd(
        *map(_dispatch.dense, tensors), i.centred, *_wanted(i, grads)
    )
    return grads


def _cpp_backward(*inputs: Any) -> tuple[Tensor, ...]:
    i, grads = BackwardInputs(*inputs), _fake_backward(*inputs)
    tensors = *i[:4], i.moments_2BS.flatten(1), i.scale_RC, i.row_B, i.gate_RC, i.weight_C, i.bias_C
    _dispatch.native().gate_norm_modulate_backward(
        *map(_matrix, tensors), i.centred, *map(_matrix, _wanted(i, grads))
    )
    return grads


def _wanted(i: BackwardInputs, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    likes = i.residual_BSC, i.gate_RC, *i.reduced()
    return tuple(None if t is None else grad for t, grad in zip(likes, grads, strict=True))


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    i = BackwardInputs(*inputs)
    new, shape = i.residual_BSC.new_empty, i.residual_BSC.shape
    dy_BSC = new(0 if i.gate_RC is None else shape, dtype=i.y_dtype)
    return new(shape), dy_BSC, *(new(0) if t is None else t.new_empty(t.shape) for t in i.reduced())


_forward = _dispatch.define(
    "gate_norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor row, Tensor? y,"
    " Tensor? gate, Tensor? weight, Tensor? bias, bool centred, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    {"triton": _triton, "cpp": _cpp, "reference": _reference},
    _fake,
)
_backward = _dispatch.define(
    "gate_norm_modulate_backward(Tensor grad_out, Tensor? grad_residual, Tensor residual,"
    " Tensor? y, Tensor moments, Tensor? scale, Tensor? shift, Tensor row, Tensor? gate,"
    " Tensor? weight, Tensor? bias, ScalarType y_dtype, bool reduce, bool centred)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "triton": _triton_backward,
        "cpp": _cpp_backward,
        "reference": reference.gate_norm_modulate_backward,
    },
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BSC, scale_RC, shift_RC, row_B, y_BSC, gate_RC, *affine, ctx.centred, _ = inputs
    residual_BSC, _, moments_2BS = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(moments_2BS)
    ctx.y_dtype = None if y_BSC is None else y_BSC.dtype
    kept_BSC = y_BSC if ctx.needs_input_grad[5] else None
    ctx.save_for_backward(
        *(x_BSC if y_BSC is None else residual_BSC, kept_BSC, moments_2BS),
        *(scale_RC, shift_RC, row_B, gate_RC, *affine),
    )


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad_residual_BSC, grad_out_BSC, _), saved = grads, ctx.saved_tensors
    if grad_out_BSC is None:
        grad_out_BSC = torch.zeros_like(saved[0])
    if ctx.y_dtype is None:
        grad_residual_BSC = None
    reduce = any(ctx.needs_input_grad[i] for i in (1, 2, 5, 6, 7))
    y_dtype = ctx.y_dtype or saved[0].dtype
    found = _backward(grad_out_BSC, grad_residual_BSC, *saved, y_dtype, reduce, ctx.centred)
    dx_BSC, dy_BSC, *tables = found
    if ctx.y_dtype is not None and saved[6] is None:
        dy_BSC = dx_BSC.to(ctx.y_dtype)
    scale, shift, gate, weight, bias = tables
    found = dx_BSC, scale, shift, None, dy_BSC, gate, weight, bias, None, None
    return tuple(
        grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=True)
    )


_dispatch.register_autograd(_OP, _autograd, _setup_context)


F32, BF16 = torch.float32, torch.bfloat16
_TABLES = "scale_RC", "shift_RC", "gate_RC"
_AFFINE = "weight_C", "bias_C"
_WIDE = {"counts": (1,), "num_tokens": 2, "num_elements": 5003}
_BF16, _WAN = {"dtypes": (BF16, BF16, BF16)}, {"dtypes": (BF16, BF16, F32)}


def _build(
    counts: tuple[int, ...] = (2, 0, 3),
    num_elements: int = 160,
    num_tokens: int = 5,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
    absent: tuple[str, ...] = _AFFINE,
    norm: Norm = "layer",
    strided: bool = False,
    offset: float = 0.0,
) -> testing.Inputs:
    """Make counts[r] samples of row r, in any order; dtypes of x, of y, of all else."""
    row_B = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    row_B = row_B[testing.normal(row_B.shape, seed=7).argsort()]
    states, table = (len(row_B), num_tokens, num_elements), (len(counts), num_elements)
    shapes = {"x_BSC": states, "y_BSC": states, **dict.fromkeys(_TABLES, table)}
    shapes |= dict.fromkeys(_AFFINE, table[1:])
    inputs: testing.Inputs = {
        name: testing.normal(shape, (*dtypes, *dtypes[2:] * 4)[i], i, strided)
        for i, (name, shape) in enumerate(shapes.items())
    }
    inputs["x_BSC"] = inputs["x_BSC"] + offset
    if strided:
        # part of a joint sequence, as attention gives it
        inputs["x_BSC"] = torch.cat([inputs["x_BSC"]] * 2, dim=1)[:, :num_tokens]
    return inputs | {"row_B": row_B, "norm": norm} | dict.fromkeys(absent)


def _parts(inputs: testing.Inputs) -> Iterator[testing.Part]:
    """Cut a call into its samples, then into its rows with all of their samples."""
    row_B = inputs["row_B"]
    for sample in range(len(row_B)):
        where = slice(sample, sample + 1)
        yield testing.Part(_cut(inputs, where, ("x_BSC", "y_BSC", "row_B")), {"B": where})
    for row in range(len(next(inputs[name] for name in _TABLES if inputs[name] is not None))):
        where = slice(row, row + 1)
        own = _cut(_cut(inputs, row_B == row, ("x_BSC", "y_BSC", "row_B")), where, _TABLES)
        yield testing.Part(own | {"row_B": torch.zeros_like(own["row_B"])}, {"R": where})


def _cut(inputs: testing.Inputs, where: Any, names: tuple[str, ...]) -> testing.Inputs:
    return inputs | {n: None if inputs[n] is None else inputs[n][where] for n in names}


SPEC = testing.OpSpec(
    name=_OP,
    op=gate_norm_modulate,
    reference=reference.gate_norm_modulate,
    build=_build,
    cases=(
        testing.Case("rows shared, one unused", {}),
        testing.Case("bf16, as SD3 and FLUX", _BF16),
        testing.Case("tables fp32, as Wan", _WAN),
        testing.Case("before Wan's cross attention", {**_WAN, "absent": _TABLES[:2]}),
        testing.Case("behind Wan's cross attention", {**_WAN, "absent": (*_AFFINE, "gate_RC")}),
        testing.Case("no branch", {"absent": (*_AFFINE, "y_BSC", "gate_RC")}),
        testing.Case("as Lumina 2", {"norm": "rms", "absent": ("shift_RC", "bias_C")}),
        testing.Case("all of it", {"absent": (), "num_elements": 77, "dtypes": (F32, BF16, BF16)}),
        testing.Case("ragged tiles", {"counts": (1, 2), "num_tokens": 37, "num_elements": 24}),
        testing.Case("wide", {**_WIDE, "absent": ("weight_C",)}),
        testing.Case("wide, no branch", {**_WIDE, "absent": (*_AFFINE, "y_BSC", "gate_RC")}),
        testing.Case("a mean of many deviations", {"offset": 100.0}),
        testing.Case("not contiguous", {"strided": True, "absent": ()}),
        testing.Case("one of each", {"counts": (1,), "num_tokens": 1, "num_elements": 1}),
        testing.Case("no tokens", {"num_tokens": 0}),
        testing.Case("no samples", {"counts": (0, 0)}),
    ),
    num_bytes=lambda inputs: 2 * testing.num_bytes(inputs["x_BSC"], inputs["y_BSC"]),
    differentiable=("x_BSC", "y_BSC", *_TABLES, *_AFFINE),
    parts=_parts,
    large={"counts": (2, 2), "num_elements": 512, "num_tokens": 64},
)
