"""Group normalisation with SiLU where it is used: a VAE's layers, memory formats, large means."""

import re
from typing import Any

import pytest
import torch
from implementations import HERE, Implementation
from torch import Tensor

from branchcore import _dispatch, ops, testing
from branchcore.ops.group_norm_silu import SPEC

RUNS = pytest.mark.parametrize(
    "each",
    [each for each in HERE if each.implementation in _dispatch._ops["group_norm_silu"]],
    ids=lambda each: each.name,
)
FORWARD = torch.ops.branchcore.group_norm_silu.default
BACKWARD = torch.ops.branchcore.group_norm_silu_backward.default


class Fused(torch.nn.Module):
    """Takes the place of a GroupNorm and of the SiLU after it."""

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, self.silu)


def norms_of_a_vae() -> list[tuple[torch.nn.GroupNorm, bool]]:
    """The two kinds that SD3's and FLUX's decoder has, with parameters other than 1 and 0."""
    resnets = pytest.importorskip("diffusers.models.resnet")
    attentions = pytest.importorskip("diffusers.models.attention_processor")
    resnet = resnets.ResnetBlock2D(in_channels=64, temb_channels=None, groups=32, eps=1e-6)
    assert isinstance(resnet.nonlinearity, torch.nn.SiLU)
    attention = attentions.Attention(64, heads=1, norm_num_groups=32, eps=1e-6)
    for norm in (resnet.norm1, attention.group_norm):
        norm.weight.data = 1 + testing.normal((64,), seed=1) / 2
        norm.bias.data = testing.normal((64,), seed=2)
    return [(resnet.norm1, True), (attention.group_norm, False)]


def with_gradients(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, testing.normal(y.shape, seed=3).to(y))]


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaces_the_norms_of_a_diffusers_vae(each: Implementation, dtype: torch.dtype) -> None:
    x = testing.normal((2, 64, 9, 5)).to(dtype, memory_format=torch.channels_last).to(each.device)
    for norm, silu in norms_of_a_vae():
        norm.to(dtype).to(each.device)
        eager = torch.nn.Sequential(norm, torch.nn.SiLU() if silu else torch.nn.Identity())
        with each.forced():
            found = with_gradients(Fused(norm, silu), x)
        theirs = with_gradients(eager, x)
        exact = with_gradients(eager.double(), x.double())
        for ours, other, truth in zip(found, theirs, exact, strict=True):
            floor = 2 * torch.finfo(dtype).eps * truth.abs().max()
            assert (ours - truth).abs().max() <= 2 * (other - truth).abs().max() + floor


@RUNS
def test_a_large_mean_costs_no_digits_of_the_variance(each: Implementation) -> None:
    x_BPC = (testing.normal((2, 150, 64)) + 1e4).to(each.device)
    one_C, zero_C = x_BPC.new_ones(64), x_BPC.new_zeros(64)
    with each.forced():
        _, statistics_BG2 = FORWARD(x_BPC, one_C, zero_C, 16, 0.0, True)
    _, _, theirs_BG = torch.native_group_norm(x_BPC.mT.contiguous(), None, None, 2, 64, 150, 16, 0)
    groups_BPGc = x_BPC.unflatten(2, (16, 4))
    exact_BG = groups_BPGc.double().var((1, 3), correction=0).rsqrt()
    naive_BG = groups_BPGc.square().mean((1, 3)) - groups_BPGc.mean((1, 3)).square()

    def error(rstd_BG: Tensor) -> Tensor:
        return (rstd_BG / exact_BG - 1).abs().max()

    assert error(statistics_BG2[..., 1]) <= 2 * error(theirs_BG) < 1e-3
    # sums of squares in fp32 would not do: they are 1e8, known to 8, where the variance is 1
    assert not error(naive_BG.rsqrt()) < 0.1


@RUNS
@pytest.mark.parametrize("sizes", [(6, 4), (3, 6, 4)], ids=["image", "video"])
def test_keeps_the_memory_format(each: Implementation, sizes: tuple[int, ...]) -> None:
    layout = torch.channels_last if len(sizes) == 2 else torch.channels_last_3d
    i = testing.to(SPEC.build(sizes=sizes), each.device)
    i["x_BCHW"].requires_grad_()
    with each.forced():
        y = ops.group_norm_silu(**i)
        # a cotangent in another format, as a convolution may give it
        (grad,) = torch.autograd.grad(y, i["x_BCHW"], torch.ones_like(y).contiguous())
        (same,) = torch.autograd.grad(ops.group_norm_silu(**i).sum(), i["x_BCHW"])
    for tensor in (y, grad):
        assert tensor.shape == i["x_BCHW"].shape
        assert tensor.stride() == i["x_BCHW"].stride()
        assert tensor.is_contiguous(memory_format=layout)
    torch.testing.assert_close(grad, same, rtol=1e-5, atol=1e-6)


