"""Stable Diffusion 3 and 3.5: an MMDiT, two CLIP encoders and T5, 16-channel latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchcore.credit import Floats
from branchcore.models.family import Family, Size, Text
from branchcore.models.flow_model import FlowModel
from branchcore.models.loading import load
from branchcore.models.schedules import scheduler_sigmas, shift_of


class SD3(Family):
    """The family; see `from_pretrained`."""

    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    transformer = "SD3Transformer2DModel"
    shared = {
        "context_embedder": "prompt",
        "time_text_embed": "node",
        "transformer_blocks.*.norm1.linear": "node",
        "transformer_blocks.*.norm1_context.linear": "node",
        "norm_out.linear": "node",
    }
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, max_text_tokens: int = 256) -> None:
        self.max_text_tokens = max_text_tokens

    def sigmas(self, pipe: Any, steps: int, latent_shape: tuple[int, ...]) -> Floats:
        """Returns the scheduler's sigmas, shifted by the number of tokens if it asks for that."""
        options: dict[str, float] = {}
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            patch = pipe.transformer.config.patch_size
            tokens = (latent_shape[1] // patch) * (latent_shape[2] // patch)
            options["mu"] = shift_of(pipe.scheduler, tokens, max_shift=1.16)
        pipe.scheduler.set_timesteps(steps, **options)
        return scheduler_sigmas(pipe.scheduler)

    def tokens(self, pipe: Any, prompt: str) -> int:
        """Returns T5's tokens; CLIP cuts at 77, as it does in the pipeline."""
        return 0 if pipe.text_encoder_3 is None else len(pipe.tokenizer_3(prompt).input_ids)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> list[Text]:
        """Encodes by CLIP-L, CLIP-G and T5."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
        )
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def predict(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: Text, shape: tuple[int, ...]
    ) -> Tensor:
        """Calls the transformer at timestep 1000 sigma."""
        return transformer(
            hidden_states=x,
            encoder_hidden_states=text["embeds"],
            pooled_projections=text["pooled"],
            timestep=1000 * sigma,
            return_dict=False,
        )[0]

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns (L, 3, H, W) in [0, 1]."""
        return decode_image(vae, latents)


def decode_image(vae: Any, latents: Tensor) -> Tensor:
    """Returns (L, 3, H, W) in [0, 1] of unscaled latents, by an AutoencoderKL."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    image = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return (image.float() / 2 + 0.5).clamp(0, 1)


def from_pretrained(
    path: str | Path,
    *,
    height: int = 512,
    width: int = 512,
    guidance: float = 4.5,
    negative_prompt: str = "",
    max_text_tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> FlowModel:
    """Loads Stable Diffusion 3 or 3.5.

    Args:
        path: folder of a diffusers pipeline, or its name on the Hugging Face hub.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        guidance: scale of classifier-free guidance, 1 = off.
        negative_prompt: of the unconditional half.
        max_text_tokens: T5 tokens; prompts are padded to it.
        dtype: of weights and activations; states are fp32.
        device: where the model lives.

    Raises:
        ValueError, OSError: see `loading.load`.
    """
    return load(
        SD3(max_text_tokens),
        path,
        Size(height, width),
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=dtype,
        device=device,
    )
