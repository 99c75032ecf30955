"""JPEG compressibility: how small the image is as a JPEG; needs no model."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from branchcore.rewards.images import check_positive, frames_of

_QUALITY = 95


class JpegCompressibility:
    """Size as a JPEG of quality 95, `{"jpeg": -kB}` with kB = 1000 bytes; on the CPU.

    Args:
        incompressibility: return `{"jpeg_incompressibility": +kB}` instead.
        frames: frames of a video that are scored, evenly spaced; the score is their mean.

    Raises:
        RuntimeError: Pillow is not installed.

    Source: Black et al. 2023, DDPO `rewards.py`. Flow-GRPO divides compressibility by 500.
    """

    def __init__(self, *, incompressibility: bool = False, frames: int | None = None) -> None:
        check_positive("JpegCompressibility", frames=frames)
        self.frames = frames
        self.name = "jpeg_incompressibility" if incompressibility else "jpeg"
        self.sign = 1.0 if incompressibility else -1.0
        self._pillow = _pillow()

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns the scores, (N,) fp32; prompts do not matter."""
        frames = frames_of("JpegCompressibility", images, self.frames)
        pixels = frames.flatten(0, 1).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = torch.tensor([self._bytes(x) for x in pixels]).view(frames.shape[:2])
        return {self.name: (self.sign * sizes.double().mean(1) / 1000.0).float()}

    def _bytes(self, pixels: Any) -> int:
        file = BytesIO()
        self._pillow.fromarray(pixels).save(file, format="JPEG", quality=_QUALITY)
        return file.tell()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            "JpegCompressibility: Pillow must be installed, got none; try pip install pillow"
        ) from error
    return Image
