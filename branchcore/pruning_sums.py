"""What a pass over pruned parents kept, and what that cost in variance. U units of one coin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore import unbiased
from branchcore.credit import Floats
from branchcore.unbiased import Kept, Units


class Sums(NamedTuple):
    """What an iteration kept: prompts, and sums over the units that have a gradient."""

    prompts: float = 0.0
    rolled_out: float = 0.0
    parents: float = 0.0
    kept: float = 0.0
    expected: float = 0.0
    weight: float = 0.0
    weight2: float = 0.0
    added: float = 0.0
    norm2: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Returns the sums over both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Returns the shares that were kept and what they cost in variance.

        `prompts_share` was rolled out; of the parents of those, over all passes, `kept_share`, on
        average `expected_share`; `parents_saved` is what ran no training pass, `effective_parents`
        (sum w)^2 / sum w^2 of the coins' weights, `added_variance` the formula's, in sum |g|^2,
        with the norms that the rows predict (`unbiased.gradient_norm2`).
        """
        parents = max(self.parents, 1.0)
        return {
            "prompts_share": self.rolled_out / max(self.prompts, 1.0),
            "kept_share": self.kept / parents,
            "expected_share": self.expected / parents,
            "effective_parents": self.weight**2 / self.weight2 if self.weight2 else 0.0,
            "added_variance": self.added / self.norm2 if self.norm2 else 0.0,
            "parents_saved": self.parents - self.kept,
        }


def sums_of(
    units: Units, kept: Kept, norm2: Floats, live: NDArray[np.bool_], paid: NDArray[np.bool_]
) -> Sums:
    """Returns the sums of a pass: `paid` units are left by the recipe's pruner, then come coins."""
    weight = np.where(paid, kept.weight, 0.0)[live]
    cost, p = units.cost[live], np.where(paid, kept.probability, 0.0)[live]
    return Sums(
        parents=float(cost.sum()),
        kept=float(cost[weight > 0.0].sum()),
        expected=float(cost @ p),
        weight=float(weight.sum()),
        weight2=float(weight @ weight),
        added=unbiased.added_variance(kept.probability[paid], norm2[paid]),
        norm2=float(norm2[paid].sum()),
    )
