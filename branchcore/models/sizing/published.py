"""Published transformers as data: the numbers of each release's config.json, and usual sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from branchcore.models.family import Size


class Architecture(NamedTuple):
    """A released model without its size: arguments of diffusers' classes."""

    family: str
    """Module of branchcore.models."""
    source: str
    """Repository on the Hugging Face hub whose config.json has these numbers."""
    parameters: float
    """Of the transformer, in billions."""
    transformer: Mapping[str, Any]
    text: Mapping[str, tuple[int, ...]]
    """Shape per prompt of what the text encoders give; 0 = the number of tokens."""
    vae: tuple[str, Mapping[str, Any]]
    """Class of the decoder and its arguments."""
    scheduler: Mapping[str, Any]
    """Arguments of the flow-matching Euler scheduler."""


class Shape(NamedTuple):
    """An architecture at a size."""

    architecture: Architecture
    size: Size
    tokens: int
    """Text tokens."""


_KL_VAE: Mapping[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD3_VAE = {**_KL_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX_VAE = {**_KL_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_DC_AE: Mapping[str, Any] = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_SD3: Mapping[str, Any] = {
    "sample_size": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_SD3_TEXT = {"embeds": (0, 4096), "pooled": (2048,)}
_WAN: Mapping[str, Any] = {
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

SD35_MEDIUM = Architecture(
    family="sd3",
    source="stabilityai/stable-diffusion-3.5-medium",
    parameters=2.24,
    transformer={
        **_SD3,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    text=_SD3_TEXT,
    vae=("AutoencoderKL", _SD3_VAE),
    scheduler={"shift": 3.0},
)
SD35_LARGE = SD35_MEDIUM._replace(
    source="stabilityai/stable-diffusion-3.5-large",
    parameters=8.06,
    transformer={
        **_SD3,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
)
FLUX1_DEV = Architecture(
    family="flux",
    source="black-forest-labs/FLUX.1-dev",
    parameters=11.9,
    transformer={"guidance_embeds": True},
    text={"embeds": (0, 4096), "pooled": (768,)},
    vae=("AutoencoderKL", _FLUX_VAE),
    scheduler={"shift": 3.0, "use_dynamic_shifting": True},
)
QWEN_IMAGE = Architecture(
    family="qwen_image",
    source="Qwen/Qwen-Image",
    parameters=20.4,
    transformer={"num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584},
    text={"embeds": (0, 3584)},
    vae=("AutoencoderKLQwenImage", {}),
    scheduler={"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
)
WAN21_1B = Architecture(
    family="wan",
    source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    parameters=1.42,
    transformer={**_WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    text={"embeds": (0, 4096)},
    vae=("AutoencoderKLWan", {}),
    scheduler={"shift": 3.0},
)
WAN21_14B = WAN21_1B._replace(
    source="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    parameters=14.3,
    transformer={**_WAN, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
)
SANA_1600M = Architecture(
    family="sana",
    source="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    parameters=1.60,
    transformer={"num_layers": 20, "num_attention_heads": 70, "caption_channels": 2304},
    text={"embeds": (0, 2304), "mask": (0,)},
    vae=("AutoencoderDC", _DC_AE),
    scheduler={"shift": 3.0},
)

SHAPES: dict[str, Shape] = {
    "sd35m-512": Shape(SD35_MEDIUM, Size(512, 512), 205),
    "sd35m-1024": Shape(SD35_MEDIUM, Size(1024, 1024), 333),
    "sd35l-1024": Shape(SD35_LARGE, Size(1024, 1024), 333),
    "flux-512": Shape(FLUX1_DEV, Size(512, 512), 512),
    "flux-1024": Shape(FLUX1_DEV, Size(1024, 1024), 512),
    "qwen-512": Shape(QWEN_IMAGE, Size(512, 512), 128),
    "qwen-1024": Shape(QWEN_IMAGE, Size(1024, 1024), 128),
    "wan-240p33": Shape(WAN21_1B, Size(240, 416, 33), 512),
    "wan-480p81": Shape(WAN21_1B, Size(480, 832, 81), 512),
    "wan14b-480p81": Shape(WAN21_14B, Size(480, 832, 81), 512),
    "sana-1024": Shape(SANA_1600M, Size(1024, 1024), 300),
}
