"""Diffusers families with random weights as the plans drive them: LoRA, guidance, a whole decoder.

Weights are random, modulation and LoRA included, and the decoder is of the release's own class: no
file is read. A small model of the same classes stands for a large one in the checks.
Letters: N rows of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from branchcore.models.family import Size
from branchcore.models.prompted_flow import PromptedFlow
from branchcore.models.sizing.published import SHAPES, Architecture, Shape
from branchcore.models.sizing.shapes import flow_model
from branchcore.models.weights import add_lora

RANK = 32


class Family(NamedTuple):
    """A published shape, its guidance, and what is timed of it at once."""

    shape: str
    guidance: float
    """Scale of classifier-free guidance, which makes a row two; 1 = off or embedded."""
    max_batch: int
    """Rows with a graph of the tape that fit in 139 GiB at once, by the modelled bytes."""


FAMILIES = {
    "sd35m512": Family("sd35m-512", 4.5, 16),
    "flux512": Family("flux-512", 1.0, 8),
    "qwen512": Family("qwen-512", 4.0, 8),
    "wan240": Family("wan-240p33", 5.0, 8),
    "sana": Family("sana-1024", 4.5, 16),
}
_KL_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1,
}
_VIDEO_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_DC_VAE = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}


class Small(NamedTuple):
    """What replaces a release's numbers, so that its classes run anywhere in milliseconds."""

    transformer: Mapping[str, Any]
    text: Mapping[str, tuple[int, ...]]
    vae: Mapping[str, Any]
    size: Size


SMALL = {
    "sd3": Small(
        {
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
            "joint_attention_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        {"embeds": (0, 32), "pooled": (32,)},
        _KL_VAE,
        Size(16, 16),
    ),
    "flux": Small(
        {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
        },
        {"embeds": (0, 32), "pooled": (32,)},
        _KL_VAE,
        Size(16, 16),
    ),
    "qwen_image": Small(
        {
            "in_channels": 64, "out_channels": 16, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
        },
        {"embeds": (0, 32)},
        _VIDEO_VAE,
        Size(64, 64),
    ),
    "wan": Small(
        {
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32,
            "freq_dim": 32, "ffn_dim": 48,
        },
        {"embeds": (0, 32)},
        _VIDEO_VAE,
        Size(64, 64, 5),
    ),
    "sana": Small(
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 12, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 32,
            "sample_size": 16,
        },
        {"embeds": (0, 32), "mask": (0,)},
        _DC_VAE,
        Size(32, 32),
    ),
}  # fmt: skip
SMALL_TOKENS = 12


def small(architecture: Architecture) -> Shape:
    """Returns a small shape of the same classes."""
    changed = SMALL[architecture.family]
    own = architecture._replace(
        transformer=changed.transformer,
        text=changed.text,
        vae=(architecture.vae[0], changed.vae),
    )
    return Shape(own, changed.size, SMALL_TOKENS)


class ReleasedView(PromptedFlow):
    """A view that also computes velocities at the price the released loops pay."""

    def released_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the guided velocity, (N, *latent_shape), nothing shared between rows.

        Both halves are one call and both are in the graph; the unconditional one is detached
        afterwards, as in Flow-GRPO's scripts/train_sd3.py.
        """
        model, family = self.model, self.model.family
        packed, shape = family.pack(x.to(model.dtype)), model.latent_shape
        if model.guidance == 1.0:
            text = {name: value[prompt] for name, value in self.text.items()}
            return family.unpack(family.predict(model.module, packed, sigma, text, shape), shape)
        both = torch.cat([torch.full_like(prompt, self._null), prompt])
        text = {name: value[both] for name, value in self.text.items()}
        halves = family.predict(model.module, torch.cat([packed] * 2), sigma.repeat(2), text, shape)
        uncond, cond = halves.detach().chunk(2)[0], halves.chunk(2)[1]
        if cond.dtype == torch.bfloat16:
            cond, uncond = cond.float(), uncond.float()
        return family.unpack(family.guide(cond, uncond, model.guidance), shape)


class FamilyModel:
    """The `Model` of a family with random weights and a LoRA of rank 32 that is not zero.

    Args:
        name: one of `FAMILIES`.
        full: the published size, else the small one.
        device: where weights are made; the same device gives the same weights.
        dtype: of the base and of activations; the LoRA is fp32, or fp64 with it.
    """

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, *, full: bool = True
    ) -> None:
        family = FAMILIES[name]
        published = SHAPES[family.shape]
        shape = published if full else small(published.architecture)
        self.flow = flow_model(shape, device, dtype, guidance=family.guidance)
        add_lora(self.flow, rank=RANK if full else 4)
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in self.module.named_parameters():
            if "lora_B" in parameter_name:
                drawn = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    parameter.copy_(0.02 * drawn)

    @property
    def module(self) -> torch.nn.Module:
        return self.flow.module

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.flow.latent_shape

    def with_prompts(self, prompts: Sequence[str]) -> ReleasedView:
        return ReleasedView(self.flow, self.flow.with_prompts(prompts).text)

    def decode(self, latents: Tensor) -> Tensor:
        return self.flow.decode(latents)
