"""Small transformers of every accelerated class, inputs with rows in common, what they compute."""

import diffusers
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from branchcore.models import flux, qwen_image, sana, sd3, wan
from branchcore.models.sharing import Rows

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PROMPT, SIGMA = np.array([0, 0, 1, 0]), np.array([0.3, 0.3, 0.9, 0.9])
TEXT, WIDTH = 5, 24


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
