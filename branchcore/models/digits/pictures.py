"""Grids of digits as PNG files, for before-and-after comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_grid(panels: Mapping[str, Tensor], titles: Sequence[str], path: str | Path) -> None:
    """Write panels of pictures side by side; one row per prompt, ink black on white.

    Args:
        panels: panel heading (such as "before") -> images (R, K, 8, 8), clipped to [-1, 1] here.
        titles: R row titles, the prompts.
        path: PNG file to write.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: A panel has not one row per title.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "sample_grid: matplotlib must be installed, got none; "
            "try pip install 'branchcore[demo]'"
        ) from error
    for heading, images in panels.items():
        if images.ndim != 4 or images.shape[0] != len(titles) or images.shape[2:] != (8, 8):
            raise ValueError(
                f"sample_grid: panel {heading!r} must be ({len(titles)}, K, 8, 8) for "
                f"{len(titles)} titles, got {tuple(images.shape)}"
            )
    num_columns = sum(images.shape[1] for images in panels.values())
    inches = 0.42
    figure = Figure(
        figsize=(2.4 + inches * num_columns, 0.5 + inches * len(titles)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    widths = [images.shape[1] for images in panels.values()]
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (heading, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(tiled(images).numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(heading, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axes[0].set_yticks([1 + 4 + 9 * row for row in range(len(titles))], titles, fontsize=8)
    axes[0].tick_params(length=0)
    figure.savefig(path, dpi=150)


def tiled(images: Tensor) -> Tensor:
    """Lay images (R, K, 8, 8) out as one picture (9 R + 1, 9 K + 1) with margins of one pixel."""
    cells = F.pad(images.detach().float().cpu().clamp(-1, 1), (1, 0, 1, 0), value=-1)
    return F.pad(torch.cat(list(cells.unbind(1)), 2).flatten(0, 1), (0, 1, 0, 1), value=-1)
