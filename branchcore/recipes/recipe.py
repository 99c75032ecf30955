"""What a method is: how its trees grow, how rewards become advantages, what is minimised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from branchcore.credit import Floats
from branchcore.noise import host_generator
from branchcore.objective import Objective
from branchcore.passes import concat
from branchcore.plan import Plan
from branchcore.prune import keep_all
from branchcore.tree import Tree

Grow = Callable[[Tree, int, np.random.Generator], None]
Credit = Callable[[Plan, Floats, Floats, Floats], Floats]
Prune = Callable[[Plan, Floats, int], Floats]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published method as data; the engine has no branch on it."""

    name: str
    grow: Grow
    """(tree, iteration, generator): grows one prompt's tree."""
    credit: Credit
    """(plan, rewards (L, R), reward weights (R,), log_prob (M,)) -> (M, 2) (A+, A-)."""
    objective: Objective
    prune: Prune = field(default=lambda plan, _value, _iteration: keep_all(plan))
    """(plan, value (M,), iteration) -> (M,) edge weights; value = A+ - A-."""
    varies: bool = False
    """The tree depends on the iteration or the generator (windows, random subsets)."""
    updates: int = 1
    """Optimizer updates per iteration."""
    _cache: dict[int, Plan] = field(default_factory=dict[int, Plan], repr=False, compare=False)

    def plan(self, uids: Sequence[int], *, seed: int, iteration: int) -> Plan:
        """Returns the validated plan of one call's prompts.

        Args:
            uids: global sample position of each prompt; a random tree depends on nothing else.
            seed: of the run.
            iteration: of the run.
        """
        if not self.varies:
            if len(uids) not in self._cache:
                self._cache[len(uids)] = concat([self._one(seed, iteration, 0)] * len(uids))
            return self._cache[len(uids)]
        return concat([self._one(seed, iteration, uid) for uid in uids])

    def _one(self, seed: int, iteration: int, uid: int) -> Plan:
        tree = Tree()
        self.grow(tree, iteration, host_generator(seed, iteration, uid))
        return tree.plan()


def check_sigmas(name: str, sigmas: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Returns the schedule as floats; it must fall from 1 to 0 in at least two steps."""
    levels = [float(s) for s in sigmas]
    falls = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 3 or levels[0] != 1.0 or levels[-1] != 0.0 or not falls:
        raise ValueError(
            f"{name}: sigmas must decrease from 1 to 0 in at least 2 steps, got {levels}; "
            "try schedule.shifted_linear(20, 3)"
        )
    return levels
