"""RMSNorm of queries and keys with rotary embedding, as the attention of a diffusion model has it.

Letters: B samples, S tokens, H heads, D channels of a head.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.reference import QKNormRope
from branchcore.reference.edges import wide

Pairs = Literal["interleaved", "halves"]
MAX_CHANNELS = 1024
_OP = "qk_norm_rope"


def qk_norm_rope(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_SD: Tensor | None = None,
    sin_SD: Tensor | None = None,
    *,
    eps: float = 1e-6,
    pairs: Pairs = "interleaved",
) -> QKNormRope:
    """Normalise queries and keys by their root mean square and rotate them by position.

    Args:
        q_BSHD: (B, S, H, D) fp32 or bf16, D at most 1,024; a view of a fused projection is not
            copied as long as the channels of a head lie next to each other.
        k_BSHD: the same dtype and shape, but for its own number of heads.
        q_weight: (D,) for a norm per head (FLUX, Qwen-Image, SD3.5), or (H D,) for one across all
            channels of a token (Wan); fp32 or bf16.
        k_weight: the same for the keys.
        cos_SD: (S, D) fp32, cosine at each token's position, for both channels of a pair; even D.
            None for a norm without rotation (SD3.5).
        sin_SD: (S, D) fp32, its sine. Neither has a gradient.
        eps: added to the mean square, positive.
        pairs: which channels rotate together: "interleaved" for (2i, 2i + 1) (FLUX; Wan's and
            Qwen-Image's complex numbers), "halves" for (i, i + D/2).

    Returns:
        QKNormRope(q_BSHD, k_BSHD), contiguous, in the dtype of q_BSHD.

    Numerics: fp32 throughout and one rounding at the end; libraries round two or three times. A
        token's bits and those of its gradient do not depend on the batch. All-fp64 input runs the
        reference in fp64.
    Source: FluxAttnProcessor, WanAttnProcessor, apply_rotary_emb of diffusers 0.42.
    """
    _check_states(q_BSHD, k_BSHD)
    _check_weights(q_BSHD, k_BSHD, q_weight, k_weight)
    _check_tables(q_BSHD, cos_SD, sin_SD)
    _check.positive(_OP, "eps", eps)
    if pairs not in ("interleaved", "halves"):
        raise ValueError(f"{_OP}: pairs must be 'interleaved' or 'halves', got {pairs!r}")
    return QKNormRope(*_forward(q_BSHD, k_BSHD, q_weight, k_weight, cos_SD, sin_SD, eps, pairs))


def _check_states(q_BSHD: Tensor, k_BSHD: Tensor) -> None:
    for name, value in (("q_BSHD", q_BSHD), ("k_BSHD", k_BSHD)):
        _check.length(_OP, name, value)
        if value.dim() != 4 or value.shape[2] == 0 or not 0 < value.shape[3] <= MAX_CHANNELS:
            raise ValueError(
                f"{_OP}: {name} must be (B, S, H, D) with H >= 1 and 1 <= D <= {MAX_CHANNELS}, "
                f"got {tuple(value.shape)}; try unflatten(-1, (H, D))"
            )
    _check.tensor(_OP, "q_BSHD", q_BSHD, q_BSHD.shape, _check.states(q_BSHD), q_BSHD.device)
    shape = (*q_BSHD.shape[:2], k_BSHD.shape[2], q_BSHD.shape[3])
    _check.tensor(_OP, "k_BSHD", k_BSHD, shape, (q_BSHD.dtype,), q_BSHD.device)


def _check_weights(q_BSHD: Tensor, k_BSHD: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    states, device, num_channels = _check.states(q_BSHD), q_BSHD.device, q_BSHD.shape[3]
    lengths = [q_BSHD.shape[2] * num_channels, k_BSHD.shape[2] * num_channels]
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    for (name, weight), length in zip(weights.items(), lengths, strict=True):
        if _check.length(_OP, name, weight) not in (num_channels, length) or weight.dim() != 1:
            raise ValueError(
                f"{_OP}: {name} must be (D,) with D={num_channels} or (H D,) with H D={length}, "
                f"got {tuple(weight.shape)}"
            )
        _check.tensor(_OP, name, weight, weight.shape, states, device)
    found = [len(q_weight), len(k_weight)]
    if found not in ([num_channels] * 2, lengths):
        raise ValueError(f"{_OP}: weights must be both (D,) or both (H D,), got {found}")


def _check_tables(q_BSHD: Tensor, cos_SD: Tensor | None, sin_SD: Tensor | None) -> None:
    if cos_SD is None and sin_SD is None:
        return
    _, num_positions, _, num_channels = q_BSHD.shape
    if num_channels % 2:
        raise ValueError(
            f"{_OP}: q_BSHD must be (B, S, H, D) with an even D to be rotated, got "
            f"{tuple(q_BSHD.shape)}"
        )
    shape, dtypes = (num_positions, num_channels), (wide(q_BSHD.dtype),)
    for name, table in (("cos_SD", cos_SD), ("sin_SD", sin_SD)):
        _check.tensor(_OP, name, table, shape, dtypes, q_BSHD.device)


def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    (q_BSHD, k_BSHD, *tables), options, outputs = inputs[:6], inputs[6:], _fake(*inputs)
    _dispatch.triton_kernels(_OP).qk_norm_rope_fwd(
        *map(_dispatch.dense, (q_BSHD, k_BSHD)), *map(_flat, tables), *options, *outputs
    )
    return outputs


def _flat(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _cpp(*inputs: Any) -> tuple[Tensor, Tensor]:
    q_BSHD, k_BSHD, q_weight, k_weight, cos_SD, sin_SD, eps, pairs = inputs
    outputs, options = _fake(*inputs), (q_BSHD.shape[3], eps, pairs == "halves")
    for x_BSHD, weight, out in zip((q_BSHD, k_BSHD), (q_weight, k_weight), outputs, strict=True):
        _dispatch.native().qk_norm_rope(
            _rows(x_BSHD), weight[None], cos_SD, sin_SD, *options, _rows(out)
        )
    return outputs


def _rows(x_BSHD: Tensor) -> Tensor:
    """Give tokens as rows of all their channels."""
    num_samples, num_positions, num_heads, num_channels = x_BSHD.shape
    return x_BSHD.reshape(num_samples * num_positions, num_heads * num_channels)


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q_BSHD, k_BSHD = inputs[:2]
    return q_BSHD.new_empty(q_BSHD.shape), k_BSHD.new_empty(k_BSHD.shape)


def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    grad_BSHD, x_BSHD, weight, cos_SD, sin_SD, eps, pairs, with_weight = inputs
    dx_BSHD, dweight = _fake_backward(*inputs)
    _dispatch.triton_kernels(_OP).qk_norm_rope_bwd(
        *map(_dispatch.dense, (grad_BSHD, x_BSHD)),
        *map(_flat, (weight, cos_SD, sin_SD)),
        *(eps, pairs, dx_BSHD, dweight if with_weight else None),
    )
    return dx_BSHD, dweight


def _cpp_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    grad_BSHD, x_BSHD, weight, cos_SD, sin_SD, eps, pairs, with_weight = inputs
    dx_BSHD, dweight = _fake_backward(*inputs)
    _dispatch.native().qk_norm_rope_backward(
        *(_rows(grad_BSHD), _rows(x_BSHD), weight[None], cos_SD, sin_SD),
        *(x_BSHD.shape[3], eps, pairs == "halves"),
        *(_rows(dx_BSHD), dweight[None] if with_weight else None),
    )
    return dx_BSHD, dweight


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    _, x_BSHD, weight, *_, with_weight = inputs
    return x_BSHD.new_empty(x_BSHD.shape), weight.new_empty(len(weight) if with_weight else 0)


_forward = _dispatch.define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin,"
    " float eps, str pairs) -> (Tensor, Tensor)",
    {"triton": _triton, "cpp": _cpp, "reference": reference.qk_norm_rope},
    _fake,
)
_backward = _dispatch.define(
    "qk_norm_rope_backward(Tensor grad, Tensor x, Tensor weight, Tensor? cos, Tensor? sin,"
    " float eps, str pairs, bool with_weight) -> (Tensor, Tensor)",
    {
        "triton": _triton_backward,
        "cpp": _cpp_backward,
        "reference": reference.qk_norm_rope_backward,
    },
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    *tensors, ctx.eps, ctx.pairs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # a checkpointed block unpacks them once only
    states, weights, tables = (saved[i : i + 2] for i in (0, 2, 4))
    found: list[Tensor | None] = [None] * 8
    for i, grad_BSHD in enumerate(grads):
        # a frozen weight, as under LoRA, costs no partial sums
        need, need_weight = ctx.needs_input_grad[i], ctx.needs_input_grad[i + 2]
        if grad_BSHD is not None and (need or need_weight):
            found[i], dweight = _backward(
                grad_BSHD, states[i], weights[i], *tables, ctx.eps, ctx.pairs, need_weight
            )
            found[i + 2] = dweight if need_weight else None
    return tuple(found)


_dispatch.register_autograd(_OP, _autograd, _setup_context)


F32, BF16 = torch.float32, torch.bfloat16


def _build(
    sizes: tuple[int, int] = (2, 5),
    heads: tuple[int, int] = (3, 3),
    num_channels: int = 64,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    across: bool = False,
    rope: bool = True,
    pairs: Pairs = "interleaved",
    layout: str = "fused",
    eps: float = 1e-6,
) -> testing.Inputs:
    q_BSHD, k_BSHD = _states(sizes, heads, num_channels, dtypes[0], layout)
    lengths = [num * num_channels if across else num_channels for num in heads]
    weights = [1.0 + 0.2 * testing.normal((n,), seed=5 + i) for i, n in enumerate(lengths)]
    # no two channels share a cosine: whatever a table says is applied
    tables = [testing.normal((sizes[1], num_channels), seed=seed) for seed in (3, 4)]
    return {
        "q_BSHD": q_BSHD,
        "k_BSHD": k_BSHD,
        "q_weight": weights[0].to(dtypes[1]),
        "k_weight": weights[1].to(dtypes[1]),
        "cos_SD": tables[0] if rope else None,
        "sin_SD": tables[1] if rope else None,
        "eps": eps,
        "pairs": pairs,
    }


def _states(
    sizes: tuple[int, ...], heads: tuple[int, ...], channels: int, dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor]:
    """Draw queries and keys as views of a fused projection, heads first, or with gaps."""
    if layout == "fused":
        lengths = [num * channels for num in (*heads, heads[1])]
        q, k, _ = testing.normal((*sizes, sum(lengths)), dtype).split(lengths, dim=-1)
        return q.unflatten(-1, (-1, channels)), k.unflatten(-1, (-1, channels))
    shapes = [(sizes[0], num, sizes[1], channels) for num in heads]
    strided = layout == "gaps"
    q, k = (testing.normal(shape, dtype, seed, strided) for seed, shape in enumerate(shapes))
    return q.transpose(1, 2), k.transpose(1, 2)


def _samples(inputs: testing.Inputs) -> Iterator[testing.Part]:
    for sample in range(len(inputs["q_BSHD"])):
        rows = slice(sample, sample + 1)
        states = {name: inputs[name][rows] for name in ("q_BSHD", "k_BSHD")}
        yield testing.Part({**inputs, **states}, {"B": rows})


SPEC = testing.OpSpec(
    name=_OP,
    op=qk_norm_rope,
    reference=reference.qk_norm_rope,
    build=_build,
    cases=(
        testing.Case("views of a fused projection", {}),
        testing.Case("FLUX: bf16, 128 channels", {"num_channels": 128, "dtypes": (BF16, BF16)}),
        testing.Case(
            "Wan: across all channels, weights fp32",
            {"across": True, "dtypes": (BF16, F32), "heads": (5, 5), "sizes": (2, 3)},
        ),
        testing.Case(
            "across, several tokens to a partial sum",
            {"across": True, "num_channels": 4, "sizes": (1, 9)},
        ),
        testing.Case("SD3.5: no rotation", {"rope": False, "dtypes": (BF16, F32)}),
        testing.Case("halves", {"pairs": "halves"}),
        testing.Case("halves across", {"pairs": "halves", "across": True, "dtypes": (BF16, F32)}),
        testing.Case("fewer heads of k", {"heads": (6, 2), "dtypes": (BF16, F32)}),
        testing.Case("fewer heads of k, across", {"heads": (6, 2), "across": True}),
        testing.Case("6 channels", {"num_channels": 6, "heads": (5, 5)}),
        testing.Case("10 channels, halves", {"num_channels": 10, "pairs": "halves"}),
        testing.Case("odd channels, no rotation", {"num_channels": 7, "rope": False}),
        testing.Case(
            "odd channels in halves, no rotation",
            {"num_channels": 7, "rope": False, "pairs": "halves"},
        ),
        testing.Case("heads first in memory", {"layout": "heads first"}),
        testing.Case("gaps between channels", {"layout": "gaps", "dtypes": (BF16, F32)}),
        testing.Case(
            # a single number over its own size has no derivative but through eps
            "one of everything",
            {"sizes": (1, 1), "heads": (1, 1), "num_channels": 1, "rope": False, "eps": 0.5},
        ),
        testing.Case("no samples", {"sizes": (0, 3)}),
        testing.Case("no tokens", {"sizes": (2, 0)}),
    ),
    num_bytes=lambda inputs: 2 * testing.num_bytes(inputs["q_BSHD"], inputs["k_BSHD"]),
    differentiable=("q_BSHD", "k_BSHD", "q_weight", "k_weight"),
    parts=_samples,
    large={"sizes": (4, 300)},
)
