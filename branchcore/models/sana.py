"""SANA: a DiT with linear attention and cross-attention to Gemma 2, 32-channel DC-AE latents."""

from __future__ import annotations

import inspect
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


class Sana(Family):
    """The family; see `from_pretrained`."""

    name = "sana"
    pipeline = "SanaPipeline"
    transformer = "SanaTransformer2DModel"
    shared = {"time_embed": "sigma", "caption_projection": "prompt", "caption_norm": "prompt"}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    pixel_multiple = 32

    def __init__(
        self, max_text_tokens: int, instruction: Sequence[str] | None, integer_timesteps: bool
    ) -> None:
        self.max_text_tokens, self.instruction = max_text_tokens, instruction
        self.integer_timesteps = integer_timesteps

    def check_config(self, pipeline: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Refuses transformers that take guidance as an input (SANA-Sprint)."""
        if config.get("guidance_embeds"):
            raise NotImplementedError(
                f"{self.name}: pipeline must be SANA 1.0 or 1.5 with classifier-free guidance, got "
                "a configuration with guidance_embeds"
            )

    def sigmas(self, pipe: Any, steps: int, latent_shape: tuple[int, ...]) -> Floats:
        """Returns the scheduler's sigmas, DPM-Solver's or Euler's, from 1."""
        return flow_sigmas(self.name, pipe.scheduler, steps)

    def _lines(self, pipe: Any) -> list[str]:
        arguments = inspect.signature(type(pipe).__call__).parameters
        default = arguments["complex_human_instruction"].default
        return list(default if self.instruction is None else self.instruction)

    def tokens(self, pipe: Any, prompt: str) -> int:
        """Returns Gemma's tokens after the instruction's own."""
        before = "\n".join(self._lines(pipe))
        # The pipeline keeps the first token and the last max_text_tokens - 1 of the whole.
        dropped = len(pipe.tokenizer.encode(before)) - 2 if before else 0
        return len(pipe.tokenizer.encode(before + prompt.lower().strip())) - dropped

    def encode(self, pipe: Any, prompts: Sequence[str]) -> list[Text]:
        """Encodes by Gemma 2 after the instruction, whose own tokens are dropped."""
        return self._encode(pipe, prompts, self._lines(pipe))

    def encode_negative(self, pipe: Any, prompt: str) -> Text:
        """Encodes without the instruction, as the pipeline does."""
        tokens = len(pipe.tokenizer.encode(prompt.lower().strip()))
        self.check_length(prompt, tokens, self.max_text_tokens)
        return self._encode(pipe, [prompt], [])[0]

    def _encode(self, pipe: Any, prompts: Sequence[str], lines: list[str]) -> list[Text]:
        embeds, mask, _, _ = pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
            complex_human_instruction=lines,
        )
        return [{"embeds": e, "mask": m} for e, m in zip(embeds, mask, strict=True)]

    def predict(
        self, transformer: Any, x: Tensor, sigma: Tensor, text: Text, shape: tuple[int, ...]
    ) -> Tensor:
        """Calls the transformer; of a learned variance only the velocity is kept."""
        time = timestep_of(sigma, self.integer_timesteps)
        out = transformer(
            hidden_states=x,
            encoder_hidden_states=text["embeds"],
            encoder_attention_mask=text["mask"],
            timestep=time * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : shape[0]] if out.shape[1] == 2 * shape[0] else out

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns (L, 3, H, W) in [0, 1]."""
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        image = vae.decode(scaled, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def fold_cross_attention(self, transformer: nn.Module, sharing: Sharing) -> list[str]:
        """Computes text keys and values of every block once per prompt; returns the names."""
        return install(transformer, sharing, "transformer_blocks.*.attn2")


def from_pretrained(
    path: str | Path,
    *,
    height: int = 512,
    width: int = 512,
    guidance: float = 4.5,
    negative_prompt: str = "",
    max_text_tokens: int = 300,
    instruction: Sequence[str] | None = None,
    integer_timesteps: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> FlowModel:
    """Loads SANA 1.0 or 1.5.

    Sizes are taken as they are: the pipeline's mapping to trained aspect ratios
    (`use_resolution_binning`) is not done.

    Args:
        path: folder of a diffusers pipeline, or its name on the Hugging Face hub.
        height: pixels, a multiple of 32.
        width: pixels, a multiple of 32.
        guidance: scale of classifier-free guidance, 1 = off.
        negative_prompt: of the unconditional half; never has the instruction before it.
        max_text_tokens: Gemma tokens; prompts are padded to it.
        instruction: lines before every prompt; None = those of the pipeline, () = none.
        integer_timesteps: condition on floor(1000 sigma), as the pipeline's DPM-Solver does.
        dtype: of weights and activations; states are fp32.
        device: where the model lives.

    Raises:
        ValueError, OSError, NotImplementedError: see `loading.load`.
    """
    return load(
        Sana(max_text_tokens, instruction, integer_timesteps),
        path,
        Size(height, width),
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=dtype,
        device=device,
    )
