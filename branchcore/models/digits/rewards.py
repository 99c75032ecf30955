"""Rewards of the digits task: legibility by a classifier, stroke and slant measured on the pixels.

    legibility = clip(log p(digit), -6, log 0.9)
    stroke     = -min(|z_ink - t|, 4),    t = -1.25 for thin, 1.25 for bold
    slant      = -min(|z_lean - t|, 4),   t = -1.25, 0, 1.25 for left, upright, right

Stroke and slant have a target, so overshooting it costs as much as missing it.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from branchcore.models.digits.classifier import classify
from branchcore.models.digits.features import z_scores
from branchcore.models.digits.prompts import prompt_indices
from branchcore.models.digits.weights import DigitsWeights, shipped_weights

COMPONENT_WEIGHTS = {"legibility": 0.5, "stroke": 1.0, "slant": 1.0}
STROKE_TARGETS = (-1.25, 1.25)
SLANT_TARGETS = (-1.25, 0.0, 1.25)
LOG_P_RANGE = (-6.0, math.log(0.9))
LARGEST_MISS = 4.0


def targets(stroke_slant_digit: Tensor) -> Tensor:
    """Return the z-scores (L, 2) of ink and lean that (L, 3) `prompt_indices` ask for."""
    device = stroke_slant_digit.device
    stroke, slant, _ = stroke_slant_digit.unbind(1)
    return torch.stack(
        [
            torch.tensor(STROKE_TARGETS, device=device)[stroke],
            torch.tensor(SLANT_TARGETS, device=device)[slant],
        ],
        1,
    )


class DigitsReward:
    """Reward of images (L, 8, 8) and their prompts: a dict of (L,) fp32, one per component.

    Args:
        device: where rewards are computed and returned.
        weights: source of the classifier and the statistics; None = those of the package.
    """

    def __init__(
        self, device: torch.device | str = "cpu", weights: DigitsWeights | None = None
    ) -> None:
        weights = weights or shipped_weights()
        self.device = torch.device(device)
        self.classifier = copy.deepcopy(weights.reward_classifier).to(device)
        self.statistics = weights.statistics.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score images (L, 8, 8) against L prompts."""
        if images.shape != (len(prompts), 8, 8):
            raise ValueError(
                f"DigitsReward: images must be ({len(prompts)}, 8, 8) for {len(prompts)} prompts, "
                f"got {tuple(images.shape)}"
            )
        images = images.to(self.device, torch.float32)
        indices = prompt_indices(prompts).to(self.device)
        digit = indices[:, 2]
        log_p = classify(self.classifier, images).gather(1, digit[:, None]).squeeze(1)
        miss = (z_scores(images, digit, self.statistics) - targets(indices)).abs()
        stroke, slant = miss.clamp_max(LARGEST_MISS).neg().unbind(1)
        return {"legibility": log_p.clamp(*LOG_P_RANGE), "stroke": stroke, "slant": slant}
