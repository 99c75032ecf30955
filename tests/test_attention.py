"""Attention backends: every family's softmax attention goes through the one that was chosen."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from runtime_models import FAMILIES, PROMPTS, close, loader, rows

from branchcore.models import runtime
from branchcore.models.accelerate import accelerate
from branchcore.models.runtime import attention, probe


@pytest.fixture
def load(tiny_folder):
    return loader(tiny_folder)


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


@pytest.mark.parametrize(
    ("name", "training"), [("sd3", True), ("flux", True), ("flux", False), ("sana", True)]
)
def test_fused_blocks_come_before_a_backend_and_go_after_it(name, training, load):
    model = load(name)
    prompted, inputs = model.with_prompts(PROMPTS), rows(model)
    found = list(attention._attentions(model.module))
    stock = [part.processor for part in found]

    def choose():
        change = runtime.set_attention(model, "_native_math", training=training)
        assert {part.processor._attention_backend for part in found} == {"_native_math"}
        return change

    with torch.no_grad():
        plain = prompted.velocity(*inputs)
        change = choose()
        if name != "sana":  # whose fused attention has no softmax
            with pytest.raises(
                NotImplementedError, match=r"processor .*; try accelerate\(\) first"
            ):
                accelerate(model.module)
        change.undo()
        fused = accelerate(model.module)
        change = choose()
        close(prompted.velocity(*inputs), plain)
        if name != "sana":
            with pytest.raises(ValueError, match=r"got \w+ with _native_math; try undo\(\) of set"):
                fused.undo()
        change.undo()
        fused.undo()
        assert torch.equal(prompted.velocity(*inputs), plain)
    assert [part.processor for part in found] == stock


def test_the_joint_processor_equals_diffusers(load):
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    from branchcore.models.softmax_attention import JointAttention

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
