"""What differs between families of flow models: encoding, conditioning, packing, decoding.

Letters: N rows of a call, P prompts, L images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from branchcore.credit import Floats
from branchcore.models.sharing import Kind, Sharing
from branchcore.plan import Ints

Text = dict[str, Tensor]
"""Conditioning by name: without a batch axis of one prompt, with one of several."""


class Size(NamedTuple):
    """What is generated: pixels, and frames of a video (1 = an image)."""

    height: int
    width: int
    frames: int = 1


class Family(ABC):
    """One architecture of diffusers as the engine drives it; its files hold one final subclass."""

    name: ClassVar[str]
    pipeline: ClassVar[str]
    """Class of diffusers that `from_pretrained` loads."""
    transformer: ClassVar[str]
    """Class of its transformer."""
    shared: ClassVar[Mapping[str, Kind]]
    """Modules that depend on the prompt, the noise level or both only."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Default modules of a LoRA, by the ends of their names."""
    pixel_multiple: ClassVar[int] = 16
    """Height and width are multiples of it."""
    max_text_tokens: int
    """Tokens of a prompt at most; also what shorter ones are padded to where a family pads."""

    @classmethod
    def check_size(cls, size: Size) -> None:
        """Raises ValueError unless the model can make this size."""
        for name in ("height", "width"):
            value, step = getattr(size, name), cls.pixel_multiple
            if value < step or value % step:
                raise ValueError(
                    f"{cls.name}: {name} must be a positive multiple of {step}, got {value}; "
                    f"try {max(step, round(value / step) * step)}"
                )
        if size.frames != 1:
            raise ValueError(f"{cls.name}: frames must be 1, got {size.frames}")

    def check_guidance(self, guidance: float, config: Mapping[str, Any]) -> None:
        """Raises ValueError unless a model of this configuration takes classifier-free guidance."""
        if not 1.0 <= guidance < math.inf:
            raise ValueError(f"{self.name}: guidance must be at least 1 (1 = off), got {guidance}")
        if guidance > 1.0 and config.get("guidance_embeds"):
            raise ValueError(
                f"{self.name}: guidance must be 1 for a guidance-distilled model, got {guidance}; "
                "try embedded_guidance"
            )

    def check_config(  # noqa: B027
        self, pipeline: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Raises NotImplementedError for variants of the architecture that are not supported.

        Args:
            pipeline: what model_index.json says.
            config: of the transformer.
        """

    def latent_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        """Returns the shape of one latent, as the VAE decodes it."""
        factor = pipe.vae_scale_factor
        return (pipe.transformer.config.in_channels, size.height // factor, size.width // factor)

    @abstractmethod
    def sigmas(self, pipe: Any, steps: int, latent_shape: tuple[int, ...]) -> Floats:
        """Returns the pipeline's own (steps + 1,) noise levels, the last 0."""

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[str]) -> list[Text]:
        """Encodes prompts that passed `check_prompts`, each without a batch axis."""

    @abstractmethod
    def tokens(self, pipe: Any, prompt: str) -> int:
        """Returns the tokens of a prompt, of which an encoder takes `token_limit` at most."""

    def token_limit(self, pipe: Any) -> int:
        """Returns how many tokens of a prompt the encoders take."""
        return self.max_text_tokens

    def check_prompts(self, pipe: Any, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that an encoder would cut."""
        limit = self.token_limit(pipe)
        for prompt in prompts:
            self.check_length(prompt, self.tokens(pipe, prompt), limit)

    def check_length(self, prompt: str, tokens: int, limit: int) -> None:
        """Raises ValueError for a prompt that an encoder would cut."""
        if tokens > limit:
            start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise ValueError(
                f"{self.name}: prompt must have at most {limit} tokens, got {tokens} in {start!r}; "
                "try a shorter prompt or max_text_tokens"
            )

    def encode_negative(self, pipe: Any, prompt: str) -> Text:
        """Encodes the prompt of the unconditional half, if it is not too long."""
        self.check_prompts(pipe, [prompt])
        return self.encode(pipe, [prompt])[0]

    def stack(self, texts: Sequence[Text]) -> Text:
        """Returns the (P, ...) conditioning of several prompts."""
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def text_lengths(self, text: Text) -> Ints | None:
        """Returns (P,) how many tokens of every prompt count; None where all are padded alike."""
        return None

    def cut(self, text: Text, length: int) -> Text:
        """Returns (N, ...) conditioning without what lies past `length` tokens: padding."""
        return text

    def pack(self, x: Tensor) -> Tensor:
        """Returns latents as the transformer takes them."""
        return x

    def unpack(self, v: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """Returns the transformer's result as (N, *latent_shape)."""
        return v

    @abstractmethod
    def predict(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: Text, shape: tuple[int, ...]
    ) -> Tensor:
        """Calls the transformer.

        Args:
            transformer: the module.
            x: packed states of N rows, in the transformer's dtype.
            sigma: (N,) fp32 or fp64 noise levels.
            text: (N, ...) conditioning of every row.
            shape: of one latent.
        """

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Combines packed velocities of both halves of classifier-free guidance."""
        return uncond + scale * (cond - uncond)

    @abstractmethod
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Returns (L, 3, H, W) images or (L, F, 3, H, W) videos in [0, 1], fp32."""

    def fold_cross_attention(self, transformer: nn.Module, sharing: Sharing) -> list[str]:
        """Computes text keys and values of cross-attention once per prompt; returns the names."""
        return []
