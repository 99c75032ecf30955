"""Fused blocks against diffusers' own: values, gradients, adapters, shared rows, refusals."""

import copy
import types
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import branchcore
from branchcore.models import accelerate as package
from branchcore.models import flux, qwen_image, sana, sd3, wan
from branchcore.models.accelerate import binding, verify
from branchcore.models.cross_attention import install
from branchcore.models.sharing import Rows, Sharing

diffusers = pytest.importorskip("diffusers")
transformer_flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PROMPT, SIGMA = np.array([0, 0, 1, 0]), np.array([0.3, 0.3, 0.9, 0.9])
DISTINCT = {"node": 3, "sigma": 2}
TEXT, WIDTH = 5, 24
LORA = ["to_q", "to_out.0", "linear", "img_mod.1"]


def stable_diffusion(**options):
    return diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=12, caption_projection_dim=WIDTH, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, pos_embed_max_size=8, **options,
    )  # fmt: skip


def wan_transformer(**options):
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16, **options,
    )  # fmt: skip


def sana_transformer(**options):
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=WIDTH,
        caption_channels=WIDTH, sample_size=4, **options,
    )  # fmt: skip


def flux_transformer():
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        guidance_embeds=True, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip


def qwen_transformer():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip


# Transformer, family, kind of its modulation, calls of gate_norm_modulate and of qk_norm_rope.
CASES = {
    "SD3": (stable_diffusion, sd3.SD3, "node", 4 + 4 + 3, 0),
    "SD3.5": (
        lambda: stable_diffusion(dual_attention_layers=(0,), qk_norm="rms_norm"),
        *(sd3.SD3, "node", 5 + 4 + 3, 3 + 2 + 2),
    ),
    "FLUX": (flux_transformer, flux.Flux, "node", 2 * 4 + 2, 2 * 2 + 2),
    "Qwen-Image": (qwen_transformer, qwen_image.QwenImage, "sigma", 2 * 4, 2 * 2),
    "Wan": (lambda: wan_transformer(cross_attn_norm=True), wan.Wan, "sigma", 2 * 3, 2),
    "Wan, no norm before text": (
        lambda: wan_transformer(cross_attn_norm=False),
        *(wan.Wan, "sigma", 2 * 2, 2),
    ),
    "SANA": (sana_transformer, sana.Sana, "sigma", 2 * 2, 0),
    "SANA 1.5": (
        lambda: sana_transformer(qk_norm="rms_norm_across_heads"),
        *(sana.Sana, "sigma", 2 * 2, 2),
    ),
}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def draw(module, dtype):
    """Gives every parameter a value that no other has, none of them zero."""
    for i, (key, p) in enumerate(sorted(module.named_parameters())):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        scaled = noise / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3 * noise
        p.data = scaled + 1.0 if p.ndim == 1 and key.endswith("weight") else scaled
    for part in (module, *module.modules()):
        part._keep_in_fp32_modules = None
    return module.to(dtype).requires_grad_(True)


def build(name, dtype=F32):
    return draw(CASES[name][0](), dtype)


def inputs(module, dtype):
    """Four rows; what depends on a prompt or a noise level is equal where these are."""

    def of(rows, *sizes):
        table = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(len(sizes)))
        return table[torch.from_numpy(np.unique(rows, return_inverse=True)[1])].to(dtype)

    def states(*sizes):
        return torch.randn(4, *sizes, generator=torch.Generator().manual_seed(9)).to(dtype)

    sigma = torch.from_numpy(SIGMA).to(dtype)
    given = {"encoder_hidden_states": of(PROMPT, TEXT, WIDTH), "return_dict": False}
    kind = type(module).__name__
    if kind == "SD3Transformer2DModel":
        pooled = {"pooled_projections": of(PROMPT, WIDTH), "timestep": 1000 * sigma}
        return given | pooled | {"hidden_states": states(4, 4, 6)}
    if kind == "FluxTransformer2DModel":
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))
        places = {"img_ids": ids, "txt_ids": torch.zeros(TEXT, 3), "guidance": torch.ones(4)}
        pooled = {"pooled_projections": of(PROMPT, WIDTH), "timestep": sigma}
        return given | pooled | places | {"hidden_states": states(6, 4)}
    if kind == "QwenImageTransformer2DModel":
        mask = torch.arange(TEXT) < torch.tensor([TEXT, 3])[torch.from_numpy(PROMPT)][:, None]
        more = {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 2, 3)]] * 4}
        return given | more | {"timestep": sigma, "hidden_states": states(6, 4)}
    if kind == "WanTransformer3DModel":
        return given | {"timestep": 1000 * sigma, "hidden_states": states(4, 2, 4, 6)}
    mask = (torch.arange(TEXT) < torch.tensor([TEXT, 3])[torch.from_numpy(PROMPT)][:, None]).to(
        dtype
    )
    more = {"encoder_attention_mask": mask, "hidden_states": states(4, 2, 3)}
    return given | more | {"timestep": 1000 * sigma}


def results(module, dtype=F32, sharing=None):
    """Output and gradient of every parameter."""
    module.zero_grad(set_to_none=True)
    rows = None if sharing is None else Rows(SIGMA, PROMPT, torch.device("cpu"))
    given = inputs(module, dtype)
    if sharing is None:
        out = module(**given)[0]
    else:
        with sharing.using(rows):
            out = module(**given)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.to(dtype)).sum().backward()
    grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **{key: grad.clone() for key, grad in grads.items()}}


def assert_close(found, wanted, tolerance):
    """Each within the tolerance of its own largest value, or of a thousandth of all gradients'."""
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for key, g in wanted.items() if key != "output")
    for key, value in wanted.items():
        scale = max(float(value.abs().max()), 0.0 if key == "output" else 1e-3 * largest)
        assert (found[key] - value).abs().max() <= tolerance * scale, key


@pytest.fixture
def exact(monkeypatch):
    """Without diffusers' casts to fp32, so that fp64 is fp64 throughout."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def keep(x, *args, **kwargs):
        narrow = x.dtype == F64 and F32 in (*args, *kwargs.values())
        return x if narrow else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == F64 else single(x))


class Calls(TorchDispatchMode):
    """Counts the public ops, and the modulation rows that they are given."""

    def __init__(self):
        super().__init__()
        self.rows, self.rotations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.branchcore.gate_norm_modulate.default:
            self.rows.append(next((len(t) for t in (args[1], args[5]) if t is not None), 0))
        self.rotations += func is torch.ops.branchcore.qk_norm_rope.default
        return func(*args, **(kwargs or {}))


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
    before = module.transformer_blocks[0].attn.processor
    before._attention_backend = "native"
    done = branchcore.accelerate(module)
    assert module.transformer_blocks[0].attn.processor._attention_backend == "native"
    module.transformer_blocks[0].attn.processor._attention_backend = "_native_math"
    where = "diffusers.models.attention_dispatch.dispatch_attention_fn"
    with mock.patch(where, wraps=transformer_flux.dispatch_attention_fn) as dispatch:
        results(module)
    seen = [call.kwargs["backend"] for call in dispatch.call_args_list]
    assert seen == ["_native_math", None, None, None]
    done.undo()
    assert module.transformer_blocks[0].attn.processor is before
    assert before._attention_backend == "_native_math"


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
