"""A plain-torch MMDiT with random weights and the shapes of SD3.5-M: nothing to download.

Joint attention blocks of an image and a text stream, AdaLN of (noise level, pooled text), RMSNorm
of queries and keys, MLPs of four times the width. The base is frozen; trained is a LoRA on the
attention projections. SD3.5-M itself has 13 more image attentions and a shorter last block.
Letters: B rows, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STD = 0.02
"""Of the weights at SD3.5-M's width; narrower ones are larger, so that as much gets through."""
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Shapes of a model."""

    width: int
    heads: int
    blocks: int
    side: int
    """Of the latent; patches are 2 x 2."""
    text_tokens: int
    text_width: int
    pooled_width: int
    rank: int
    """Of the LoRA."""
    channels: int = 16
    frequencies: int = 256

    @property
    def image_tokens(self) -> int:
        return (self.side // 2) ** 2

    @property
    def flops(self) -> float:
        """Of one row's forward, LoRA and modulation left out: 2 per multiply-add."""
        tokens = self.image_tokens + self.text_tokens
        # q, k, v, out and a four times wider MLP: 12 C^2 weights; q k and its product with v
        block = 2 * tokens * 12 * self.width**2 + 4 * tokens**2 * self.width
        ends = 2 * self.image_tokens * 2 * (4 * self.channels) * self.width
        return self.blocks * block + ends + 2 * self.text_tokens * self.text_width * self.width


SD35M = MMDiTConfig(
    width=1536, heads=24, blocks=24, side=64, text_tokens=205, text_width=4096, pooled_width=2048,
    rank=32,
)  # fmt: skip
SMALL = MMDiTConfig(
    width=64, heads=2, blocks=2, side=8, text_tokens=5, text_width=24, pooled_width=16, rank=4,
    channels=4, frequencies=16,
)  # fmt: skip
"""The same class, for tests and for the checks of gradients."""


class LoRALinear(nn.Linear):
    """A frozen projection and a trained correction of low rank, in the weights' dtype."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__(width_in, width_out)
        self.down = nn.Parameter(torch.empty(rank, width_in))
        self.up = nn.Parameter(torch.empty(width_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Stream(nn.Module):
    """What a block has once for the image and once for the text."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, rank = config.width, config.rank
        self.heads = config.heads
        self.modulation = nn.Linear(width, 6 * width)
        self.q, self.k, self.v, self.out = (LoRALinear(width, width, rank) for _ in range(4))
        self.q_scale, self.k_scale = (
            nn.Parameter(torch.empty(width // config.heads)) for _ in range(2)
        )
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms, modulates and projects to queries, keys and values, (B, tokens, H, D) each."""
        h = modulate(x, shift, scale)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        sizes = q.shape[-1:]
        return F.rms_norm(q, sizes, self.q_scale, EPS), F.rms_norm(k, sizes, self.k_scale, EPS), v

    def finish(self, x: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Adds what attention found, then the MLP."""
        gate, shift, scale, mlp_gate = parts
        x = x + gate * self.out(attended)
        h = F.gelu(self.wide(modulate(x, shift, scale)), approximate="tanh")
        return x + mlp_gate * self.narrow(h)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Joint attention of both streams, and an MLP for each."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.image, self.text = Stream(config), Stream(config)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        tables = [
            stream.modulation(condition)[:, None].chunk(6, dim=-1)
            for stream in (self.image, self.text)
        ]
        projected = (
            stream.project(x, *table[:2])
            for stream, x, table in zip((self.image, self.text), (image, text), tables, strict=True)
        )
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(*projected, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        of_image, of_text = attended.split([image.shape[1], text.shape[1]], dim=1)
        return (
            self.image.finish(image, of_image, tables[0][2:]),
            self.text.finish(text, of_text, tables[1][2:]),
        )


class MMDiT(nn.Module):
    """Velocity of latents (B, channels, side, side) at sigma (B,) under text."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config, width, patch = config, config.width, 4 * config.channels
        self.patches, self.context = nn.Linear(patch, width), nn.Linear(config.text_width, width)
        self.position = nn.Parameter(torch.empty(config.image_tokens, width))
        self.level = nn.Sequential(
            nn.Linear(config.frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.pooled = nn.Sequential(
            nn.Linear(config.pooled_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.last, self.head = nn.Linear(width, 2 * width), nn.Linear(width, patch)

    def condition(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        """Embeds noise levels and pooled text, (B, C)."""
        half = self.config.frequencies // 2
        exponent = torch.arange(half, device=sigma.device, dtype=sigma.dtype) / half
        angle = 1000 * sigma[:, None] * torch.exp(-math.log(10_000) * exponent)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(pooled.dtype)
        return F.silu(self.level(waves) + self.pooled(pooled))

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        rows, channels, side, _ = x.shape
        tokens = x.to(text.dtype).view(rows, channels, side // 2, 2, side // 2, 2)
        image = self.patches(tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        image, text = image + self.position, self.context(text)
        condition = self.condition(sigma, pooled)
        for block in self.blocks:
            image, text = block(image, text, condition)
        shift, scale = self.last(condition)[:, None].chunk(2, dim=-1)
        out = self.head(modulate(image, shift, scale))
        out = out.view(rows, side // 2, side // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(x.shape)


class MMDiTModel:
    """The `Model` of an MMDiT and of some prompts, whose text is random.

    Args:
        config: shapes.
        num_prompts: texts to draw.
        device: where weights are made; the same device gives the same weights.
        dtype: of weights and activations. Latents stay float32, or float64 with it.
    """

    def __init__(
        self, config: MMDiTConfig, num_prompts: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.latent_shape = config, (config.channels, config.side, config.side)
        with torch.device("meta"):
            module = MMDiT(config)
        self.module = module.to(dtype).to_empty(device=device)
        generator, std = torch.Generator(device).manual_seed(0), STD * (1536 / config.width) ** 0.5
        for name, parameter in self.module.named_parameters():
            lora = name.endswith((".down", ".up"))
            parameter.requires_grad_(lora)
            with torch.no_grad():
                mean = 1.0 if name.endswith("_scale") else 0.0
                parameter.normal_(mean, std, generator=generator)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.text = draw(num_prompts, config.text_tokens, config.text_width)
        self.text_pooled = draw(num_prompts, config.pooled_width)

    def with_prompts(self, _prompts: Sequence[str]) -> MMDiTModel:
        return self

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return self.module(x, sigma, self.text[prompt], self.text_pooled[prompt])

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        raise NotImplementedError("MMDiTModel: the benchmark must run without KL")

    def decode(self, latents: Tensor) -> Tensor:
        return latents.mean(1)
