"""Attention backends, regional compilation, graphs, block checkpointing and the fused decoder."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_pipelines import Tiny, parts

from branchcore.models import runtime
from branchcore.models.runtime import attention, probe
from branchcore.models.runtime.graphs import BucketedCalls, padded

PROMPTS = ["a red cat", "a thin blue dog of the house", "a"]
FAMILIES = ["sd3", "flux", "qwen_image", "wan", "sana"]
MIXED = ([0.3, 0.3, 0.8, 0.8], [1, 1, 1, 0])


@pytest.fixture
def load(tiny_folder):
    def tiny(name="sd3", **options):
        return Tiny(name, tiny_folder(name)).load(**options)

    return tiny


def rows(model, sigma=MIXED[0], prompt=MIXED[1], seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(sigma), *model.latent_shape, generator=generator, dtype=torch.float64)
    return x.to(model.dtype), torch.tensor(sigma, dtype=model.dtype), torch.tensor(prompt)


def close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_change_is_its_sentence_and_is_taken_back_once():
    calls = []
    change = runtime.Change("did it", lambda: calls.append(1))
    change.undo()
    change.undo()
    assert "\n".join([change]) == "did it"
    assert calls == [1]


# attention


@pytest.mark.parametrize("name", FAMILIES)
def test_every_softmax_attention_goes_through_the_chosen_backend(name, load, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model = load(name)
    prompted, inputs = model.with_prompts(PROMPTS), rows(model)
    with torch.no_grad():
        plain = prompted.velocity(*inputs)
    change = runtime.set_attention(model, "_native_math")
    math, calls = AttentionBackendName("_native_math"), []
    attend = _AttentionBackendRegistry._backends[math]

    def counted(*args, **options):
        calls.append(1)
        return attend(*args, **options)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, counted)
    with torch.no_grad():
        close(prompted.velocity(*inputs), plain)
        # folding asks once per group of prompts
        assert len(calls) >= len(list(attention._attentions(model.module))) > 0
        calls.clear()
        change.undo()
        assert torch.equal(prompted.velocity(*inputs), plain)
    assert not calls
    assert f"{len(list(attention._attentions(model.module)))} modules" in change


def test_a_backend_without_backward_serves_calls_without_gradient_only(load):
    model = load()
    prompted, inputs = model.with_prompts(PROMPTS), rows(model)
    processors = [part.processor for part in attention._attentions(model.module)]
    with pytest.raises(NotImplementedError, match=r"with a backward, .* 'flex' .*training=False"):
        runtime.set_attention(model, "flex")
    assert processors == [part.processor for part in attention._attentions(model.module)]
    change = runtime.set_attention(model, "flex", training=False)
    assert "'native' with it" in change
    processor = next(iter(attention._attentions(model.module))).processor
    with torch.no_grad():
        assert processor._attention_backend == "flex"
        fast = prompted.velocity(*inputs)
    assert processor._attention_backend == "native"
    model.module.requires_grad_(True)
    runtime.checkpoint_blocks(model)
    taped = prompted.velocity(*inputs)
    close(fast, taped.detach())
    with torch.no_grad():  # what is computed again in the backward takes native all the same
        taped_again = prompted.velocity(*inputs)
    taped.square().sum().backward()
    assert torch.equal(taped_again, fast)
    assert model.module.proj_out.weight.grad.isfinite().all()
    runtime.set_attention(model, "native")
    with torch.no_grad():
        assert processor._attention_backend == "native"


@pytest.mark.parametrize(
    ("name", "backend", "error", "message"),
    [
        ("sd3", "nope", ValueError, "one of flash.*native.*got 'nope'"),
        ("sd3", "_native_cudnn", NotImplementedError, "serves torch.float32 in heads of 16 on cpu"),
        ("sana", "_native_flash", NotImplementedError, "heeds the model's text masks, got"),
        ("sd3", "wrong", RuntimeError, "within 1e-05 of 'native', got .* error of 1.0e-03"),
        ("sd3", "wrong backward", RuntimeError, "backward, .* error of 1.0e-03; try 'native'"),
        ("sd3", "constant", NotImplementedError, "one with a backward"),
        pytest.param("sd3", "flash", RuntimeError, "whose package is installed, got 'flash'"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused(name, backend, error, message, load, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName

    def faulty(query, key, value):
        out = registry._backends[names.NATIVE](query, key, value)
        if backend == "constant":
            return out.detach()
        scale = 1.001 if backend == "wrong" or torch.is_grad_enabled() else 1.0
        return out * scale

    model = load(name)
    processors = [part.processor for part in attention._attentions(model.module)]
    if backend in ("wrong", "wrong backward", "constant"):
        monkeypatch.setitem(registry._backends, names.FLEX, faulty)
        monkeypatch.setitem(registry._supported_arg_names, names.FLEX, {"query", "key", "value"})
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", False)
    special = "flex" if " " in backend or backend in ("wrong", "constant") else backend
    with pytest.raises(error, match=f"(?s)set_attention: backend must be .*{message}"):
        runtime.set_attention(model, special)
    assert processors == [part.processor for part in attention._attentions(model.module)]


def test_a_hole_in_the_mask_is_part_of_the_probe(monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    native = registry._backends[names.NATIVE]
    monkeypatch.setitem(
        registry._backends, names.FLEX, lambda query, key, value: native(query, key, value)
    )
    monkeypatch.setitem(registry._supported_arg_names, names.FLEX, {"query", "key", "value"})
    case = probe.Case(torch.device("cpu"), torch.float32, 16, "none", training=True)
    probe.probe("flex", case)
    for mask in ("keep", "add"):
        with pytest.raises(RuntimeError, match="heeds the model's text masks, within"):
            probe.probe("flex", case._replace(mask=mask))
        probe.probe("_native_math", case._replace(mask=mask))


def test_flash_3_trains_by_the_backward_of_its_package(load, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    registry, name = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName._FLASH_3
    native = registry._backends[dispatch.AttentionBackendName.NATIVE]
    calls = []

    def package(q, k, v, softmax_scale=None, causal=False):
        calls.append(q.requires_grad)
        return native(q, k, v, scale=softmax_scale, is_causal=causal), None

    def forward_only(q, k, v, **options):
        return native(q, k, v).detach(), None

    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        monkeypatch.setitem(table, name, table[name])
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN_3", True)
    monkeypatch.setattr(dispatch, "_wrapped_flash_attn_3", forward_only)
    fake = SimpleNamespace(flash_attn_func=package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    model = load("flux")
    prompted, inputs = model.with_prompts(PROMPTS), rows(model)
    parameter = model.module.transformer_blocks[0].attn.to_q.weight.requires_grad_(True)

    def gradient():
        parameter.grad = None
        prompted.velocity(*inputs).square().sum().backward()
        return parameter.grad.clone()

    plain = gradient()
    runtime.set_attention(model, "_flash_3")
    calls.clear()
    close(gradient(), plain)
    assert len(calls) == 3
    with torch.no_grad():
        prompted.velocity(*inputs)
    assert len(calls) == 3, "without gradient the forward of diffusers is enough"


def test_the_joint_processor_equals_diffusers(load):
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    from branchcore.models.runtime.joint_attention import JointAttention

    model = load(dtype=torch.float64)
    blocks = model.module.transformer_blocks
    x, text = torch.randn(2, 8, 32).double(), torch.randn(2, 5, 32).double()
    for attn, *inputs in (
        (blocks[0].attn, x, text),
        (blocks[1].attn, x, text),
        (blocks[0].attn2, x),
    ):
        ours, theirs = JointAttention()(attn, *inputs), JointAttnProcessor2_0()(attn, *inputs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-12)


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


# graphs


def test_padded_rows_are_copies_of_the_first():
    x = torch.arange(6.0).view(3, 2)
    wide = padded(x, 4)
    assert wide.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    same = padded(x, 3)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_in_buckets_equal_calls_of_their_own_size(name, load):
    model = load(name, guidance=1.0 if name in ("sd3", "flux") else 3.0)
    prompted, captured = model.with_prompts(PROMPTS), []

    def capture(call):
        """Repeats a call on the memory that a graph would read and write."""
        captured.append(call)
        result = call()
        return lambda: result.copy_(call())

    inputs = [rows(model, [s] * n, p) for n, s, p in ((1, 0.9, [0]), (3, 0.5, [0, 1, 2]))]
    inputs += [rows(model), rows(model, seed=1)]
    with torch.no_grad():
        plain = [prompted.velocity(*each) for each in inputs]
        model.rollout_predict = BucketedCalls(model, (2, 4), capture).predict
        replayed = [prompted.velocity(*each) for each in inputs]
    for ours, theirs in zip(replayed, plain, strict=True):
        close(ours, theirs, 3e-6)
    assert len(captured) == 2
    model.module.requires_grad_(True)
    assert prompted.velocity(*inputs[0]).requires_grad


def test_graphs_follow_weights_and_adapters(load):
    weights = importlib.import_module("branchcore.models.weights")
    model = load()
    weights.add_lora(model, rank=2)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    prompted, inputs, captured = model.with_prompts(PROMPTS), rows(model), []
    with torch.no_grad():
        plain = prompted.velocity(*inputs), prompted.reference_velocity(*inputs)

        def capture(call):
            captured.append(call)
            result = call()
            return lambda: result  # a graph keeps what was on and off

        model.rollout_predict = BucketedCalls(model, (4,), capture).predict
        for _ in range(2):
            close(prompted.velocity(*inputs), plain[0])
            close(prompted.reference_velocity(*inputs), plain[1])
        assert len(captured) == 2
        model.module.proj_out.weight.data = 2 * model.module.proj_out.weight.data
        assert not torch.allclose(prompted.velocity(*inputs), plain[0])
    assert len(captured) == 3


def test_graphs_are_refused_where_they_cannot_be(load):
    model = load()
    with pytest.raises(NotImplementedError, match="on a CUDA device, got cpu; try compile_blocks"):
        runtime.graph_rollout(model)
    for buckets in ((), (0, 2), (4, 2), (2, 2)):
        with pytest.raises(ValueError, match="buckets must be increasing positive numbers, got"):
            runtime.graph_rollout(model, buckets)
    assert model.rollout_predict is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_graphs_equal_eager_calls(name, load):
    model = load(name, device="cuda")
    prompted = model.with_prompts(PROMPTS)
    calls = [rows(model), rows(model, seed=1), rows(model, [0.4] * 3, [0, 1, 2])]
    calls = [[value.cuda() for value in inputs] for inputs in calls]
    with torch.no_grad():
        plain = [prompted.velocity(*inputs) for inputs in calls]
        change = runtime.graph_rollout(model, (2, 4))
        for inputs, wanted in zip(calls * 2, plain * 2, strict=True):
            close(prompted.velocity(*inputs), wanted)
        parameter = next(p for p in model.module.parameters() if p.ndim > 1)
        parameter.mul_(1.5)
        replayed = prompted.velocity(*calls[0])
        assert not torch.allclose(replayed, plain[0])
        change.undo()
        close(replayed, prompted.velocity(*calls[0]))


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
