"""Regional compilation, block checkpointing and the fused decoder."""

import importlib

import pytest
import torch

pytest.importorskip("diffusers")

from runtime_models import FAMILIES, PROMPTS, close, loader, rows
from tiny_pipelines import parts

from branchcore.models import runtime
from branchcore.models.accelerate import accelerate


@pytest.fixture
def load(tiny_folder):
    return loader(tiny_folder)


def test_a_change_is_its_sentence_and_is_taken_back_once():
    calls = []
    change = runtime.Change("did it", lambda: calls.append(1))
    change.undo()
    change.undo()
    assert "\n".join([change]) == "did it"
    assert calls == [1]


# compilation


def test_compiled_blocks_share_one_graph_whatever_is_shared_around_them(load):
    model = load()
    del model.module.transformer_blocks[0]
    prompted = model.with_prompts(PROMPTS)
    calls = [rows(model), rows(model, [0.5] * 4, [0, 0, 1, 1]), rows(model, [0.2, 0.3], [2, 2])]
    with torch.no_grad():
        plain = [prompted.velocity(*inputs) for inputs in calls]
    inside = model.module.transformer_blocks[0].norm1.linear
    around = model.module.norm_out.linear
    change = runtime.compile_blocks(model, backend="eager")
    assert "1 blocks (JointTransformerBlock)" in change
    assert "forward" not in vars(inside)
    assert "forward" in vars(around)
    with pytest.raises(ValueError, match="compile_blocks: model must be eager"):
        runtime.compile_blocks(model)
    with torch.no_grad():
        close(prompted.velocity(*calls[0]), plain[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for inputs, wanted in zip(calls, plain, strict=True):
                close(prompted.velocity(*inputs), wanted)
    change.undo()
    assert "forward" in vars(inside)
    with torch.no_grad():
        assert torch.equal(prompted.velocity(*calls[0]), plain[0])
    model.unshare()
    assert "forward" not in vars(inside)
    assert "forward" not in vars(around)


def test_sharing_is_undone_under_compiled_blocks_and_stays_undone(load):
    model = load("sana")
    part = model.module.transformer_blocks[0].attn2
    assert part.processor.sharing is model.sharing
    change = runtime.compile_blocks(model)
    assert part.processor.sharing is None
    model.unshare()
    change.undo()
    assert not [m for m in model.module.modules() if "forward" in vars(m)]
    assert type(part.processor).__name__ == "SanaAttnProcessor2_0"


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_fused_blocks_are_compiled_whole(name, load):
    model = load(name)
    for blocks in (
        part for part in model.module.children() if isinstance(part, torch.nn.ModuleList)
    ):
        del blocks[:-1]
    prompted, inputs = model.with_prompts(PROMPTS), rows(model)
    with torch.no_grad():
        plain = prompted.velocity(*inputs)
        accelerate(model.module)
        runtime.compile_blocks(model, backend="eager", fullgraph=True)
        close(prompted.velocity(*inputs), plain)


@pytest.mark.slow
def test_compiled_gradients_equal_eager_ones_with_inductor(load, request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes a minute; run pytest -m slow")
    model = load()
    prompted, inputs = model.with_prompts(PROMPTS), rows(model)
    model.module.requires_grad_(True)

    def gradient():
        model.module.zero_grad()
        prompted.velocity(*inputs).square().sum().backward()
        return [p.grad.clone() for p in model.module.parameters() if p.grad is not None]

    plain = gradient()
    runtime.compile_blocks(model)
    for ours, theirs in zip(gradient(), plain, strict=True):
        close(ours, theirs, 1e-4)


# checkpointing


def tape(model, prompted, seeds=(0, 1)):
    """Tapes two calls of different rows, then runs their backwards: gradients, tensors' bytes."""
    stored = {}

    def keep(value):
        stored[value.untyped_storage().data_ptr()] = value
        return value

    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    model.module.zero_grad()
    calls = [rows(model, seed=seeds[0]), rows(model, [0.5] * 4, [2, 0, 0, 2], seed=seeds[1])]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        taped = [prompted.velocity(*inputs) for inputs in calls]
        sizes = [v.untyped_storage().nbytes() for p, v in stored.items() if p not in weights]
    for v, scale in zip(taped, (1.0, 3.0), strict=True):
        (scale * v.square()).sum().backward()
    gradient = [p.grad for p in model.module.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in gradient]), sum(sizes)


@pytest.mark.parametrize(("name", "shared"), [*((n, True) for n in FAMILIES), ("sd3", False)])
def test_block_inputs_give_the_gradient_of_the_full_tape(name, shared, load):
    model = load(name).to(torch.float64)
    if not shared:
        model.unshare()
    prompted = model.with_prompts(PROMPTS)
    model.module.requires_grad_(True)
    full, full_bytes = tape(model, prompted)
    change = runtime.checkpoint_blocks(model)
    inputs_only, few_bytes = tape(model, prompted)
    close(inputs_only, full, 1e-12)
    assert few_bytes < 0.2 * full_bytes
    change.undo()
    assert tape(model, prompted)[1] == full_bytes
    runtime.checkpoint_blocks(model)
    assert "full tape" in runtime.checkpoint_blocks(model, enabled=False)
    assert not model.module.is_gradient_checkpointing


def test_only_transformers_with_blocks_are_checkpointed(load):
    model = load()
    model.module = torch.nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"checkpoint_blocks: model .* got Linear"):
        runtime.checkpoint_blocks(model)


# the decoder


def image_vae(**options):
    from diffusers import AutoencoderKL

    with parts.seeded():
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=4, sample_size=32, **options,
        )  # fmt: skip
        return parts.liven(vae).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fused_decoder_gives_the_pixels_of_the_plain_one(dtype):
    vae = image_vae().to(dtype)
    latent = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    names = list(vae.state_dict())
    with torch.no_grad():
        plain = vae.decode(latent).sample
        change = runtime.fuse_decoder(vae)
        fused = vae.decode(latent).sample
        close(fused, plain, {torch.bfloat16: 0.05, torch.float64: 1e-12}.get(dtype, 1e-4))
        assert "13 GroupNorm + SiLU of 6 ResnetBlock2D" in change
        assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=r"must be plain, got a fused decoder; try undo"):
            runtime.fuse_decoder(vae)
        change.undo()
        assert torch.equal(vae.decode(latent).sample, plain)
    assert vae.decoder.conv_in.weight.is_contiguous()
    assert names == list(vae.state_dict())


def test_a_decoder_that_would_give_other_pixels_is_left_plain(monkeypatch):
    decoder = importlib.import_module("branchcore.models.runtime.decoder")
    vae, bound = image_vae(), decoder._norm_silu
    monkeypatch.setattr(decoder, "_norm_silu", lambda norm, x: 1.001 * bound(norm, x))
    with pytest.raises(RuntimeError, match=r"must equal the plain one within 0.0001, got"):
        runtime.fuse_decoder(vae)
    assert not [part for part in vae.modules() if "forward" in vars(part)]


def test_other_autoencoders_are_refused():
    from diffusers import AutoencoderDC

    with pytest.raises(NotImplementedError, match=r"must be an AutoencoderKL .*got AutoencoderDC"):
        runtime.fuse_decoder(AutoencoderDC.__new__(AutoencoderDC))
    with pytest.raises(NotImplementedError, match=r"must be bf16 or fp32, got torch.float16"):
        runtime.fuse_decoder(image_vae().half())
    with pytest.raises(NotImplementedError, match=r"affine GroupNorm and SiLU, got .* and GELU"):
        runtime.fuse_decoder(image_vae(act_fn="gelu"))
