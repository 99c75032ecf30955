"""SFPO's outer loop: fast steps on one batch, back part of the way, one corrective step.

theta_K after K fast steps from theta_0; then theta = theta_0 + share (theta_K - theta_0), and one
step from there. share = 0 is one plain step; share = 1 is K + 1 of them.
Source: SFPO, arXiv 2510.04072.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from branchcore.matching import AdvantageMatching
from branchcore.objective import ClippedRatio
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig


class FastPath:
    """Remembers weights and optimizer moments before the fast steps and interpolates back.

    The moments and the step count go the same share of the way, so that share = 0 leaves no trace
    of the fast steps.

    Args:
        parameters: of the policy.
        optimizer: its optimizer; a parameter without state yet counts as zeros.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = list(parameters), optimizer
        self.start = [p.detach().clone() for p in self.parameters]
        self.moments = [
            {name: value.clone() for name, value in self._state(p).items()} for p in self.parameters
        ]

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def go_back(self, share: float) -> None:
        """Moves weights and moments to start + share (now - start).

        Raises:
            ValueError: share outside [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"go_back: share must be in [0, 1], got {share}")
        for p, start, moments in zip(self.parameters, self.start, self.moments, strict=True):
            _between(p, start, share)
            for name, value in self._state(p).items():
                _between(value, moments.get(name, torch.zeros_like(value)), share)


def _between(now: Tensor, start: Tensor, share: float) -> None:
    """Sets now to start + share (now - start), exactly at both ends."""
    if share < 1.0:
        now.copy_(start if share == 0.0 else start + share * (now - start))


def check_fast_steps(config: TrainerConfig, recipe: Recipe) -> None:
    """Raises ValueError unless SFPO's settings suit the recipe."""
    measured = isinstance(recipe.objective, (ClippedRatio, AdvantageMatching))
    if config.fast_limit < math.inf and not (config.fast_steps > 1 and measured):
        raise ValueError(
            "Trainer: fast_limit must be inf unless at least 2 fast_steps measure a ratio, got "
            f"{config.fast_limit} with {config.fast_steps} of {type(recipe.objective).__name__}"
        )
    if config.fast_steps and recipe.updates > 1:
        raise ValueError(
            f"Trainer: fast_steps must be 0 with several updates, got {config.fast_steps} and "
            f"{recipe.updates} updates"
        )
