"""Folded cross-attention against diffusers' own processors: values, gradients, rows, errors."""

import numpy as np
import pytest
import torch

from branchcore.models.cross_attention import CrossAttention, install
from branchcore.models.sharing import Rows, Sharing

pytest.importorskip("diffusers")
S, L, HEADS, C = 5, 7, 2, 12
WIDTH = HEADS * C
# The prompts of a call's rows, and (prompts, rows of each) of its attention calls.
CALLS = {
    "one prompt": ([3, 3, 3, 3], [(1, 4)]),
    "prompt after prompt": ([0, 0, 1, 1, 2, 2], [(3, 2)]),
    "with guidance": ([0, 0, 1, 1, 9, 9, 9, 9], [(2, 2), (1, 4)]),
    "unequal and mixed": ([2, 0, 1, 2, 0, 2], [(1, 1), (1, 2), (1, 3)]),
    "mixed": ([0, 1, 0, 1], [(2, 2)]),
    "all distinct": ([4, 1, 2], None),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def attention(kind, adapters):
    """A cross-attention of Wan or SANA within a module, as blocks have it; weights drawn."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    if kind == "wan":
        one = WanAttention(
            WIDTH, HEADS, C, cross_attention_dim_head=C, processor=WanAttnProcessor()
        )
    else:
        # Without the norm of SANA 1.5, which diffusers computes in fp32 whatever the weights are.
        one = Attention(
            WIDTH, WIDTH, heads=HEADS, dim_head=C, bias=True, processor=SanaAttnProcessor2_0()
        )
    block = torch.nn.ModuleDict({"attn2": one})
    if adapters:
        peft = pytest.importorskip("peft")
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        peft.inject_adapter_in_model(config, block)
    for i, (_, p) in enumerate(sorted(block.named_parameters())):
        noise = torch.randn(p.shape, generator=seeded(i))
        p.data = noise / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.3 * noise
        p.requires_grad_(True)
    return block.double()


def inputs(prompt, dtype=torch.float64):
    """Queries of every row; text and mask equal in the rows of a prompt."""
    x = torch.randn(len(prompt), S, WIDTH, generator=seeded(1), dtype=torch.float64)
    text = torch.randn(10, L, WIDTH, generator=seeded(2), dtype=torch.float64)
    lengths = torch.arange(10) % 4 + 3
    mask = -10000.0 * (torch.arange(L) >= lengths[:, None]).double()[:, None]
    index = torch.tensor(prompt)
    return x.to(dtype), text.to(dtype)[index], mask.to(dtype)[index]


def call(block, kind, x, text, mask):
    if kind == "wan":
        return block["attn2"](x, text, None, None)
    return block["attn2"](x, encoder_hidden_states=text, attention_mask=mask)


def rows_of(prompt):
    return Rows(np.full(len(prompt), 0.5), np.array(prompt), torch.device("cpu"))


def results(block, kind, prompt, run, dtype=torch.float64):
    """Output and gradients of everything; of the text, those of a prompt's rows added up."""
    x, text, mask = inputs(prompt, dtype)
    x, text = x.clone().requires_grad_(), text.clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    out = run(lambda *args: call(block, kind, *args, mask), x, text)
    weight = torch.randn(out.shape, generator=seeded(5), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    texts = torch.zeros(10, L, WIDTH).to(text).index_add(0, torch.tensor(prompt), text.grad)
    grads = {name: p.grad for name, p in block.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {"out": out.detach(), "x": x.grad, "text": texts, **grads}


def difference(a, b):
    return (a - b).abs().max().item()


def folded(block):
    sharing = Sharing(torch.nn.Module(), {})
    assert install(block, sharing, "attn2") == ["attn2"]
    return sharing


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", ["wan", "sana"])
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_equal_the_plain_processor(kind, name, adapters):
    prompt, _ = CALLS[name]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        block = attention(kind, adapters).to(dtype)
        expected = results(block, kind, prompt, lambda f, *args: f(*args), dtype)
        sharing = folded(block)

        def run(f, *args, sharing=sharing):
            with sharing.using(rows_of(prompt)):
                return f(*args)

        got = results(block, kind, prompt, run, dtype)
        # The gradient of a key's bias is zero but for the rounding of terms of this size.
        scale = max(value.abs().max().item() for value in expected.values())
        for key, value in expected.items():
            assert difference(got[key], value) <= tolerance * scale, (key, dtype)


@pytest.mark.parametrize("kind", ["wan", "sana"])
@pytest.mark.parametrize("name", CALLS)
def test_keys_and_values_run_on_distinct_prompts_only(kind, name, monkeypatch):
    from diffusers.models import attention_dispatch

    prompt, groups = CALLS[name]
    block, (x, text, mask), seen, calls = attention(kind, False), inputs(prompt), {}, []
    sharing, plain = folded(block), attention_dispatch.dispatch_attention_fn
    for layer in ("to_q", "to_k", "to_v"):
        block["attn2"].get_submodule(layer).register_forward_hook(
            lambda _, args, __, layer=layer: seen.setdefault(layer, []).append(len(args[0]))
        )

    def dispatch(query, key, value, **kwargs):
        calls.append((tuple(query.shape), len(key), kwargs["backend"]))
        return plain(query, key, value, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", dispatch)
    backend = attention_dispatch.AttentionBackendName("_native_math")
    block["attn2"].processor._attention_backend = backend
    with sharing.using(rows_of(prompt)):
        call(block, kind, x, text, mask)
    distinct = len(set(prompt))
    assert seen == {"to_q": [len(prompt)], "to_k": [distinct], "to_v": [distinct]}
    expected = [(len(prompt), 1)] if groups is None else groups
    assert calls == [((u, c * S, HEADS, C), u, backend) for u, c in expected]
    assert CrossAttention._attention_backend is None


def test_rows_that_lie_prompt_after_prompt_are_not_moved():
    assert rows_of([0, 0, 1, 1, 9, 9, 9, 9]).fold().order is None
    fold = rows_of([2, 0, 1, 2, 0, 2]).fold()
    assert fold.first.tolist() == [2, 1, 0]
    assert fold.order.tolist() == [2, 1, 4, 0, 3, 5]
    assert fold.order[fold.back].tolist() == list(range(6))
    assert rows_of([4, 1, 2]).fold() is None


def test_masked_keys_do_not_matter_and_others_do():
    block, prompt = attention("sana", False), [0, 0, 1]
    x, text, mask = inputs(prompt)
    sharing = folded(block)
    changed = {}
    for key in (2, L - 1):
        other = text.clone()
        other[:, key] += 1.0
        with sharing.using(rows_of(prompt)):
            before, after = (call(block, "sana", x, t, mask) for t in (text, other))
        changed[key] = difference(before, after)
    assert changed[L - 1] == 0.0
    assert changed[2] > 1e-2


@pytest.mark.parametrize("kind", ["wan", "sana"])
def test_recomputation_of_a_checkpointed_block_folds_too(kind):
    prompt, _ = CALLS["unequal and mixed"]
    block, rows = attention(kind, False), []
    expected = results(block, kind, prompt, lambda f, *args: f(*args))
    sharing = folded(block)
    block["attn2"].to_k.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))

    def run(f, *args):
        with sharing.using(rows_of(prompt)):
            return sharing.checkpointed(f, *args)

    got = results(block, kind, prompt, run)
    assert rows == [3, 3]
    for key, value in expected.items():
        assert difference(got[key], value) <= 1e-12, key


@pytest.mark.parametrize("kind", ["wan", "sana"])
def test_without_rows_or_sharing_every_row_has_its_own_text(kind):
    block, (x, text, mask) = attention(kind, False), inputs([0, 1, 2])
    own, expected = block["attn2"].processor, call(block, kind, x, text, mask)
    sharing = folded(block)
    assert difference(call(block, kind, x, text, mask), expected) <= 1e-12
    sharing.undo()
    assert block["attn2"].processor is own
    block["attn2"].set_processor(CrossAttention())
    assert difference(call(block, kind, x, text, mask), expected) <= 1e-12


def test_a_renamed_attention_is_an_error():
    sharing = Sharing(torch.nn.Module(), {})
    with pytest.raises(ValueError, match=r"ModuleDict must have modules 'blocks\.\*\.attn2'"):
        install(attention("wan", False), sharing, "blocks.*.attn2")
