"""Sample grids of the same noise over a run, one small picture per evaluation, for its report.

    samples/000040.png    R rows of K samples, nothing around them; .jpg where pictures are large
    samples/grid.json     the prompts of the rows, and how many times as wide as high a row is

Letters: R prompts, K samples of each, C channels.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from branchcore.models.commands.pictures import strip
from branchcore.run_records import SAMPLES, recorded, write_record

WIDEST, SMALL = 1024, 64
"""Most pixels of a row; cells of at most so many are drawn pixel by pixel, without loss."""


def undrawn() -> deque[Tensor]:
    """Returns an empty queue for the samples of evaluations whose rows are not logged yet.

    There are two at most: those of iteration 0 are logged after the first step, which may be
    evaluated too. Of several processes one draws, and the others keep no more than that either.
    """
    return deque(maxlen=2)


def keep_samples(run: Path, iteration: int, images: Tensor, prompts: Sequence[str]) -> Path:
    """Writes the sample grid of an iteration; returns the file.

    Args:
        run: folder of the run.
        iteration: finished when these were drawn.
        images: (R, K, C, H, W) images or (R, K, F, C, H, W) videos in [0, 1], C = 1 or 3.
        prompts: R texts.

    Raises:
        RuntimeError: Pillow is not installed.
        ValueError: a tensor of another shape.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            "keep_samples: Pillow must be installed, got none; try pip install 'branchcore[models]'"
        ) from error
    if images.ndim not in (5, 6) or len(images) != len(prompts) or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"keep_samples: images must be (R, K, C, H, W) or (R, K, F, C, H, W) with R="
            f"{len(prompts)}, C = 1 or 3, got {tuple(images.shape)}"
        )
    still = strip(images) if images.ndim == 6 else images
    cell = max(still.shape[-2:])
    sheet = _sheet(still)
    levels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    file, kind = io.BytesIO(), ("png" if cell <= SMALL else "jpg")
    picture.save(file, "PNG" if kind == "png" else "JPEG", quality=85)
    old = recorded(run, SAMPLES).get(iteration)
    if old is not None:
        old.unlink()
    aspect = len(prompts) * sheet.shape[-1] / sheet.shape[-2]
    grid = {"prompts": list(prompts), "aspect": round(aspect, 6), "pixelated": cell <= SMALL}
    write_record(run, SAMPLES, "grid.json", json.dumps(grid).encode())
    return write_record(run, SAMPLES, f"{iteration:06d}.{kind}", file.getvalue())


def _sheet(images: Tensor) -> Tensor:
    """Lays images (R, K, C, H, W) out as one picture (C, H', W') with a white rim per cell."""
    num_rows, num_columns, channels, height, width = images.shape
    cells = images.detach().float().cpu().flatten(0, 1)
    scale = min(1.0, WIDEST / (num_columns * width))
    if scale < 1.0:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        cells = F.interpolate(cells, size, mode="bilinear", antialias=True)
    rim = 1 if cells.shape[-1] <= SMALL else 2
    cells = F.pad(cells, (rim, rim, rim, rim), value=1.0)
    height, width = cells.shape[-2:]
    grid = cells.view(num_rows, num_columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return torch.reshape(grid, (channels, num_rows * height, num_columns * width))
