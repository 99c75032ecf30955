"""Wan 2.1 text to video: a DiT with cross-attention to UMT5, causal video latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchcore.credit import Floats
from branchcore.models.cross_attention import install
from branchcore.models.family import Family, Size, Text
from branchcore.models.flow_model import FlowModel
from branchcore.models.loading import load
from branchcore.models.schedules import flow_sigmas, timestep_of
from branchcore.models.sharing import Sharing


class Wan(Family):
    """The family; see `from_pretrained`."""

    name = "wan"
    pipeline = "WanPipeline"
    transformer = "WanTransformer3DModel"
    shared = {
        "condition_embedder.time_embedder": "sigma",
        "condition_embedder.time_proj": "sigma",
        "condition_embedder.text_embedder": "prompt",
    }
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, max_text_tokens: int, integer_timesteps: bool) -> None:
        self.max_text_tokens, self.integer_timesteps = max_text_tokens, integer_timesteps

    @classmethod
    def check_size(cls, size: Size) -> None:
        """Raises ValueError unless the size is a multiple of 16 and frames are 4 k + 1."""
        super().check_size(size._replace(frames=1))
        if size.frames < 1 or size.frames % 4 != 1:
            got, near = size.frames, max(0, round((size.frames - 1) / 4)) * 4 + 1
            raise ValueError(f"{cls.name}: num_frames must be 4 k + 1, got {got}; try {near}")

    def check_config(self, pipeline: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Refuses Wan 2.2 and image-conditioned transformers."""
        second = pipeline.get("transformer_2") or (None, None)
        wrong = {
            "transformer_2": second[1] is not None,
            "boundary_ratio": pipeline.get("boundary_ratio") is not None,
            "expand_timesteps": bool(pipeline.get("expand_timesteps")),
            "image_dim": config.get("image_dim") is not None,
            "added_kv_proj_dim": config.get("added_kv_proj_dim") is not None,
            "in_channels": config.get("in_channels") != config.get("out_channels"),
        }
        found = [name for name, is_wrong in wrong.items() if is_wrong]
        if found:
            raise NotImplementedError(
                f"{self.name}: pipeline must be Wan 2.1 text to video (one transformer, text "
                f"conditioning only), got a configuration with {', '.join(found)}"
            )

    def latent_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        """Returns (16, (frames - 1) / 4 + 1, height / 8, width / 8)."""
        channels, factor = pipe.transformer.config.in_channels, pipe.vae_scale_factor_spatial
        frames = (size.frames - 1) // pipe.vae_scale_factor_temporal + 1
        return (channels, frames, size.height // factor, size.width // factor)

    def sigmas(self, pipe: Any, steps: int, latent_shape: tuple[int, ...]) -> Floats:
        """Returns the scheduler's sigmas, UniPC's or Euler's, from 1."""
        return flow_sigmas(self.name, pipe.scheduler, steps)

    def tokens(self, pipe: Any, prompt: str) -> int:
        """Returns UMT5's tokens of the prompt as the pipeline cleans it."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return len(pipe.tokenizer(prompt_clean(prompt)).input_ids)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> list[Text]:
        """Encodes by UMT5, zeros after a prompt's end."""
        options = {"max_sequence_length": self.max_text_tokens}
        embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **options)
        return [{"embeds": one} for one in embeds]

    def predict(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: Text, shape: tuple[int, ...]
    ) -> Tensor:
        """Calls the transformer at timestep 1000 sigma."""
        return transformer(
            hidden_states=x,
            timestep=timestep_of(sigma, self.integer_timesteps),
            encoder_hidden_states=text["embeds"],
            return_dict=False,
        )[0]

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns (L, F, 3, H, W) in [0, 1]."""
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def fold_cross_attention(self, transformer: nn.Module, sharing: Sharing) -> list[str]:
        """Computes text keys and values of every block once per prompt; returns the names."""
        return install(transformer, sharing, "blocks.*.attn2")


def from_pretrained(
    path: str | Path,
    *,
    height: int = 240,
    width: int = 416,
    num_frames: int = 33,
    guidance: float = 5.0,
    negative_prompt: str = "",
    max_text_tokens: int = 512,
    integer_timesteps: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> FlowModel:
    """Loads Wan 2.1 text to video.

    Args:
        path: folder of a diffusers pipeline, or its name on the Hugging Face hub.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        num_frames: 4 k + 1; the latent has k + 1.
        guidance: scale of classifier-free guidance, 1 = off.
        negative_prompt: of the unconditional half.
        max_text_tokens: UMT5 tokens; prompts are padded to it.
        integer_timesteps: condition on floor(1000 sigma), as the pipeline's UniPC scheduler does.
        dtype: of weights and activations; what the model keeps in fp32 stays so, states are fp32.
        device: where the model lives.

    Raises:
        ValueError, OSError, NotImplementedError: see `loading.load`.
    """
    return load(
        Wan(max_text_tokens, integer_timesteps),
        path,
        Size(height, width, num_frames),
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=dtype,
        device=device,
    )
