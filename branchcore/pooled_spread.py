"""A std over all prompts of an iteration, and its running mean over iterations.

The std of the prompts that are left after some were dropped depends on which ones were, and the
gradient divided by it is biased; that of earlier iterations knows nothing of the coins. Letters: L
leaves, K columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from branchcore.credit import Floats
from branchcore.distributed import Ranks
from branchcore.leaf_weights import filled
from branchcore.recipes.recipe import PooledCredit, Recipe
from branchcore.rewards import component_weights
from branchcore.stages import Batch

_COUPLED = (("global_std", True, True), ("credit", "gdpo", True), ("prune_pool", "call", False))
"""Options under which statistics cross prompts; whether they are the std of a `PooledCredit`."""
_MEMORY = 0.9
"""Share of its past that the running mean keeps, once it is 10 iterations long."""
# Sums of equal values differ by this much of their square, which would be taken for a spread.
_ROUNDING = 1e-13


class Moments(NamedTuple):
    """Weighted sums that add up over rounds and ranks.

    The variance loses digits where a mean is much larger than its std, all of them at 3e6 stds.
    """

    leaves: float
    """Sum of the weights."""
    total: Floats
    """(K,)"""
    square: Floats
    """(K,)"""

    @staticmethod
    def of(values_LK: Floats, weight_L: Floats) -> Moments:
        """Returns the moments of some leaves.

        Args:
            values_LK: (L, K) values whose std is taken.
            weight_L: (L,) weights >= 0; a value of weight 0 may be NaN.
        """
        some = weight_L > 0.0
        values_LK, weight_L = values_LK[some], weight_L[some]
        return Moments(float(weight_L.sum()), weight_L @ values_LK, weight_L @ values_LK**2)

    def plus(self, other: Moments) -> Moments:
        """Returns the moments of both."""
        square = self.square + other.square
        return Moments(self.leaves + other.leaves, self.total + other.total, square)

    def variance(self, ddof: int = 0) -> Floats:
        """Returns (K,) squares around the mean over leaves - ddof; what is rounding is 0."""
        around = self.square - self.total**2 / max(self.leaves, 1.0)
        around = np.where(around > _ROUNDING * self.square, around, 0.0)
        return around / max(self.leaves - ddof, 1.0)


class PooledSpread:
    """The std of earlier iterations for credits that take one over all prompts.

    The mean of up to 10 variances, an EMA after that. Without dropped prompts nothing is kept, and
    every call takes its own std.

    Args:
        recipe: the method.
        prompts: `PruningConfig.prompts`.

    Raises:
        ValueError: prompts are to be dropped, and the recipe has statistics over all of them that
            are more than the std of a `PooledCredit`.
    """

    def __init__(self, recipe: Recipe, prompts: float) -> None:
        self.recipe = recipe
        self.variance: Floats | None = None
        """(K,)"""
        self.iterations: int = 0
        """Taken in so far."""
        credit = recipe.credit
        self._pooled = credit if isinstance(credit, PooledCredit) else None
        self._credit = self._pooled if prompts else None
        for name, value, pooled in _COUPLED:
            coupled = recipe.options.get(name) == value and not (pooled and self._credit)
            if prompts and coupled:
                raise ValueError(
                    f"Pruning: prompts must be 0 with {name}={value!r} of {recipe.name}, whose "
                    f"statistics are taken over all prompts of a round, got {prompts}; those of "
                    "the survivors bias the estimate, and no earlier iteration has them"
                )

    @property
    def crosses(self) -> bool:
        """The credit takes a std over all prompts of an iteration, and no earlier one's serves."""
        return self._pooled is not None and (self._credit is None or self.variance is None)

    def credited(
        self,
        batches: Sequence[Batch] = (),
        reward_weights: Mapping[str, float] | None = None,
        ranks: Ranks | None = None,
    ) -> Recipe:
        """Returns the recipe, crediting by the std of earlier iterations or of these batches.

        Without either every round takes its own: the first iteration drops no prompt.

        Args:
            batches: all of this process's, scored; () = none are known yet.
            reward_weights: per component; None = 1 each.
            ranks: whose batches count, too.
        """
        pooled, variance = self._pooled, self.variance
        if pooled is None or (self._credit is None and not (batches or ranks)):
            return self.recipe
        if self._credit is None or variance is None:
            ones = dict.fromkeys((uid for batch in batches for uid in batch.uids), 1.0)
            found = self._moments(pooled, batches, ones, reward_weights, ranks)
            variance = None if found is None else found.variance(pooled.ddof)
        if variance is None:
            return self.recipe
        return replace(self.recipe, credit=pooled.by(np.sqrt(variance)))

    def moments(
        self,
        batches: Sequence[Batch],
        prompt_weight: Mapping[int, float],
        reward_weights: Mapping[str, float] | None,
        ranks: Ranks | None = None,
    ) -> Moments | None:
        """Returns the moments of what the credit takes a std of, None if nobody asks.

        Args:
            batches: of an iteration, or of a part of it: moments add up.
            prompt_weight: 1 / (1 - P) by uid, so that these count for the dropped ones.
            reward_weights: per component; None = 1 each.
            ranks: whose batches count, too.
        """
        if self._credit is None:
            return None
        return self._moments(self._credit, batches, prompt_weight, reward_weights, ranks)

    @staticmethod
    def _moments(
        credit: PooledCredit,
        batches: Sequence[Batch],
        prompt_weight: Mapping[int, float],
        reward_weights: Mapping[str, float] | None,
        ranks: Ranks | None,
    ) -> Moments | None:
        total: Moments | None = None
        for batch in batches:
            plan, scores, of_leaf = batch.forest.plan, batch.scores, batch.leaf_weight
            weight_R = component_weights(scores.names, reward_weights)
            of_prompt = np.array([prompt_weight[uid] for uid in batch.uids])
            weight_L, rewards = of_prompt[plan.prompt[plan.leaf]], scores.values
            if of_leaf is not None:
                if not of_leaf.any():
                    continue
                weight_L, rewards = weight_L * of_leaf, filled(plan, rewards, of_leaf)
            found = Moments.of(credit.pool(plan, rewards, weight_R, of_leaf), weight_L)
            total = found if total is None else total.plus(found)
        every = [total] if ranks is None else ranks.gather(total)
        known = [one for one in every if one is not None]
        return functools.reduce(Moments.plus, known) if known else None

    def remember(self, moments: Moments | None) -> None:
        """Takes in the moments of a whole iteration."""
        if moments is None or self._credit is None:
            return
        variance = moments.variance(self._credit.ddof)
        self.iterations += 1
        new = max(1.0 / self.iterations, 1.0 - _MEMORY)
        old = variance if self.variance is None else self.variance
        self.variance = old + new * (variance - old)

    def state(self) -> dict[str, Any]:
        """Returns what `load` takes, ready for JSON."""
        variance = [] if self.variance is None else self.variance.tolist()
        return {"variance": variance, "iterations": self.iterations}

    def load(self, state: Any, where: Path | str) -> None:
        """Takes a state back.

        Raises:
            ValueError: it is damaged; names `where`.
        """
        named: Mapping[str, Any] = state if isinstance(state, Mapping) else {}
        found, count = named.get("variance", None), named.get("iterations", -1)
        variance: list[Any] = found if isinstance(found, list) else [None]
        whole = isinstance(count, int) and count >= 0 and (count > 0) == bool(variance)
        if not whole or not all(map(_is_variance, variance)):
            raise ValueError(
                f"PooledSpread: {where} must hold variances >= 0 and their iterations, got {state}"
            )
        self.variance, self.iterations = (np.array(variance) if variance else None), count


def _is_variance(value: Any) -> bool:
    return isinstance(value, float) and 0.0 <= value < math.inf
