"""FLUX.1 dev and schnell: a distilled MMDiT, CLIP and T5, packed 16-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchcore.models.family import Size, Text
from branchcore.models.flow_model import FlowModel
from branchcore.models.loading import load
from branchcore.models.patches import PatchFamily
from branchcore.models.sd3 import decode_image

EMBEDDED_GUIDANCE = 3.5


class Flux(PatchFamily):
    """The family; see `from_pretrained`."""

    name = "flux"
    pipeline = "FluxPipeline"
    transformer = "FluxTransformer2DModel"
    shared = {
        "context_embedder": "prompt",
        "time_text_embed": "node",
        "transformer_blocks.*.norm1.linear": "node",
        "transformer_blocks.*.norm1_context.linear": "node",
        "single_transformer_blocks.*.norm.linear": "node",
        "norm_out.linear": "node",
    }
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, max_text_tokens: int = 512, embedded_guidance: float | None = None) -> None:
        self.max_text_tokens, self.embedded_guidance = max_text_tokens, embedded_guidance

    def check_guidance(self, guidance: float, config: Mapping[str, Any]) -> None:
        """Raises ValueError unless each kind of guidance is one that the model has."""
        super().check_guidance(guidance, config)
        if self.embedded_guidance is not None and not config.get("guidance_embeds"):
            raise ValueError(
                f"{self.name}: embedded_guidance must be left out for a model without an embedding "
                f"of it (schnell), got {self.embedded_guidance}; try guidance"
            )

    def tokens(self, pipe: Any, prompt: str) -> int:
        """Returns T5's tokens; CLIP cuts at 77, as it does in the pipeline."""
        return len(pipe.tokenizer_2(prompt).input_ids)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> list[Text]:
        """Encodes by CLIP and T5."""
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts), prompt_2=None, max_sequence_length=self.max_text_tokens
        )
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def predict(
        self, transformer: Any, x: Tensor, sigma: Tensor, text: Text, shape: tuple[int, ...]
    ) -> Tensor:
        """Calls the transformer at timestep sigma, rounded as the pipeline rounds it."""
        guidance: Tensor | None = None
        if transformer.config.guidance_embeds:
            scale = self.embedded_guidance
            scale = EMBEDDED_GUIDANCE if scale is None else scale
            guidance = torch.full_like(sigma, scale)
        return transformer(
            hidden_states=x,
            encoder_hidden_states=text["embeds"],
            pooled_projections=text["pooled"],
            timestep=(1000 * sigma).to(x.dtype) / 1000,
            img_ids=image_ids(shape[1] // 2, shape[2] // 2, x.device),
            txt_ids=torch.zeros(text["embeds"].shape[1], 3, device=x.device),
            guidance=guidance,
            return_dict=False,
        )[0]

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Returns (L, 3, H, W) in [0, 1]."""
        return decode_image(vae, latents)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns (rows * columns, 3) fp32 positions (0, row, column)."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (1, rows, columns)]
    return torch.cartesian_prod(*axes)


def from_pretrained(
    path: str | Path,
    *,
    height: int = 512,
    width: int = 512,
    guidance: float = 1.0,
    negative_prompt: str = "",
    embedded_guidance: float | None = None,
    max_text_tokens: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> FlowModel:
    """Loads FLUX.1 dev or schnell.

    Args:
        path: folder of a diffusers pipeline, or its name on the Hugging Face hub.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        guidance: scale of classifier-free guidance, 1 = off; dev has none, its guidance is
            distilled into it.
        negative_prompt: of the unconditional half.
        embedded_guidance: what dev is told as its guidance; None = 3.5 for it, and schnell has
            none.
        max_text_tokens: T5 tokens; prompts are padded to it.
        dtype: of weights and activations; states are fp32.
        device: where the model lives.

    Raises:
        ValueError, OSError: see `loading.load`.
    """
    return load(
        Flux(max_text_tokens, embedded_guidance),
        path,
        Size(height, width),
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=dtype,
        device=device,
    )
