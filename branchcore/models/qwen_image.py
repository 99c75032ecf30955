"""Qwen-Image: an MMDiT on Qwen2.5-VL's text, packed 16-channel latents of a video VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from branchcore.models.family import Size, Text
from branchcore.models.flow_model import FlowModel
from branchcore.models.loading import load
from branchcore.models.patches import PatchFamily
from branchcore.plan import Ints

UNSUPPORTED = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImage(PatchFamily):
    """The family; see `from_pretrained`."""

    name = "qwen_image"
    pipeline = "QwenImagePipeline"
    transformer = "QwenImageTransformer2DModel"
    shared = {
        "txt_norm": "prompt",
        "txt_in": "prompt",
        "time_text_embed": "sigma",
        "transformer_blocks.*.img_mod": "sigma",
        "transformer_blocks.*.txt_mod": "sigma",
        "norm_out.linear": "sigma",
    }
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, max_text_tokens: int = 512) -> None:
        self.max_text_tokens = max_text_tokens

    def check_config(self, pipeline: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Raises NotImplementedError for the editing and layered variants."""
        for option in UNSUPPORTED:
            if config.get(option):
                raise NotImplementedError(
                    f"{self.name}: {option} of the transformer must be false, got {config[option]}"
                )

    def tokens(self, pipe: Any, prompt: str) -> int:
        """Returns the tokens after the template's own."""
        whole = pipe.tokenizer(pipe.prompt_template_encode.format(prompt)).input_ids
        return len(whole) - pipe.prompt_template_encode_start_idx

    def token_limit(self, pipe: Any) -> int:
        """Returns what neither `max_text_tokens` nor the pipeline's tokenizer cuts."""
        return min(self.max_text_tokens, pipe.tokenizer_max_length)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> list[Text]:
        """Encodes by Qwen2.5-VL within the pipeline's template; lengths differ."""
        limit = self.token_limit(pipe)
        embeds, mask = pipe.encode_prompt(list(prompts), max_sequence_length=limit)
        if mask is None:
            mask = torch.ones(embeds.shape[:2])
        return [{"embeds": row[own.bool()]} for row, own in zip(embeds, mask, strict=True)]

    def stack(self, texts: Sequence[Text]) -> Text:
        """Pads to the longest prompt, with a mask where that adds anything."""
        embeds = [text["embeds"] for text in texts]
        lengths = torch.tensor([len(row) for row in embeds])
        stacked = {"embeds": pad_sequence(embeds, batch_first=True)}
        if len(lengths.unique()) > 1:
            stacked["mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return stacked

    def text_lengths(self, text: Text) -> Ints:
        """Returns the prompts' own lengths."""
        count, longest = text["embeds"].shape[:2]
        own = text["mask"].sum(1).cpu().numpy() if "mask" in text else np.full(count, longest)
        return own.astype(np.int64)

    def cut(self, text: Text, length: int) -> Text:
        """Cuts states and mask."""
        return {name: value[:, :length] for name, value in text.items()}

    def predict(
        self, transformer: Any, x: Tensor, sigma: Tensor, text: Text, shape: tuple[int, ...]
    ) -> Tensor:
        """Calls the transformer at timestep sigma, rounded as the pipeline rounds it."""
        return transformer(
            hidden_states=x,
            encoder_hidden_states=text["embeds"],
            encoder_hidden_states_mask=text.get("mask"),
            timestep=(1000 * sigma).to(x.dtype) / 1000,
            img_shapes=[[(1, shape[1] // 2, shape[2] // 2)]],
            return_dict=False,
        )[0]

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guides, and gives every token the norm that it has without guidance."""
        guided = super().guide(cond, uncond, scale)
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns (L, 3, H, W) in [0, 1]; the VAE takes an image as a video of one frame."""
        mean, std = (
            torch.tensor(values, dtype=latents.dtype, device=latents.device)[:, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = (latents * std + mean)[:, :, None].to(vae.dtype)
        image = vae.decode(frames, return_dict=False)[0][:, :, 0]
        return (image.float() / 2 + 0.5).clamp(0, 1)


def from_pretrained(
    path: str | Path,
    *,
    height: int = 512,
    width: int = 512,
    guidance: float = 4.0,
    negative_prompt: str = " ",
    max_text_tokens: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> FlowModel:
    """Loads Qwen-Image.

    Args:
        path: folder of a diffusers pipeline, or its name on the Hugging Face hub.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        guidance: scale of classifier-free guidance with its norm kept, 1 = off.
        negative_prompt: of the unconditional half.
        max_text_tokens: tokens of a prompt at most, up to the pipeline's 1024; shorter ones are
            not padded to it.
        dtype: of weights and activations; states are fp32.
        device: where the model lives.

    Raises:
        ValueError, OSError: see `loading.load`.
    """
    return load(
        QwenImage(max_text_tokens),
        path,
        Size(height, width),
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=dtype,
        device=device,
    )
