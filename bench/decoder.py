"""A convolutional decoder with random weights and the shapes of SD3's and FLUX's autoencoder.

Resnet blocks of (GroupNorm, SiLU, 3 x 3 convolution) twice, nearest-neighbour upsampling; the one
attention of the middle block is left out. The norm is an argument, since it is what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from branchcore import ops

GROUPS, EPS = 32, 1e-6
WIDTHS = (512, 512, 256, 128)
SMALL_WIDTHS = (64, 32)

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.group_norm_silu(x, weight, bias, GROUPS, EPS)


class NormConv(nn.Module):
    """GroupNorm, SiLU and a convolution."""

    def __init__(self, width_in: int, width_out: int, norm: Norm) -> None:
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(width_in, width_out, 3, padding=1)
        self.weight, self.bias = (
            nn.Parameter(torch.ones(width_in)),
            nn.Parameter(torch.zeros(width_in)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x, self.weight, self.bias))


class Resnet(nn.Module):
    """Two norms and convolutions, and a way around them."""

    def __init__(self, width_in: int, width_out: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            NormConv(width_in, width_out, norm), NormConv(width_out, width_out, norm)
        )
        same = width_in == width_out
        self.around = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x) + self.body(x)


class Upsample(nn.Module):
    """Twice the side, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def random_decoder(norm: Norm, widths: Sequence[int] = WIDTHS, channels: int = 16) -> nn.Sequential:
    """Builds latents (B, 16, h, w) -> images (B, 3, 8 h, 8 w) for four widths."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
    layers += [Resnet(widths[0], widths[0], norm) for _ in range(2)]
    width = widths[0]
    for level, wanted in enumerate(widths):
        for _ in range(3):
            layers.append(Resnet(width, wanted, norm))
            width = wanted
        if level < len(widths) - 1:
            layers.append(Upsample(width))
    return nn.Sequential(*layers, NormConv(width, 3, norm))
