"""The noise floor of a run's ratios: measured once, agreed on, and what clips by it.

Unchanged weights give a log ratio of 0 in exact arithmetic. At another batch shape they give other
bits, and a |log ratio| up to the floor f. `TrainerConfig.clip_floor=K` clips where the log ratio
is beyond K f, so that the ratio r is clipped to

    [min(1 - low, exp(-K f)), max(1 + high, exp(K f))]

with the recipe's (low, high). The floor of the first iteration's first round serves the whole run.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from branchcore import stages
from branchcore.distributed import Ranks
from branchcore.objective import ClippedRatio
from branchcore.recipes.recipe import Recipe
from branchcore.stages import Batch
from branchcore.trainer_config import TrainerConfig

_MOST = 700.0
"""Log ratio that float64 can still take the exponential of."""


def clipped_by(objective: ClippedRatio, floor: float, floors: float) -> ClippedRatio:
    """Returns an objective that knows the noise floor, with a clip range of at least some of it.

    Args:
        objective: its clip range is kept where it is wider.
        floor: largest |log ratio| of unchanged weights.
        floors: how many of them the log ratio may be away from 0.
    """
    away = min(floors * floor, _MOST)
    low, high = objective.clip
    clip = max(low, -math.expm1(-away)), max(high, math.expm1(away))
    return replace(objective, clip=clip, floor=floor)


class NoiseFloor:
    """Measures the floor of a run, and has the recipe that goes by it.

    Args:
        recipe: the method.
        config: the run.
        ranks: its processes.
        lockstep: weights are gathered for every call, and one call more on one process is one too
            many: the floor is not measured then.

    Raises:
        ValueError: `clip_floor` where nothing is clipped, or no floor is measured.
    """

    def __init__(
        self, recipe: Recipe, config: TrainerConfig, ranks: Ranks, *, lockstep: bool
    ) -> None:
        self._recipe, self._config, self._ranks = recipe, config, ranks
        self.value: float | None = None
        """Of the run, once known: the largest of all processes."""
        self._mine: float | None = None
        reason = _why_not(recipe, config, lockstep)
        self._measurable = reason is None
        if config.clip_floor:
            objective = recipe.objective
            if isinstance(objective, ClippedRatio) and min(objective.clip) == math.inf:
                reason = f"for {recipe.name} without a clip range", "clip=1e-4"
            if reason is not None:
                where, fix = reason
                raise ValueError(
                    f"TrainerConfig: clip_floor must be 0 {where}, got {config.clip_floor:g}; "
                    f"try {fix}"
                )

    def measure(self, batch: Batch) -> None:
        """Measures this process's floor on the first batch that it has, before weights change.

        Raises:
            FloatingPointError: not finite.
        """
        if not self._measurable or self.value is not None or self._mine is not None:
            return
        limits = {"max_batch": self._config.max_batch, "max_tokens": self._config.max_tokens}
        found = stages.noise_floor(batch, self._recipe, **limits)
        if found is not None and not math.isfinite(found):
            raise FloatingPointError(f"Trainer: noise floor must be finite, got {found}")
        self._mine = found

    def agree(self) -> None:
        """Takes the largest floor of all processes, the first time that one has any: collective."""
        if not self._measurable or self.value is not None:
            return
        mine = math.nan if self._mine is None else self._mine
        found = self._ranks.stack(np.array([mine]))
        known = found[np.isfinite(found)]
        self.value, self._mine = (float(known.max()) if len(known) else None), None

    def forget(self) -> None:
        """Drops what was measured in an iteration that was given up."""
        self._mine = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, clipping as the floor says once that is known."""
        objective = self._recipe.objective
        if self.value is None or not isinstance(objective, ClippedRatio):
            return self._recipe
        by_floor = clipped_by(objective, self.value, self._config.clip_floor)
        return replace(self._recipe, objective=by_floor)

    def metrics(self) -> dict[str, float]:
        """Returns `noise_floor` once known; with `clip_floor` also `clip`, the smaller distance."""
        if self.value is None:
            return {}
        objective = self.recipe.objective
        found = {"noise_floor": self.value}
        if self._config.clip_floor and isinstance(objective, ClippedRatio):
            found["clip"] = min(objective.clip)
        return found


def _why_not(recipe: Recipe, config: TrainerConfig, lockstep: bool) -> tuple[str, str] | None:
    """Returns where no floor is measured, and what to do about it; None where it is."""
    if not isinstance(recipe.objective, ClippedRatio):
        return f"for {recipe.name}, which clips no ratio", "a recipe that does"
    if recipe.sampler_decay is not None:
        return "where the policy that samples lags behind the trained one", "the recipe's clip"
    if recipe.updates == 1 and not config.fast_steps:
        return "with one update per iteration, whose ratio is exactly 1", "updates=2"
    if lockstep:
        return "where weights are gathered for every call", "reshard=False"
    return None
