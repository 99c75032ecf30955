"""What conformance does not cover: diffusers' attention, what a rotation keeps, messages."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from branchcore import ops, reference, testing
from branchcore.ops.qk_norm_rope import SPEC, _backward, _forward

BF16, F32 = torch.bfloat16, torch.float32
PAIRS = ("interleaved", "halves")
HEADS, D, TEXT, IMAGE = 3, 24, 5, 12
WIDTH = HEADS * D


def angles(num_positions: int, pairs: str = "interleaved", first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of positions first, first + 1, ... with one frequency per pair, in fp64."""
    frequency = 10.0 ** -torch.linspace(0, 2, D // 2).double()
    angle = torch.arange(first, first + num_positions)[:, None] * frequency
    both = torch.cat((angle, angle), 1) if pairs == "halves" else angle.repeat_interleave(2, 1)
    return both.cos(), both.sin()


def randomise(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        value.data = 1 + 0.2 * drawn if "norm" in name else 0.3 * drawn
    return module.to(dtype)


def streams(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    text = testing.normal((2, TEXT, WIDTH), dtype, 1)
    return text, testing.normal((2, IMAGE, WIDTH), dtype, 2)


def seen_by(where: str, call) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, S, H, D), that a module hands to the attention function `where`."""
    seen = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
        seen.append((query, key))
        return torch.zeros_like(query)

    with mock.patch(where, attention):
        call()
    return seen[0]


class Site(NamedTuple):
    """A stream's projections and norms, and the tables of its tokens."""

    x: Tensor
    layers: tuple[torch.nn.Module, ...]
    tables: tuple[Tensor, ...] = ()
    eps: float = 1e-6

    def run(self, op, wide):
        q, k = (wide(layer(self.x).unflatten(-1, (HEADS, D))) for layer in self.layers[:2])
        weights = (wide(norm.weight) for norm in self.layers[2:])
        return op(q, k, *weights, *map(wide, self.tables), eps=self.eps)


def own(attn: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    return attn.to_q, attn.to_k, attn.norm_q, attn.norm_k


def added(attn: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    return attn.add_q_proj, attn.add_k_proj, attn.norm_added_q, attn.norm_added_k


def flux(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Site]]:
    """Text and image share one table; text is at position 0, which does not rotate."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    attn = module.FluxAttention(
        WIDTH, HEADS, D, bias=True, added_kv_proj_dim=WIDTH, out_dim=WIDTH, context_pre_only=False
    )
    randomise(attn, dtype)
    text, image = streams(dtype)
    ids = torch.zeros(TEXT + IMAGE, 3)
    ids[TEXT:, 1:] = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    tables = module.FluxPosEmbed(10_000, [8, 8, 8])(ids)
    where = f"{module.__name__}.dispatch_attention_fn"
    theirs = seen_by(where, lambda: attn(image, text, image_rotary_emb=tables))
    text_tables, image_tables = zip(*(t.split((TEXT, IMAGE)) for t in tables), strict=True)
    sites = [Site(text, added(attn), text_tables, 1e-5), Site(image, own(attn), image_tables, 1e-5)]
    return theirs, sites


def qwen(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Site]]:
    """Its tables are complex, one number per pair."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    joint = {"added_kv_proj_dim": WIDTH, "out_dim": WIDTH, "context_pre_only": False, "bias": True}
    attn = module.Attention(
        **joint,
        query_dim=WIDTH,
        dim_head=D,
        heads=HEADS,
        processor=module.QwenDoubleStreamAttnProcessor2_0(),
        qk_norm="rms_norm",
        eps=1e-6,
    )
    randomise(attn, dtype)
    text, image = streams(dtype)
    embed = module.QwenEmbedRope(10_000, [8, 8, 8], scale_rope=True)
    freqs = embed((1, 3, 4), torch.device("cpu"), TEXT)
    where = f"{module.__name__}.dispatch_attention_fn"
    theirs = seen_by(where, lambda: attn(image, text, image_rotary_emb=freqs))
    image_tables, text_tables = (
        tuple(part.repeat_interleave(2, 1) for part in (each.real, each.imag)) for each in freqs
    )
    return theirs, [Site(text, added(attn), text_tables), Site(image, own(attn), image_tables)]


def wan(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Site]]:
    """It normalises across all channels."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    attn = module.WanAttention(WIDTH, HEADS, D, processor=module.WanAttnProcessor())
    randomise(attn, dtype)
    _, image = streams(dtype)
    tables = module.WanRotaryPosEmbed(D, (1, 2, 2), 64)(torch.zeros(1, 1, 1, 6, 8))
    where = f"{module.__name__}.dispatch_attention_fn"
    theirs = seen_by(where, lambda: attn(image, rotary_emb=tables))
    return theirs, [Site(image, own(attn), tuple(t.float().view(IMAGE, D) for t in tables), 1e-5)]


def sd3(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Site]]:
    """It rotates nothing."""
    module = pytest.importorskip("diffusers.models.attention_processor")
    attn = module.Attention(
        query_dim=WIDTH,
        dim_head=D,
        heads=HEADS,
        qk_norm="rms_norm",
        eps=1e-6,
        processor=module.JointAttnProcessor2_0(),
    )
    randomise(attn, dtype)
    _, image = streams(dtype)
    where = "torch.nn.functional.scaled_dot_product_attention"
    theirs = seen_by(where, lambda: attn(image))
    return tuple(x.transpose(1, 2) for x in theirs), [Site(image, own(attn))]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", [flux, qwen, wan, sd3])
@torch.no_grad()
def test_is_what_diffusers_computes_with_fewer_roundings(model, dtype: torch.dtype) -> None:
    theirs, sites = model(dtype)
    found = [site.run(ops.qk_norm_rope, lambda tensor: tensor) for site in sites]
    exact = [site.run(reference.qk_norm_rope, Tensor.double) for site in sites]
    joint = ([torch.cat(part, 1) for part in zip(*each, strict=True)] for each in (found, exact))
    for mine, truth, other in zip(*joint, theirs, strict=True):
        unit = torch.finfo(dtype).eps * truth.abs().max()
        error, other_error = ((x.double() - truth).abs().max() for x in (mine, other))
        # half a unit of the last place is one rounding; diffusers rounds after each step
        assert other_error < 4 * unit
        assert error <= (0.5 * unit if dtype == BF16 else 4 * unit)
        assert error <= other_error + 4 * torch.finfo(F32).eps * truth.abs().max()


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_rotation_keeps_norms_and_sees_only_distances(pairs: str) -> None:
    q, k = (testing.normal((1, 1, HEADS, D), seed=seed).double() for seed in (1, 2))
    ones = torch.ones(D).double()

    def at(position: int, x: Tensor) -> Tensor:
        return ops.qk_norm_rope(x, x, ones, ones, *angles(1, pairs, position), pairs=pairs).q_BSHD

    plain = ops.qk_norm_rope(q, k, ones, ones).q_BSHD
    assert torch.allclose(at(7, q).norm(dim=-1), plain.norm(dim=-1), rtol=1e-14, atol=0)
    assert (at(7, q) - plain).abs().max() > 0.1
    near, far = ((at(p, q) * at(p + 4, k)).sum(-1) for p in (3, 1003))
    assert torch.allclose(near, far, rtol=0, atol=1e-11)
    assert not torch.allclose(near, (at(3, q) * at(8, k)).sum(-1), rtol=0, atol=1e-2)


def test_halves_are_interleaved_pairs_in_another_order() -> None:
    q, k = (testing.normal((2, 7, HEADS, D), seed=seed) for seed in (1, 2))
    weight = testing.normal((D,), seed=3)
    order = torch.arange(D).view(2, D // 2).T.flatten()
    cos, sin = (table.float() for table in angles(7, "halves"))
    halves = ops.qk_norm_rope(q, k, weight, weight, cos, sin, pairs="halves")
    tables = (t[..., order].contiguous() for t in (q, k, weight, weight, cos, sin))
    interleaved = ops.qk_norm_rope(*tables)
    for a, b in zip(halves, interleaved, strict=True):
        assert torch.allclose(a[..., order], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("across", [False, True])
def test_a_frozen_weight_gets_no_gradient_and_changes_none(across: bool) -> None:
    inputs = SPEC.build(across=across)
    grads = []
    for leaves in (SPEC.differentiable, ("q_BSHD", "k_BSHD")):
        given = inputs | {name: inputs[name].detach().requires_grad_() for name in leaves}
        sum(out.square().sum() for out in ops.qk_norm_rope(**given)).backward()
        grads.append([given[name].grad for name in SPEC.differentiable])
    assert grads[1][2:] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(grads[0][:2], grads[1][:2], strict=True))
    assert grads[0][2].abs().min() > 0


def test_an_unused_result_has_no_gradient() -> None:
    inputs = SPEC.build()
    given = inputs | {name: inputs[name].detach().requires_grad_() for name in SPEC.differentiable}
    ops.qk_norm_rope(**given).k_BSHD.sum().backward()
    assert given["q_BSHD"].grad is None
    assert given["q_weight"].grad is None
    assert given["k_BSHD"].grad.abs().max() > 0


def test_a_table_has_no_gradient() -> None:
    inputs = SPEC.build()
    cos_SD = inputs["cos_SD"].requires_grad_()
    leaf = inputs["q_BSHD"].detach().requires_grad_()
    ops.qk_norm_rope(**inputs | {"q_BSHD": leaf, "cos_SD": cos_SD}).q_BSHD.sum().backward()
    assert cos_SD.grad is None


def test_opcheck() -> None:
    inputs = SPEC.build(sizes=(2, 3), num_channels=6)
    leaves = {name: inputs[name].detach().requires_grad_() for name in SPEC.differentiable}
    q_BSHD, k_BSHD, weight, _, *rest = inputs.values()
    for op, arguments in (
        (_forward, tuple((inputs | leaves).values())),
        (_backward, (k_BSHD, q_BSHD, weight, *rest, True)),
        (_backward, (k_BSHD, q_BSHD, weight, *rest, False)),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("rope", [True, False])
def test_compiles_into_one_graph(rope: bool) -> None:
    inputs = SPEC.build(rope=rope)
    found = []
    for run in (SPEC.op, torch.compile(SPEC.op, fullgraph=True, backend="aot_eager")):
        found.append(testing.evaluate(SPEC, run, inputs))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q_BSHD": torch.ones(2, 5, 192)},
            ValueError,
            "q_BSHD must be (B, S, H, D) with H >= 1 and 1 <= D <= 1024, got (2, 5, 192); "
            "try unflatten(-1, (H, D))",
        ),
        (
            {"k_BSHD": torch.ones(2, 5, 1, 2048)},
            ValueError,
            "k_BSHD must be (B, S, H, D) with H >= 1 and 1 <= D <= 1024, got (2, 5, 1, 2048)",
        ),
        (
            {"k_BSHD": torch.ones(2, 6, 3, 64)},
            ValueError,
            "k_BSHD must be (B, S, H, D) with B=2, S=5, H=3, D=64, got (2, 6, 3, 64)",
        ),
        (
            {"k_BSHD": torch.ones(2, 5, 3, 64).bfloat16()},
            TypeError,
            "k_BSHD must be float32, got bfloat16",
        ),
        (
            {"k_weight": torch.ones(3)},
            ValueError,
            "k_weight must be (D,) with D=64 or (H D,) with H D=192, got (3,)",
        ),
        (
            {"k_weight": torch.ones(192)},
            ValueError,
            "weights must be both (D,) or both (H D,), got [64, 192]",
        ),
        ({"sin_SD": None}, TypeError, "sin_SD must be a tensor, got NoneType"),
        (
            {"cos_SD": torch.ones(5, 32)},
            ValueError,
            "cos_SD must be (S, D) with S=5, D=64, got (5, 32)",
        ),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"pairs": "thirds"}, ValueError, "pairs must be 'interleaved' or 'halves', got 'thirds'"),
    ],
)
def test_errors_name_what_is_wanted_and_given(changes, error, message: str) -> None:
    with pytest.raises(error) as raised:
        ops.qk_norm_rope(**SPEC.build() | changes)
    assert str(raised.value).startswith(f"qk_norm_rope: {message}")


def test_an_odd_number_of_channels_cannot_rotate() -> None:
    inputs = SPEC.build(num_channels=7, rope=False)
    with pytest.raises(ValueError, match=r"with an even D to be rotated, got \(2, 5, 3, 7\)"):
        ops.qk_norm_rope(**inputs | {"cos_SD": torch.ones(5, 7), "sin_SD": torch.ones(5, 7)})


def test_triton_names_its_widest_token() -> None:
    pytest.importorskip("triton")
    from branchcore.kernels.pairs import tile

    assert tile(128, 128).HEADS == 128
    with pytest.raises(NotImplementedError, match="at most 16384 channels in Triton, H and D"):
        tile(129, 128)
