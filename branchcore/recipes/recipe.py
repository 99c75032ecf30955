"""What a method is: how its trees grow, how rewards become advantages, what is minimised."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol

import numpy as np
from numpy.typing import NDArray

from branchcore.credit import EdgeCredit, Floats
from branchcore.leaf_weights import LeafWeight, checked, edge_weight, filled
from branchcore.noise import SHARED, host_generator
from branchcore.objective import Objective
from branchcore.passes import concat
from branchcore.plan import Plan
from branchcore.prune import keep_all
from branchcore.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When and for whom a tree is grown; all randomness of a recipe comes from here."""

    seed: int
    """Of the run."""
    iteration: int
    """Of the run, from 0."""
    uid: int
    """Global sample position of the prompt."""

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        """Numbers of this prompt, the same on any number of ranks and in any batch."""
        return host_generator(self.seed, self.iteration, self.uid)

    @functools.cached_property
    def shared_rng(self) -> np.random.Generator:
        """Numbers that all prompts of the iteration agree on, on all ranks."""
        return host_generator(self.seed, self.iteration, 0, SHARED)


Sigmas = Sequence[float] | NDArray[np.float64]
Grow = Callable[[Tree, Moment], None]


class Credit(Protocol):
    """How rewards become advantages."""

    def __call__(
        self,
        plan: Plan,
        rewards: Floats,
        weights: Floats,
        log_prob: Floats,
        /,
        *,
        leaf_weight: LeafWeight = None,
        **given: Any,
    ) -> EdgeCredit:
        """Returns the advantages of a call's edges.

        Args:
            plan: the trees.
            rewards: (L, R) in the plan's leaf order.
            weights: (R,) of the rewards.
            log_prob: (M,) log-probability of every edge.
            leaf_weight: (L,) weights of the leaves in all statistics; 0 = missing, whatever its
                rewards. None, or all equal = the plain statistics. Edges without a leaf get 0.
            **given: `spread` of a `PooledCredit`.
        """
        ...


class Pool(Protocol):
    """What a std over all prompts is taken of."""

    def __call__(
        self, plan: Plan, rewards: Floats, weights: Floats, leaf_weight: LeafWeight = None, /
    ) -> Floats:
        """Returns (L, K) values of the leaves; arguments as of `Credit`, no NaN in the rewards."""
        ...


Prune = Callable[[Plan, Floats, int], Floats]


@dataclass(frozen=True, kw_only=True)
class PooledCredit:
    """A credit that divides by a std over all prompts of the call, or by one that it is given."""

    credit: Callable[..., EdgeCredit]
    """A `Credit` with spread=None or (K,)."""
    pool: Pool
    """What it is the std of."""
    ddof: int
    """Of the std."""

    def __call__(
        self, plan: Plan, rewards: Floats, weights: Floats, log_prob: Floats, /, **given: Any
    ) -> EdgeCredit:
        """Returns the credit; without `spread` by the call's own."""
        return self.credit(plan, rewards, weights, log_prob, **given)

    def by(self, spread: Floats) -> Credit:
        """Returns the credit that divides by this (K,) std in every call."""
        return functools.partial(self, spread=spread)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published method as data; the engine has no branch on it."""

    name: str
    grow: Grow
    """(tree, moment): grows one prompt's tree."""
    credit: Credit
    """(plan, rewards (L, R), reward weights (R,), log_prob (M,), leaf_weight=) -> EdgeCredit."""
    objective: Objective
    prune: Prune = field(default=lambda plan, _value, _iteration: keep_all(plan))
    """(plan, value (M,) of `EdgeCredit`, iteration from 0) -> (M,) edge weights."""
    prune_by_value: bool = False
    """`prune` reads the values: what it drops is not known before the rewards."""
    varies: bool = True
    """The tree depends on the moment (windows, random subsets). False lets
    one tree be grown once and used for all prompts and iterations."""
    updates: int = 1
    """Optimizer updates per iteration."""
    sampler_decay: Callable[[int], float] | None = None
    """(iteration from 0) -> how much the policy that samples keeps of itself, in [0, 1], when it
    follows the trained one (DiffusionNFT's old adapter); None: the trained policy samples."""
    noisy_leaves: bool = False
    """Leaves may be at sigma > 0, as MixGRPO-Flash's last windows leave them."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The builder's arguments by name; a resumed run must have the same."""
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
        self.grow(tree, Moment(seed=seed, iteration=iteration, uid=uid))
        return tree.plan(noisy_leaves=self.noisy_leaves)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published configuration of a recipe."""

    sigmas: Sigmas
    """(T + 1,) its schedule."""
    options: Mapping[str, Any]
    """Options of the recipe that differ from its defaults."""
    trainer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `TrainerConfig`: learning rate and the like."""
    source: str
    """Paper or script, and what else it sets: resolution, guidance, adapter."""


Estimator = Callable[..., EdgeCredit]
"""A `Credit` whose leaf weights are valid and not all equal, whose rewards have no gaps."""


def weighs_leaves(estimator: Estimator) -> Credit:
    """Makes a credit of an estimator: checks leaf weights and hides what missing leaves hold."""

    def credit(
        plan: Plan,
        rewards: Floats,
        weights: Floats,
        log_prob: Floats,
        /,
        *,
        leaf_weight: LeafWeight = None,
        **given: Any,
    ) -> EdgeCredit:
        leaf_weight = None if leaf_weight is None else checked(plan, leaf_weight)
        if leaf_weight is None:
            return estimator(plan, rewards, weights, log_prob, None, **given)
        if not leaf_weight.any():
            return EdgeCredit(np.zeros((len(plan), 2)), np.zeros(len(plan)))
        whole = filled(plan, rewards, leaf_weight)
        advantage, value = estimator(plan, whole, weights, log_prob, leaf_weight, **given)
        there = edge_weight(plan, leaf_weight) > 0.0
        return EdgeCredit(np.where(there[:, None], advantage, 0.0), np.where(there, value, 0.0))

    return credit


P = ParamSpec("P")


def keeps_options(build: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Makes a builder keep its arguments in the recipe, so that two runs can be told apart."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Recipe:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in bound.arguments.items()
        }
        return replace(build(*args, **kwargs), options=plain)

    return wrapper


def check_updates(name: str, updates: int, most: int | None = None) -> None:
    """Raises ValueError unless 1 <= updates <= most."""
    if updates < 1 or (most is not None and updates > most):
        wanted = "at least 1" if most is None else f"in 1..{most}"
        raise ValueError(f"{name}: updates must be {wanted}, got {updates}; try updates=1")


def check_sigmas(name: str, sigmas: Sigmas) -> list[float]:
    """Returns the schedule as floats; it must fall from 1 to 0 in at least two steps."""
    levels = [float(s) for s in sigmas]
    falls = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 3 or levels[0] != 1.0 or levels[-1] != 0.0 or not falls:
        raise ValueError(
            f"{name}: sigmas must decrease from 1 to 0 in at least 2 steps, got {levels}; "
            "try schedule.shifted_linear(20, 3)"
        )
    return levels
