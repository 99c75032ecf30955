"""Unbiased pruning: one coin per trained parent, and 1 / keep probability on what stays.

With keep probabilities p > 0 fixed before the coins z fall, sum z f / p has the mean sum f for any
terms f (Horvitz-Thompson): clipped, with their KL, normalised by the planned edges. Independent
coins add the variance sum (1/p - 1) |grad f|^2. Siblings share a forward, so that a coin is about
a parent, never about an edge. Statistics of scores come from all planned parents of a prompt.
Letters: M rows of the plan, E trained edges of an update, U units (one coin each).
Source: DPPO, arXiv 2603.04135, for the threshold; the rest is derived here.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore.credit import Floats
from branchcore.noise import PRUNING, host_generator
from branchcore.plan import Ints, Plan

_TIE = 1e-6
"""Scores this close to the mean, relative to it, are no candidates: rounding must not decide."""


class Units(NamedTuple):
    """What one coin decides: a parent with its edges of an update, or edges that share a term."""

    edges: Ints
    """(E,) trained edges of the update."""
    owner: Ints
    """(E,) unit of every edge."""
    node: Ints
    """(U,) the parent that names the unit, the first of several; ascending."""
    prompt: Ints
    """(U,)"""
    cost: Floats
    """(U,) parents: forwards and backwards."""


def trained_units(plan: Plan, update: int = 0, together: Sequence[str] = ()) -> Units:
    """Returns the units of an update.

    Args:
        plan: the trees.
        update: which of the plan's updates.
        together: columns of `Objective.together`; edges of such a group share a coin.
    """
    edges = plan.trained(update)
    parent = plan.action[edges]
    group = plan.group(together)[edges] if together else parent
    order = np.lexsort((parent, group))
    first = order[np.unique(group[order], return_index=True)[1]]
    node, by_group = np.sort(parent[first]), np.argsort(np.argsort(parent[first]))
    owner = by_group[np.unique(group, return_inverse=True)[1].reshape(-1)]
    pairs = np.unique(np.stack([owner, parent]), axis=1)[0]
    cost = np.bincount(pairs, minlength=len(node)).astype(np.float64)
    return Units(edges, owner, node, plan.prompt[node].astype(np.int64), cost)


def unit_scores(units: Units, advantage_M2: Floats, score: str = "mean") -> Floats:
    """Returns (U,) mean or max |advantage| of the edges of each unit.

    Args:
        units: all of the update.
        advantage_M2: (M, 2) (A+, A-) of the whole group: taken before any coin.
        score: "mean" or "max".

    Raises:
        ValueError: an edge has no advantage, as where only survivors were standardised.
    """
    size_E = advantage_M2[units.edges].sum(1)
    if not np.isfinite(size_E).all():
        raise ValueError(
            "unit_scores: advantage_M2 must be of all planned edges, got "
            f"{size_E[~np.isfinite(size_E)][0]} at row {units.edges[~np.isfinite(size_E)][0]}; "
            "statistics of survivors bias the estimate"
        )
    result = np.zeros(len(units.node))
    if score == "max":
        np.maximum.at(result, units.owner, size_E)
        return result
    np.add.at(result, units.owner, size_E)
    return result / np.bincount(units.owner, minlength=len(result))


def gradient_norm2(plan: Plan, units: Units, slope_E: Floats) -> Floats:
    """Returns (U,) squared norms of dL/dv that the rows alone predict, up to 1 / elements.

    dL/dv = sum_e slope_e eps_e with eps = mix0 own + mix1 shared: own streams are orthogonal, those
    shared by siblings add up. The Jacobian of the model is left out.

    Args:
        plan: the trees.
        units: of an update.
        slope_E: (E,) signed d(loss)/d(p) of the edges: lin (A+ - A-) weight for ratios.
    """
    own_E, shared_E = (slope_E[:, None] * plan.mix[units.edges]).T
    own, shared = np.zeros(len(units.node)), np.zeros(len(units.node))
    np.add.at(own, units.owner, own_E**2)
    np.add.at(shared, units.owner, shared_E)
    return own + shared**2


def threshold_probability(score_U: Floats, prompt_U: Ints, rate: float) -> Floats:
    """Returns (U,) keep probabilities of DPPO: 1 - rate where the score is below the prompt's mean.

    A score equal to the mean up to 1e-6 of it is no candidate.

    Args:
        score_U: (U,) of all units of a prompt.
        prompt_U: (U,) its group.
        rate: probability that a candidate is dropped.
    """
    group = np.unique(prompt_U, return_inverse=True)[1].reshape(-1)
    mean = np.bincount(group, score_U) / np.maximum(np.bincount(group), 1)
    return np.where(score_U < mean[group] * (1.0 - _TIE), 1.0 - rate, 1.0)


def optimal_probability(norm_U: Floats, cost_U: Floats, share: float, floor: float) -> Floats:
    """Returns (U,) keep probabilities of the least added variance for an expected cost.

    Minimises sum (1/p - 1) norm^2 under sum p cost = share sum cost, floor <= p <= 1: between the
    bounds norm^2 / p^2 = lambda cost, p = t norm / sqrt(cost), whose clipped cost is piecewise
    linear in t and solved exactly. Units of norm 0 share what is left once all others are certain.

    Args:
        norm_U: (U,) gradient norms or what is proportional to them.
        cost_U: (U,) positive costs.
        share: of the cost that is kept on average.
        floor: least probability, at most share.

    Raises:
        ValueError: norms negative or not finite, costs not positive, 0 < floor <= share <= 1 fails.
    """
    norm, cost = np.asarray(norm_U, dtype=np.float64), np.asarray(cost_U, dtype=np.float64)
    if not ((norm >= 0.0) & np.isfinite(norm)).all() or not (cost > 0.0).all():
        raise ValueError("optimal_probability: norm_U must be finite and >= 0 and cost_U > 0")
    if not 0.0 < floor <= share <= 1.0:
        raise ValueError(
            f"optimal_probability: floor and share must be 0 < floor <= share <= 1, got {floor} "
            f"and {share}"
        )
    slope, budget = norm / np.sqrt(cost), share * cost.sum()
    live = slope > 1e-12 * slope.max(initial=0.0)
    if not live.any():
        return np.full(len(norm), share)
    knots = np.unique(np.concatenate([[0.0], floor / slope[live], 1.0 / slope[live]]))

    def spent(t: float) -> float:
        return float(np.clip(t * slope, floor, 1.0) @ cost)

    at = bisect.bisect_left(knots, budget, key=spent)
    ends = knots[max(at - 1, 0)], knots[min(at, len(knots) - 1)]
    t = np.interp(budget, [spent(end) for end in ends], ends)
    p = np.clip(t * slope, floor, 1.0)
    if at == len(knots) and not live.all():
        p[~live] = (budget - cost[live].sum()) / cost[~live].sum()
    return np.minimum(p, 1.0)


def unit_coins(
    plan: Plan, node_U: Ints, uids: Sequence[int], *, seed: int, iteration: int, inner: int = 0
) -> Floats:
    """Returns (U,) uniform numbers in [0, 1), each a function of (seed, iteration, uid, node).

    Neither the other prompts of the call nor their order matter; every `inner` redraws them all.

    Args:
        plan: the trees.
        node_U: (U,) rows that name the units.
        uids: (num_prompts,) global sample positions.
        seed: of the run.
        iteration: of the run.
        inner: how many passes of the iteration came before.

    Raises:
        ValueError: not one uid per prompt.
    """
    return node_coins(plan, node_U, uids, seed=seed, iteration=iteration, lane=1 + inner)


def node_coins(
    plan: Plan, node_U: Ints, uids: Sequence[int], *, seed: int, iteration: int, lane: int
) -> Floats:
    """Returns (U,) uniform numbers in [0, 1) of rows; see `unit_coins`.

    Args:
        plan: the trees.
        node_U: (U,) rows.
        uids: (num_prompts,) global sample positions.
        seed: of the run.
        iteration: of the run.
        lane: of the purpose PRUNING.

    Raises:
        ValueError: not one uid per prompt.
    """
    if len(uids) != plan.num_prompts:
        raise ValueError(f"unit_coins: uids must be ({plan.num_prompts},), got ({len(uids)},)")
    coins = np.empty(len(node_U))
    for prompt, uid in enumerate(uids):
        rows, mine = np.flatnonzero(plan.prompt == prompt), plan.prompt[node_U] == prompt
        numbers = host_generator(seed, iteration, uid, PRUNING, lane=lane).random(len(rows))
        coins[mine] = numbers[np.searchsorted(rows, node_U[mine])]
    return coins


class Kept(NamedTuple):
    """What the coins left."""

    weight: Floats
    """(U,) 0 = dropped, else 1 / probability."""
    probability: Floats
    """(U,) with which a unit was kept."""


def bernoulli(probability_U: Floats, coin_U: Floats) -> Kept:
    """Keeps each unit on its own: weight 1/p where the coin is below p.

    Raises:
        ValueError: a probability is not in (0, 1].
    """
    p = _checked(probability_U)
    return Kept(np.where(coin_U < p, 1.0 / p, 0.0), p)


def fixed(probability_U: Floats, coin_U: Floats, prompt_U: Ints) -> Kept:
    """Drops exactly floor((1 - p) m) of each prompt's m candidates, those of the highest coins.

    Every candidate stays with (m - h) / m, whose inverse is the weight: not 1/p, which floor()
    makes wrong.

    Raises:
        ValueError: a probability is not in (0, 1], or candidates of a prompt differ in theirs.
    """
    p = _checked(probability_U).copy()
    weight = np.ones(len(p))
    for prompt in np.unique(prompt_U):
        mine = np.flatnonzero((prompt_U == prompt) & (p < 1.0))
        if not len(mine):
            continue
        if np.ptp(p[mine]) > 0.0:
            raise ValueError(
                "fixed: probability_U must be one value among a prompt's candidates, got "
                f"{p[mine].min()} to {p[mine].max()}; try the draw bernoulli"
            )
        m = len(mine)
        h = int((1.0 - p[mine[0]]) * m + 1e-9)
        weight[mine] = m / (m - h)
        weight[mine[np.argsort(coin_U[mine], kind="stable")[m - h :]]] = 0.0
        p[mine] = (m - h) / m
    return Kept(weight, p)


def added_variance(probability_U: Floats, norm2_U: Floats) -> float:
    """Returns sum (1/p - 1) norm2: what independent coins add to the gradient's variance.

    The same of a fixed draw if the gradients are orthogonal.

    Args:
        probability_U: (U,) keep probabilities in (0, 1].
        norm2_U: (U,) squared norms of the units' gradients, normaliser included.
    """
    return float(((1.0 / _checked(probability_U) - 1.0) * norm2_U).sum())


def _checked(probability_U: Floats) -> Floats:
    p = np.asarray(probability_U, dtype=np.float64)
    good: NDArray[np.bool_] = (p > 0.0) & (p <= 1.0)
    if not good.all():
        raise ValueError(
            f"unbiased: keep probabilities must be in (0, 1], got {p[~good][0]} at "
            f"{int(np.argmin(good))}; what is never kept no weight can make up for"
        )
    return p
