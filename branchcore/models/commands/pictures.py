"""Grids of images and videos as files: one row per prompt, panels such as before and after.

Letters: R prompts, K samples of each, F frames.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 4
MOST_PIXELS, DOTS = 4096, 100
STRIP_FRAMES = 4
FRAME_MS = 60
LABEL_INCHES, HEADING_INCHES = 1.8, 0.35
LINE_INCHES, LETTER_INCHES = 0.15, 0.08
MOST_LINES, LEAST_PANEL_INCHES = 3, 1.0


def save_samples(panels: Mapping[str, Tensor], titles: Sequence[str], path: Path) -> list[Path]:
    """Writes panels side by side as a PNG; videos as a strip of frames, and as a GIF beside it.

    Args:
        panels: heading -> (R, K, 3, H, W) images or (R, K, F, 3, H, W) videos in [0, 1].
        titles: R prompts.
        path: PNG to write; folders are made.

    Returns:
        The files.

    Raises:
        ValueError: a path that is no PNG, or a panel of another shape.
        RuntimeError: matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise ValueError(f"save_samples: path must end in .png, got {path}")
    for heading, images in panels.items():
        if images.ndim not in (5, 6) or len(images) != len(titles) or images.shape[-3] != 3:
            raise ValueError(
                f"save_samples: panel {heading!r} must be (R, K, 3, H, W) or (R, K, F, 3, H, W) "
                f"with R={len(titles)}, got {tuple(images.shape)}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    still = {h: strip(images) if images.ndim == 6 else images for h, images in panels.items()}
    image_grid(still, titles, path)
    videos = {h: images for h, images in panels.items() if images.ndim == 6}
    return [path, *([animate(videos, path.with_suffix(".gif"))] if videos else [])]


def strip(videos: Tensor, frames: int = STRIP_FRAMES) -> Tensor:
    """Returns videos (R, K, F, 3, H, W) as evenly spaced frames side by side, (R, K, 3, H, W')."""
    chosen = torch.linspace(0, videos.shape[2] - 1, min(frames, videos.shape[2])).round().long()
    return torch.cat(list(videos[:, :, chosen].unbind(2)), -1)


def tiled(images: Tensor) -> Tensor:
    """Lays images (R, K, 3, H, W) out as one white-rimmed picture (3, H', W')."""
    cells = F.pad(images.detach().float().cpu().clamp(0, 1), (MARGIN, 0, MARGIN, 0), value=1.0)
    rows = [torch.cat(list(row.unbind(0)), -1) for row in cells.unbind(0)]
    return F.pad(torch.cat(rows, -2), (0, MARGIN, 0, MARGIN), value=1.0)


def image_grid(panels: Mapping[str, Tensor], titles: Sequence[str], path: Path) -> None:
    """Draws panels (R, K, 3, H, W) side by side, pixel by pixel up to 4096 across or down."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "image_grid: matplotlib must be installed, got none; try pip install 'branchcore[demo]'"
        ) from error
    pictures = {heading: tiled(images) for heading, images in panels.items()}
    widths = [picture.shape[-1] for picture in pictures.values()]
    height = max(picture.shape[-2] for picture in pictures.values())
    labels = [_label(title) for title in titles]
    scale = _scale(widths, height, labels)
    across, down = scale * sum(widths) / DOTS, scale * height / DOTS
    width, total = LABEL_INCHES + across, HEADING_INCHES + down
    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    left = LABEL_INCHES
    for heading, picture in pictures.items():
        share = across * picture.shape[-1] / sum(widths)
        axis = figure.add_axes((left / width, 0.0, share / width, down / total))
        _draw(axis, picture, "nearest" if scale >= 1.0 else "auto")
        axis.set_title(_end(heading, int(share / LETTER_INCHES)), fontsize=9)
        left += share
    for row, label in enumerate(labels):
        centre = down * (1.0 - (row + 0.5) / len(titles)) / total
        figure.text(0.05 / width, centre, label, fontsize=8, va="center")
    figure.savefig(path, dpi=DOTS)


def _scale(widths: Sequence[int], height: int, labels: Sequence[str]) -> float:
    """Returns by how much panels are enlarged: large ones shrink, tiny ones get text beside."""
    line = LINE_INCHES * (1 + max(label.count("\n") for label in labels))
    legible = max(line * len(labels) / height, LEAST_PANEL_INCHES / min(widths)) * DOTS
    return max(legible, min(1.0, MOST_PIXELS / max(sum(widths), height)))


def _draw(axis: Any, picture: Tensor, interpolation: str) -> None:
    axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation=interpolation, aspect="auto")
    axis.set_axis_off()


def _label(title: str, width: int = 26) -> str:
    short = textwrap.wrap(title, width, max_lines=MOST_LINES, placeholder=" ...")
    return _plain("\n".join(short))


def _end(heading: str, letters: int) -> str:
    """Returns a heading that fits; of a path, the end tells more."""
    short = heading if len(heading) <= letters else "..." + heading[3 - letters :]
    return _plain(short)


def _plain(text: str) -> str:
    """Returns text that matplotlib does not take as a formula."""
    return text.replace("$", r"\$")


def animate(panels: Mapping[str, Tensor], path: Path) -> Path:
    """Writes videos (R, K, F, 3, H, W) as one animated GIF of their grid, panels side by side.

    Raises:
        RuntimeError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            "animate: Pillow must be installed, got none; try pip install 'branchcore[models]'"
        ) from error
    frames = [
        torch.cat([tiled(panel[:, :, i]) for panel in panels.values()], -1)
        for i in range(min(panel.shape[2] for panel in panels.values()))
    ]
    pictures = [
        Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in frames
    ]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0, optimize=False
    )
    return path