def test_a_video_is_normalised_over_its_frames() -> None:
    i = SPEC.build(sizes=(3, 4, 5))
    tall = i["x_BCHW"].flatten(2, 3)
    assert torch.equal(
        ops.group_norm_silu(**i).flatten(2, 3),
        ops.group_norm_silu(**{**i, "x_BCHW": tall.contiguous(memory_format=torch.channels_last)}),
    )


X, ONES = SPEC.build()["x_BCHW"], torch.ones(64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x_BCHW": X.contiguous()},
            ValueError,
            "x_BCHW must be contiguous in torch.channels_last, got strides (5184, 81, 9, 1) of "
            "shape (2, 64, 9, 9); try .to(memory_format=torch.channels_last)",
        ),
        (
            {"x_BCHW": X[:, :, None].contiguous()},
            ValueError,
            "try .to(memory_format=torch.channels_last_3d)",
        ),
        ({"x_BCHW": X[..., 0]}, ValueError, "must be (B, C, H, W) or (B, C, T, H, W), got (2, 64"),
        ({"x_BCHW": X.half()}, TypeError, "x_BCHW must be float32 or bfloat16 or float64, got fl"),
        ({"x_BCHW": None}, TypeError, "x_BCHW must be a tensor, got NoneType"),
        ({"num_groups": 5}, ValueError, "num_groups must be a divisor of C=64, got 5"),
        ({"num_groups": 0}, ValueError, "num_groups must be a divisor of C=64, got 0"),
        ({"weight_C": ONES[1:]}, ValueError, "weight_C must be (C,) with C=64, got (63,)"),
        ({"bias_C": ONES.half()}, TypeError, "bias_C must be float32 or bfloat16, got float16"),
        ({"bias_C": ONES.to("meta")}, ValueError, "bias_C must be on cpu like the first argument"),
        ({"x_BCHW": X.double()}, TypeError, "weight_C must be float64, got float32"),
        (
            {"x_BCHW": torch.ones(1, 4160, 1, 1)},
            NotImplementedError,
            "x_BCHW must have at most C=4096 channels, got 4160; try torch.nn.functional.group_no",
        ),
    ],
)
def test_messages(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        ops.group_norm_silu(**{**SPEC.build(), **changes})
    assert str(raised.value).startswith("group_norm_silu: ")


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    x_BPC, weight_C, bias_C = (
        testing.normal(shape, seed=k).requires_grad_(grad)
        for k, shape in enumerate([(2, 54, 64), (64,), (64,)])
    )
    call = (x_BPC, weight_C, bias_C, 16, 1e-6, True)
    assert set(torch.library.opcheck(FORWARD, call).values()) == {"SUCCESS"}
    y_BPC, statistics_BG2 = (tensor.detach() for tensor in FORWARD(*call))
    tensors = (y_BPC, x_BPC.detach(), weight_C.detach(), bias_C.detach(), statistics_BG2)
    results = torch.library.opcheck(BACKWARD, (*tensors, True))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("sizes", [(6, 4), (3, 6, 4)], ids=["image", "video"])
def test_compile_fullgraph(sizes: tuple[int, ...]) -> None:
    i = SPEC.build(sizes=sizes)
    leaves = [i[name].requires_grad_() for name in SPEC.differentiable]
    compiled = torch.compile(ops.group_norm_silu, fullgraph=True, backend="aot_eager")
    eager, traced = (run(**i) for run in (ops.group_norm_silu, compiled))
    assert traced.stride() == eager.stride()
    assert torch.equal(traced, eager)
    for one, other in zip(
        *(torch.autograd.grad(y.sum(), leaves) for y in (eager, traced)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_channels", [1, 4, 96, 128, 320, 512, 4096])
def test_tiles_cover_an_image_and_do_not_see_the_batch(num_channels: int) -> None:
    pytest.importorskip("triton")
    from branchcore.kernels.group_norm_tiles import MAX_TILES, Tiles

    for num_positions in (1, 31, 32, 33, 1024, 4097, 262144, 10_000_019):
        tiles = Tiles.of(num_positions, num_channels)
        before_last = (tiles.num_tiles - 1) * tiles.tile_positions
        assert 1 <= tiles.num_tiles <= MAX_TILES
        assert before_last < num_positions <= before_last + tiles.tile_positions
        assert tiles.tile_positions % tiles.constants["BLOCK_P"] == 0
