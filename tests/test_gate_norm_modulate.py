"""What conformance does not cover: the blocks of diffusers, shared rows, what is kept, messages."""

from typing import Any

import pytest
import torch
from implementations import HERE, Implementation
from torch import Tensor

from branchcore import _dispatch, ops, testing
from branchcore.ops.gate_norm_modulate import SPEC

COMPILED = [each for each in HERE if each.implementation in ("triton", "cpp")]
compiled = pytest.mark.parametrize("each", COMPILED, ids=lambda each: each.name)
B, S, C = 3, 5, 64


class Watch(dict[str, Any]):
    """Inputs and outputs of a block's modules, by name, as the block calls them."""

    def __init__(self, block: torch.nn.Module) -> None:
        for name, module in block.named_modules():
            module.register_forward_hook(self.keep(name), with_kwargs=True)

    def keep(self, name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self[f"{name} in"] = args[0] if args else kwargs["hidden_states"]
            self[name] = output

        return hook


def shared(*tables: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Samples 0 and 2 were given the same conditioning: keep the rows of 0 and 1 only."""
    assert all(torch.equal(table[0], table[2]) for table in tables)
    return tuple(table[:2] for table in tables), torch.tensor([0, 1, 0])


def states(seed: int, dtype: torch.dtype = torch.float64, tokens: int = S) -> Tensor:
    return testing.normal((B, tokens, C), dtype, seed)


def conditioning(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return testing.normal((2, C), dtype, seed)[torch.tensor([0, 1, 0])]


def test_sd3_block() -> None:
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.JointTransformerBlock(C, 4, C // 4).double()
    seen = Watch(block)
    x_BSC = states(0)
    with torch.no_grad():
        block(x_BSC, states(1, tokens=3), conditioning(2))
    (shift, scale, gate, shift_2, scale_2, _), row_B = shared(*seen["norm1.linear"].chunk(6, dim=1))
    first = ops.gate_norm_modulate(x_BSC, scale, shift, row_B)
    assert first.residual_BSC is x_BSC
    torch.testing.assert_close(first.out_BSC, seen["norm1"][0])
    second = ops.gate_norm_modulate(
        x_BSC, scale_2, shift_2, row_B, y_BSC=seen["attn"][0], gate_RC=gate
    )
    torch.testing.assert_close(second.residual_BSC, seen["norm2 in"])
    torch.testing.assert_close(second.out_BSC, seen["ff in"])


def test_flux_block() -> None:
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    block = flux.FluxTransformerBlock(C, 4, C // 4).double()
    seen = Watch(block)
    x_BSC = states(0)
    with torch.no_grad():
        block(x_BSC, states(1, tokens=3), conditioning(2))
    (gate, shift, scale), row_B = shared(*seen["norm1"][1:4])
    found = ops.gate_norm_modulate(x_BSC, scale, shift, row_B, y_BSC=seen["attn"][0], gate_RC=gate)
    torch.testing.assert_close(found.residual_BSC, seen["norm2 in"])
    torch.testing.assert_close(found.out_BSC, seen["ff in"])


def test_wan_block_in_bf16() -> None:
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    block = wan.WanTransformerBlock(C, 2 * C, 4, cross_attn_norm=True)
    block.norm2.weight.data = 1.0 + testing.normal((C,), seed=3)
    block.norm2.bias.data = testing.normal((C,), seed=4)
    dtype = torch.bfloat16
    for part in (block.attn1, block.attn2, block.ffn):
        part.to(dtype)
    seen = Watch(block)
    x_BSC = states(0, dtype)
    temb = testing.normal((2, 6, C), seed=2)[torch.tensor([0, 1, 0])]
    with torch.no_grad():
        block(x_BSC, states(1, dtype, tokens=3), temb, None)
    tables = (block.scale_shift_table.detach() + temb).unbind(1)
    (_, _, gate, shift, scale, _), row_B = shared(*tables)
    affine = {"weight_C": block.norm2.weight.detach(), "bias_C": block.norm2.bias.detach()}
    # the same order of the same roundings up to the norm itself
    with _dispatch.use("reference"):
        before = ops.gate_norm_modulate(
            x_BSC, None, None, row_B, y_BSC=seen["attn1"], gate_RC=gate, **affine
        )
        behind = ops.gate_norm_modulate(
            before.residual_BSC, scale, shift, row_B, y_BSC=seen["attn2"]
        )
    assert torch.equal(before.residual_BSC.float(), seen["norm2 in"])
    assert torch.equal(behind.residual_BSC.float(), seen["norm3 in"])
    for found, wanted in ((before, "attn2 in"), (behind, "ffn in")):
        torch.testing.assert_close(
            found.out_BSC, seen[wanted], rtol=torch.finfo(dtype).eps, atol=1e-6
        )


def test_lumina_2_block() -> None:
    lumina = pytest.importorskip("diffusers.models.transformers.transformer_lumina2")
    block = lumina.Lumina2TransformerBlock(C, 4, 2, 16, 1.0, 1e-5).double()
    block.ffn_norm1.weight.data = 1.0 + testing.normal((C,), torch.float64, 3)
    seen = Watch(block)
    x_BSC, turn = states(0), torch.ones(B, S, C // 8, dtype=torch.complex128)
    with torch.no_grad():
        block(x_BSC, None, turn, conditioning(2))
    (gate, scale), row_B = shared(*seen["norm1"][1:3])
    found = ops.gate_norm_modulate(
        *(x_BSC, scale, None, row_B),
        y_BSC=seen["norm2"],
        gate_RC=gate.tanh(),
        weight_C=block.ffn_norm1.weight.detach(),
        norm="rms",
        eps=1e-5,
    )
    torch.testing.assert_close(found.residual_BSC, seen["ffn_norm1 in"])
    # their RMSNorm takes the mean square in fp32 whatever it is given
    torch.testing.assert_close(found.out_BSC, seen["feed_forward in"], rtol=1e-5, atol=1e-6)


@compiled
def test_a_shared_row_is_the_same_row_many_times(each: Implementation) -> None:
    with each.forced() as device:
        inputs = testing.to(SPEC.build(), device)
        row_B = inputs["row_B"]
        names = ("scale_RC", "shift_RC", "gate_RC")
        many = inputs | {name: inputs[name][row_B] for name in names}
        many["row_B"] = torch.arange(len(row_B), device=device)
        one, other = (testing.evaluate(SPEC, SPEC.op, each) for each in (inputs, many))
    for name in names:
        grad = torch.zeros_like(one[f"grad_{name}"])
        grad.index_add_(0, row_B, other.pop(f"grad_{name}"))
        torch.testing.assert_close(one.pop(f"grad_{name}"), grad)
    assert all(torch.equal(one[name], other[name]) for name in one)


@compiled
def test_frozen_tables_keep_no_branch_and_change_no_bit(each: Implementation) -> None:
    def run(inputs: testing.Inputs, learnt: tuple[str, ...]) -> tuple[list[Tensor], int]:
        leaves = {name: inputs[name].clone().requires_grad_() for name in learnt}
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            found = SPEC.op(**inputs | leaves)
        total = (found.residual_BSC * found.out_BSC).sum()
        grads = torch.autograd.grad(total, [leaves["x_BSC"], leaves["y_BSC"]])
        # the product below keeps both results
        num_states = sum(t.shape == inputs["x_BSC"].shape for t in kept)
        return list(grads), num_states

    with each.forced() as device:
        inputs = testing.to(SPEC.build(), device)
        frozen, num_frozen = run(inputs, ("x_BSC", "y_BSC"))
        learnt, num_learnt = run(inputs, ("x_BSC", "y_BSC", "gate_RC", "scale_RC"))
    assert (num_frozen, num_learnt) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(frozen, learnt, strict=True))


@pytest.mark.parametrize("used", ["residual_BSC", "out_BSC"])
@compiled
def test_an_unused_result_has_a_gradient_of_zero(each: Implementation, used: str) -> None:
    with each.forced() as device:
        inputs = testing.to(SPEC.build(), device)
        leaves = [inputs[name].requires_grad_() for name in SPEC.differentiable[:5]]
        results = SPEC.op(**inputs)._asdict()
        alone = torch.autograd.grad(results[used].sum(), leaves, retain_graph=True)
        zeros = sum(0.0 * result.sum() for result in results.values())
        both = torch.autograd.grad(results[used].sum() + zeros, leaves)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def arguments(inputs: testing.Inputs, learnt: tuple[str, ...]) -> list[Any]:
    names = ["x_BSC", "scale_RC", "shift_RC", "row_B", "y_BSC", "gate_RC", "weight_C", "bias_C"]
    given = [inputs[name] for name in names]
    for name, value in zip(names, given, strict=True):
        if name in learnt and value is not None:
            value.requires_grad_()
    return [*given, inputs["norm"] == "layer", 1e-6]


@pytest.mark.parametrize("learnt", [(), ("x_BSC", "y_BSC"), SPEC.differentiable], ids=len)
@pytest.mark.parametrize("case", SPEC.cases[2:7], ids=lambda case: case.reason)
def test_opcheck(case: testing.Case, learnt: tuple[str, ...]) -> None:
    inputs = SPEC.build(**case.options)
    results = torch.library.opcheck(
        torch.ops.branchcore.gate_norm_modulate.default, arguments(inputs, learnt)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("implementation", ["reference", None])
def test_opcheck_of_the_backward(implementation: str | None, reduce: bool) -> None:
    i = SPEC.build(absent=())
    x_BSC, y_BSC = i["x_BSC"], i["y_BSC"] if reduce else None
    moments_2BS = testing.normal((2, *x_BSC.shape[:2]))
    names = ["scale_RC", "shift_RC", "row_B", "gate_RC", "weight_C", "bias_C"]
    tables = [i[name] for name in names]
    call = (x_BSC, None, x_BSC, y_BSC, moments_2BS, *tables, torch.bfloat16, reduce, True)
    with _dispatch.use(implementation):
        results = torch.library.opcheck(
            torch.ops.branchcore.gate_norm_modulate_backward.default, call
        )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", SPEC.cases[3:7], ids=lambda case: case.reason)
def test_compile_fullgraph(case: testing.Case) -> None:
    inputs = SPEC.build(**case.options)
    compiled = torch.compile(SPEC.op, fullgraph=True, backend="aot_eager")
    eager, found = (testing.evaluate(SPEC, run, inputs) for run in (SPEC.op, compiled))
    assert eager.keys() == found.keys()
    assert all(torch.equal(eager[name], found[name]) for name in eager)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_BSC": torch.ones(4, 2)}, ValueError, "x_BSC must be (B, S, C), got (4, 2)"),
        (
            {"y_BSC": torch.ones(5, 4, 160)},
            ValueError,
            "y_BSC must be (B, S, C) with B=5, S=5, C=160, got (5, 4, 160)",
        ),
        (
            {"gate_RC": torch.ones(2, 160)},
            ValueError,
            "gate_RC must be (R, C) with R=3, C=160, got (2, 160)",
        ),
        (
            {"scale_RC": torch.ones(3, 160).double()},
            TypeError,
            "scale_RC must be float32 or bfloat16, got float64",
        ),
        ({"row_B": torch.zeros(5).int()}, TypeError, "row_B must be int64, got int32"),
        ({"y_BSC": None}, ValueError, "gate_RC must be None without y_BSC, got a tensor"),
        (
            {"scale_RC": None, "shift_RC": None, "gate_RC": None},
            ValueError,
            "one of scale_RC, shift_RC, gate_RC must be a tensor, got None for all; try "
            "torch.nn.functional.layer_norm or rms_norm",
        ),
        (
            {"norm": "rms", "bias_C": torch.ones(160)},
            ValueError,
            "bias_C must be None with norm='rms', got a tensor",
        ),
        ({"norm": "group"}, ValueError, "norm must be 'layer' or 'rms', got 'group'"),
    ],
)
def test_messages(changes: testing.Inputs, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SPEC.op(**SPEC.build() | changes)
    assert str(caught.value) == f"gate_norm_modulate: {message}"


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_outside_the_tables_are_refused_on_a_cpu(row: int) -> None:
    if _dispatch.ISA == "none":
        pytest.skip("needs the compiled module")
    inputs = SPEC.build()
    inputs["row_B"][2] = row
    with _dispatch.use("cpp"), pytest.raises(ValueError, match=f"from 0 to 2, got {row}"):
        SPEC.op(**inputs)


def test_triton_names_its_widest_token() -> None:
    pytest.importorskip("triton")
    from branchcore.kernels.modulation import block_of

    assert (block_of(1536), block_of(6144)) == (2048, 8192)
    with pytest.raises(NotImplementedError) as caught:
        block_of(6145)
    assert str(caught.value) == (
        "gate_norm_modulate: x_BSC must have at most C=6144 channels in Triton, got 6145; "
        "try branchcore.use('reference')"
    )
