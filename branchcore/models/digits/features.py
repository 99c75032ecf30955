"""What the rewards measure on the pixels of an 8 x 8 digit: ink and lean.

With w = ((clip(x, -1, 1) + 1) / 2)^2 and the central moments mu of w divided by sum(w),

    ink = sum(w) / 64,    lean = -mu11 / (mu02 + 0.1).

y grows downward, so a positive lean means that the top leans to the right; 0.1 keeps it finite for
a flat stroke. The square makes faint grey in the background count little.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureStatistics(NamedTuple):
    """Mean and standard deviation of (ink, lean) over the real digits of each class."""

    mean: Tensor  # (10, 2) fp32
    std: Tensor  # (10, 2) fp32

    def to(self, device: torch.device | str) -> "FeatureStatistics":
        """Copy the statistics to a device."""
        return FeatureStatistics(self.mean.to(device), self.std.to(device))


def ink_and_lean(images: Tensor) -> Tensor:
    """Measure images (L, 8, 8), -1 = paper, 1 = ink; returns (L, 2) fp32; no ink has lean 0."""
    weight = (images.float().clamp(-1, 1) + 1).div(2).square()
    total = weight.sum((1, 2))
    share = weight / total.clamp_min(1e-6)[:, None, None]
    axis = torch.arange(8.0, device=images.device)
    x = axis - (share.sum(1) @ axis)[:, None]
    y = axis - (share.sum(2) @ axis)[:, None]
    mu11 = torch.einsum("lyx,ly,lx->l", share, y, x)
    mu02 = torch.einsum("lyx,ly->l", share, y.square())
    return torch.stack([total / 64, -mu11 / (mu02 + 0.1)], 1)


def class_statistics(images: Tensor, labels: Tensor) -> FeatureStatistics:
    """Measure the statistics of real digits: images (L, 8, 8), labels (L,) int64 in 0..9."""
    groups = [ink_and_lean(images[labels == digit]) for digit in range(10)]
    return FeatureStatistics(
        torch.stack([group.mean(0) for group in groups]),
        torch.stack([group.std(0) for group in groups]),
    )


def z_scores(images: Tensor, digit: Tensor, statistics: FeatureStatistics) -> Tensor:
    """Standardise ink and lean by the class that was asked for.

    Args:
        images: (L, 8, 8), decoded images.
        digit: (L,) int64, digit of each prompt.
        statistics: statistics of the real digits.

    Returns:
        (L, 2) fp32, z-scores of ink and of lean.
    """
    return (ink_and_lean(images) - statistics.mean[digit]) / statistics.std[digit]
