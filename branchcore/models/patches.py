"""Families whose tokens are 2x2 patches made outside the transformer: FLUX.1 and Qwen-Image.

A token holds its patch channel by channel, rows before columns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from branchcore.credit import Floats
from branchcore.models.family import Family, Size
from branchcore.models.schedules import even_sigmas


class PatchFamily(Family):
    """What they have in common: latents (C, H, W), tokens (N, H/2 * W/2, 4 C), noise levels."""

    def latent_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        """Returns (16, height / 8, width / 8)."""
        channels, factor = pipe.transformer.config.in_channels // 4, pipe.vae_scale_factor
        return (channels, size.height // factor, size.width // factor)

    def sigmas(self, pipe: Any, steps: int, latent_shape: tuple[int, ...]) -> Floats:
        """Returns even noise levels, shifted by the number of tokens where the scheduler does."""
        return even_sigmas(pipe.scheduler, steps, latent_shape[1] * latent_shape[2] // 4)

    def pack(self, x: Tensor) -> Tensor:
        """Returns (N, H/2 * W/2, 4 C) of (N, C, H, W)."""
        n, c, h, w = x.shape
        patches = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(n, (h // 2) * (w // 2), 4 * c)

    def unpack(self, v: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """Returns (N, C, H, W) of (N, H/2 * W/2, 4 C)."""
        c, h, w = latent_shape
        patches = v.reshape(len(v), h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(len(v), c, h, w)
