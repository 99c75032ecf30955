"""Fused blocks against diffusers' own: values, gradients, adapters, shared rows."""

import copy
from unittest import mock

import pytest
import torch

import branchcore
from branchcore.models import accelerate as package
from branchcore.models import sana, sd3, wan
from branchcore.models.accelerate import verify
from branchcore.models.cross_attention import install
from branchcore.models.sharing import Sharing

pytest.importorskip("diffusers")

from diffusers.models.transformers import transformer_flux
from fused_cases import BF16, CASES, F32, F64, WIDTH, Calls, assert_close, build, inputs, results

LORA = ["to_q", "to_out.0", "linear", "img_mod.1"]
DISTINCT = {"node": 3, "sigma": 2}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def exact(monkeypatch):
    """Without diffusers' casts to fp32, so that fp64 is fp64 throughout."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def keep(x, *args, **kwargs):
        narrow = x.dtype == F64 and F32 in (*args, *kwargs.values())
        return x if narrow else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == F64 else single(x))


def test_equals_diffusers_in_fp32(name):
    module = build(name)
    wanted = results(module)
    done = branchcore.accelerate(module)
    with Calls() as calls:
        found = results(module)
    assert_close(found, wanted, 1e-5)
    *_, norms, rotations = CASES[name]
    assert (len(calls.rows), calls.rotations) == (norms, rotations)
    assert done.calls == {"gate_norm_modulate": norms, "qk_norm_rope": rotations}


def test_rounds_no_more_than_diffusers_in_bf16(name):
    module = build(name)
    exact = results(module)["output"]
    module.to(BF16)
    theirs = results(module, BF16)["output"].float()
    branchcore.accelerate(module)
    mine = results(module, BF16)["output"].float()
    error, other = ((x - exact).square().mean().sqrt() for x in (mine, theirs))
    assert 0 < error < 1.2 * other


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("first", ["sharing", "accelerate"])
def test_equals_diffusers_in_fp64_with_and_without_shared_rows(name, first):
    module = build(name, F64)
    wanted = results(module, F64)
    _, family, kind, norms, _ = CASES[name]

    def share():
        sharing = Sharing(module, family.shared)
        if family in (wan.Wan, sana.Sana):
            install(module, sharing, f"{'transformer_' * (family is sana.Sana)}blocks.*.attn2")
        return sharing

    sharing = share() if first == "sharing" else None
    done = branchcore.accelerate(module)
    sharing = sharing or share()
    with Calls() as calls:
        found = results(module, F64, sharing)
    assert_close(found, wanted, 1e-12)
    assert calls.rows == [DISTINCT[kind]] * norms
    with Calls() as calls:
        alone = results(module, F64)
    assert_close(alone, wanted, 1e-12)
    assert calls.rows == [4] * norms
    for change in (done, sharing) if first == "sharing" else (sharing, done):
        change.undo()
    restored = results(module, F64)
    assert all(torch.equal(restored[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("name", "first"), [*((name, "adapter") for name in CASES), ("FLUX", "accelerate")]
)
def test_with_adapters(name, first):
    peft = pytest.importorskip("peft")
    module = build(name)
    config = peft.LoraConfig(r=2, target_modules=LORA, init_lora_weights=False)
    torch.manual_seed(0)
    if first == "adapter":
        module.add_adapter(config)
    done = branchcore.accelerate(module)
    if first == "accelerate":
        module.add_adapter(config)
    found = results(module)
    assert any("lora_A" in key for key in found)
    done.undo()
    assert_close(found, results(module), 1e-5)


def test_with_block_checkpointing(name):
    module = build(name)
    wanted = results(module)
    branchcore.accelerate(module)
    module.enable_gradient_checkpointing()
    with Calls() as calls:
        found = results(module)
    assert_close(found, wanted, 1e-5)
    *_, norms, rotations = CASES[name]
    assert (len(calls.rows), calls.rotations) == (2 * norms, 2 * rotations)


def test_checkpointed_blocks_share_their_rows_again():
    module = build("SD3.5")
    wanted = results(module)
    branchcore.accelerate(module)
    sharing = Sharing(module, sd3.SD3.shared)
    module.enable_gradient_checkpointing(sharing.checkpointed)
    with Calls() as calls:
        found = results(module, sharing=sharing)
    assert_close(found, wanted, 1e-5)
    assert calls.rows == [3] * 24


def test_undo_restores_every_bit_and_attribute(name):
    module = build(name)
    names = [key for key, _ in module.named_parameters()]
    before = {key: dict(vars(part)) for key, part in module.named_modules()}
    wanted = results(module)
    done = branchcore.accelerate(module)
    assert [key for key, _ in module.named_parameters()] == names
    done.undo()
    after = {key: dict(vars(part)) for key, part in module.named_modules()}
    for key, attributes in before.items():
        assert after[key].keys() == attributes.keys()
        assert after[key].get("processor") is attributes.get("processor")
    found = results(module)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert str(done).endswith("as diffusers made it (undone)")


@pytest.mark.parametrize("name", ["SD3.5", "Wan"])
def test_a_copy_has_weights_of_its_own(name):
    module = build(name)
    wanted = results(module)
    branchcore.accelerate(module)
    twin = copy.deepcopy(module)
    for p in module.parameters():
        p.data.zero_()
    with Calls() as calls:
        found = results(twin)
    assert_close(found, wanted, 1e-5)
    assert len(calls.rows) == CASES[name][3]


def test_says_what_it_bound():
    done = branchcore.accelerate(build("SD3.5"))
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    attentions = ["transformer_blocks.0.attn", "transformer_blocks.0.attn2"]
    attentions += [f"transformer_blocks.{i}.attn" for i in (1, 2)]
    assert done.bound == {"gate_norm_modulate": blocks, "qk_norm_rope": attentions}
    with branchcore.use("reference"):
        lines = str(done).splitlines()
    assert lines[0] == (
        "accelerate: 3 blocks of SD3Transformer2DModel, in 3 kinds that were compared with "
        "diffusers' own, outputs and gradients"
    )
    assert lines[2] == (
        "  qk_norm_rope: 7 calls per forward in 4 modules, transformer_blocks.0.attn to "
        "transformer_blocks.2.attn; runs with reference (cpu, float32)"
    )


def test_attention_goes_to_the_backend_of_the_processor():
    module = build("FLUX")
    done = branchcore.accelerate(module)
    module.transformer_blocks[0].attn.processor._attention_backend = "_native_math"
    where = "diffusers.models.attention_dispatch.dispatch_attention_fn"
    with mock.patch(where, wraps=transformer_flux.dispatch_attention_fn) as dispatch:
        results(module)
    seen = [call.kwargs["backend"] for call in dispatch.call_args_list]
    assert seen == ["_native_math", None, None, None]
    with pytest.raises(
        ValueError, match=r"without a backend, got FluxProcessor with _native_math;"
    ):
        done.undo()
    module.reset_attention_backend()
    done.undo()


def test_adds_the_residuals_of_a_controlnet():
    module = build("SD3.5")
    given = inputs(module, F32) | {"block_controlnet_hidden_states": [torch.ones(4, 6, WIDTH)]}
    wanted = module(**given)[0]
    assert not torch.allclose(wanted, module(**inputs(module, F32))[0])
    branchcore.accelerate(module)
    assert torch.allclose(module(**given)[0], wanted, rtol=1e-5, atol=1e-5)


def test_equal_blocks_are_compared_once():
    with mock.patch.object(package, "Trial", wraps=verify.Trial) as trial:
        branchcore.accelerate(build("FLUX"))
    assert [call.args[0] for call in trial.call_args_list] == [
        "transformer_blocks.0",
        "single_transformer_blocks.0",
    ]
