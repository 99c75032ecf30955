"""What accelerate refuses: classes it does not know, wrong bindings, arguments no op takes."""

import types
from contextlib import contextmanager

import pytest
import torch

import branchcore
from branchcore.models import accelerate as package
from branchcore.models.accelerate import binding

pytest.importorskip("diffusers")

from diffusers.models.transformers import transformer_flux
from fused_cases import BF16, CASES, F32, WIDTH, build, inputs, stable_diffusion


def refused(error, message, module):
    forwards = {key: part.forward for key, part in module.named_modules()}
    with pytest.raises(error) as raised:
        branchcore.accelerate(module)
    assert str(raised.value).startswith(f"accelerate: {message}"), str(raised.value)
    for key, part in module.named_modules():
        assert part.forward == forwards[key]
        assert "branchcore" not in type(getattr(part, "processor", None)).__module__


def test_refuses_other_transformers():
    message = (
        "transformer must be one of SD3Transformer2DModel, FluxTransformer2DModel, "
        "QwenImageTransformer2DModel, WanTransformer3DModel, SanaTransformer2DModel, got Linear"
    )
    refused(NotImplementedError, message, torch.nn.Linear(2, 2))


@contextmanager
def renamed(kind, name):
    before, kind.__name__ = kind.__name__, name
    try:
        yield
    finally:
        kind.__name__ = before


@pytest.mark.parametrize("name", CASES)
def test_fails_if_diffusers_renames_a_block(name):
    module = build(name)
    block = next(part for key, part in module.named_modules() if key.endswith("blocks.0"))
    wanted = type(block).__name__
    where = "blocks.0" if "Wan" in name else "transformer_blocks.0"
    message = f"{where} must be a {wanted}, got NewBlock; known blocks are JointTransformerBlock, "
    with renamed(type(block), "NewBlock"):
        refused(NotImplementedError, message, module)


def test_fails_if_diffusers_changes_a_block(monkeypatch):
    kind = transformer_flux.FluxSingleTransformerBlock
    module = build("FLUX")
    with monkeypatch.context() as changed:
        changed.setattr(kind, "forward", lambda self, hidden_states, temb: None)
        message = "single_transformer_blocks.0 must be FluxSingleTransformerBlock.forward('hidden"
        refused(NotImplementedError, message, module)
    module.single_transformer_blocks[1].norm.norm = torch.nn.RMSNorm(WIDTH)
    message = "single_transformer_blocks.1.norm.norm must be of class LayerNorm, got RMSNorm; try"
    refused(NotImplementedError, message, module)
    module = build("SD3")
    del module.transformer_blocks[1].use_dual_attention
    message = "transformer_blocks.1 must be JointTransformerBlock with its attributes, got 'Joint"
    refused(NotImplementedError, message, module)


def test_refuses_processors_that_it_does_not_know():
    module = build("SD3.5")
    module.transformer_blocks[2].attn.processor = types.SimpleNamespace()
    message = (
        "transformer_blocks.2.attn.processor must be diffusers' JointAttnProcessor2_0, got "
        "types.SimpleNamespace; try accelerate() first"
    )
    refused(NotImplementedError, message, module)


def test_refuses_a_second_time_other_dtypes_and_no_values():
    module = build("SD3")
    done = branchcore.accelerate(module)
    with pytest.raises(
        ValueError, match=r"blocks.0.forward must be diffusers' own, got a replaced"
    ):
        branchcore.accelerate(module)
    done.undo()
    with torch.device("meta"):
        refused(
            ValueError, "pos_embed.proj.weight must have a value, got one on", stable_diffusion()
        )
    message = "pos_embed.proj.weight must be float32, bfloat16 or float64, got float16; try"
    refused(TypeError, message, module.half())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "change",
    [
        lambda norm, x, scale, shift, *rest: (norm, x, shift, scale, *rest),
        lambda norm, x, scale, shift, row, *rest: (norm, x, scale, None, row, *rest),
        lambda norm, x, scale, shift, row, y=None, gate=None: (norm, x, scale, shift, row, y),
        lambda norm, x, scale, shift, row, *rest: (
            types.SimpleNamespace(weight=None, bias=None, eps=1e-5),
            *(x, scale, shift, row, *rest),
        ),
    ],
    ids=["scale and shift swapped", "no shift", "no gate", "another eps"],
)
def test_a_wrong_binding_is_not_kept(monkeypatch, change, dtype):
    right = binding.modulate
    for module in (binding, package.sd3):
        monkeypatch.setattr(module, "modulate", lambda *args: right(*change(*args)))
    refused(
        RuntimeError,
        "transformer_blocks.0 (JointTransformerBlock) must equal diffusers' own forward within",
        build("SD3.5", dtype),
    )


def test_a_binding_that_calls_no_op_is_not_kept(monkeypatch):
    monkeypatch.setattr(package.sd3, "normalise", lambda q, k, a, b: (a(q), b(k)))
    message = "transformer_blocks.0 must call {'gate_norm_modulate': 5, 'qk_norm_rope': 3}, got"
    refused(RuntimeError, message, build("SD3.5"))


def test_a_wrong_gradient_is_not_kept(monkeypatch):
    right = package.sana.gated
    monkeypatch.setattr(package.sana, "gated", lambda x, y, g, r: right(x, y, g.detach(), r))
    with pytest.raises(RuntimeError, match=r"in gradient timestep, torch\.float64"):
        branchcore.accelerate(build("SANA"))


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("SD3.5", {"ip_hidden_states": 1}, "JointTransformerBlock: joint_attention_kwargs must be"),
        ("FLUX", {"ip_hidden_states": 1}, "FluxTransformerBlock: joint_attention_kwargs must be"),
    ],
)
def test_refuses_image_prompts(name, extra, message):
    module = build(name)
    branchcore.accelerate(module)
    with pytest.raises(NotImplementedError) as raised:
        module(**inputs(module, F32), joint_attention_kwargs=extra)
    assert str(raised.value) == (
        f"{message} unset once accelerated, got ['ip_hidden_states']; "
        "try undo() of what accelerate() returned"
    )


def test_refuses_noise_levels_per_token():
    module = build("Wan")
    branchcore.accelerate(module)
    given = inputs(module, F32)
    given["timestep"] = given["timestep"][:, None].expand(-1, 12)
    with pytest.raises(NotImplementedError, match=r"temb must be \(B, 6, C\) once accelerated"):
        module(**given)
