"""From leaf rewards to edge advantages: two verbs, `lift` and `standardize`, in either order.

Host float64 throughout: a tree has a few hundred nodes. Letters: M rows, L leaves, R rewards.
Groups are named by columns of the plan, see `Plan.group`. Where leaves have weights (some of them
were not grown, or not scored) every mean, std and lift is weighted, and a weight of 0 hides a leaf
whatever its value; see `leaf_weights`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore.plan import Ints, Plan

Floats = NDArray[np.float64]
# Means over equal leaves differ by their rounding, which eps is too small to hide.
_ROUNDING = 1e-12


class EdgeCredit(NamedTuple):
    """What an edge is worth."""

    advantage: Floats
    """(M, 2) non-negative columns (A+, A-), clipped: what the objective minimises with."""
    value: Floats
    """(M,) weighted sum of the advantages, not clipped: what pruners rank by."""


def standardize(
    values_nR: Floats,
    group_n: Ints,
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    floor: float = 0.0,
    spread: Floats | None = None,
    among: NDArray[np.bool_] | None = None,
    trimmed: float = 0.0,
    weight_n: Floats | None = None,
) -> Floats:
    """Returns z-scores per group and reward: (value - mean) / (std + eps).

    >>> import numpy as np
    >>> from branchcore import credit
    >>> rewards, group = np.array([[1.0], [2.0], [3.0], [10.0]]), np.array([0, 0, 1, 1])
    >>> credit.standardize(rewards, group).ravel().round(3).tolist()
    [-0.707, 0.707, -0.707, 0.707]

    Args:
        values_nR: (n, R) rewards or lifted rewards.
        group_n: (n,) group numbers; statistics never cross groups.
        ddof: 1 for the unbiased std (DanceGRPO, BranchGRPO), 0 for Flow-GRPO.
        eps: added to the std; 1e-8 DanceGRPO, 1e-4 Flow-GRPO.
        floor: groups whose std is below it get 0; BranchGRPO 1e-6.
        spread: (R,) a std for all groups instead of their own (Flow-GRPO's `global_std`); where it
            is 0 the reward gets 0.
        among: (n,) rows that count; the others take no part and get 0. None = all.
        trimmed: lowest fraction of each group, per reward, that mean and std leave out; its rows
            are still scored. In [0, 1); MixGRPO's `trimmed_ratio`.
        weight_n: (n,) weights of the rows; those of weight 0 take no part, whatever their values,
            and get 0. None = 1 each. With W = sum w, W2 = sum w^2 and m_eff = W^2 / W2:
            mean = sum w r / W, var = sum w (r - mean)^2 / W * m_eff / (m_eff - ddof).

    Returns:
        (n, R) float64; 0 for a group of one and for values that are equal up to rounding.

    Raises:
        ValueError: wrong shapes, a negative or infinite spread, or trimmed outside [0, 1).

    Source: BranchGRPO eq. 4 and `compute_depthwise_advantages`; DanceGRPO, Flow-GRPO, MixGRPO.
    """
    if values_nR.ndim != 2 or np.shape(group_n) != (len(values_nR),):
        raise ValueError(
            f"standardize: values_nR must be (n, R) and group_n (n,), got {values_nR.shape} and "
            f"{np.shape(group_n)}"
        )
    if not 0.0 <= trimmed < 1.0:
        raise ValueError(f"standardize: trimmed must be in [0, 1), got {trimmed}")
    out = np.zeros_like(values_nR, dtype=np.float64)
    weight = np.ones(len(values_nR)) if weight_n is None else weight_n
    rows = np.flatnonzero(weight if among is None else (weight > 0.0) & among)
    if not len(rows):
        return out
    group, weight = np.unique(group_n[rows], return_inverse=True)[1].reshape(-1), weight[rows]
    values = np.asarray(values_nR, dtype=np.float64)[rows]
    counted = _counted(values, group, trimmed, weight)
    mean, std, live = _statistics(values, group, counted, ddof, weight)
    divisor = std if spread is None else _checked_spread(spread, std)
    live &= (std >= floor) & (divisor > 0.0)
    divisor = np.where(live, divisor + eps, 1.0)
    out[rows] = np.where(live[group], (values - mean[group]) / divisor[group], 0.0)
    return out


def _statistics(
    values: Floats, group: Ints, counted: NDArray[np.bool_], ddof: int, weight: Floats
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Returns (groups, R) mean, std, and whether the counted values differ by more than rounding.

    The rule for groups that get 0 lives here alone; a group of one has no difference.
    """
    shape = (int(group.max()) + 1, values.shape[1])
    size, total, square, count, size2 = np.zeros((5, *shape))
    w = np.where(counted, weight[:, None], 0.0)
    np.add.at(count, group, counted.astype(np.float64))
    np.add.at(size, group, w)
    np.add.at(size2, group, w**2)
    np.add.at(total, group, w * values)
    mean = total / size
    np.add.at(square, group, w * (values - mean[group]) ** 2)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    np.minimum.at(low, group, np.where(counted, values, np.inf))
    np.maximum.at(high, group, values)
    live = high - low > _ROUNDING * np.maximum(np.abs(low), np.abs(high))
    divisor = np.where(count > ddof, size - ddof * size2 / size, 1.0)
    return mean, np.sqrt(square / divisor), live


def _counted(values: Floats, group: Ints, trimmed: float, weight: Floats) -> NDArray[np.bool_]:
    """(n, R) rows that mean and std are taken over: all but a group's lowest fraction.

    A row fills its share of the group's weight; it stays if any of that is above the cut.
    """
    counted = np.ones(values.shape, dtype=bool)
    if not trimmed:
        return counted
    size = np.bincount(group)
    share = weight * (size / np.bincount(group, weight))[group]
    start = np.cumsum(size) - size
    for r, column in enumerate(values.T):
        order = np.lexsort((column, group))
        filled = np.cumsum(share[order])
        below = (filled - share[order])[start] + np.floor(size * trimmed)
        counted[order, r] = filled > below[group[order]] + 1e-9
    return counted


def pooled_std(values_nR: Floats, ddof: int, weight_n: Floats | None = None) -> Floats:
    """Returns (R,) the std of all rows, whose groups do not matter; 0 without rows.

    Args:
        values_nR: (n, R) rewards, already comparable.
        ddof: see `standardize`, whose formula this is.
        weight_n: (n,) weights, 0 = hidden; None = 1 each.
    """
    if weight_n is None:
        return values_nR.std(0, ddof=ddof)
    rows = np.flatnonzero(weight_n)
    if not len(rows):
        return np.zeros(values_nR.shape[1])
    values, weight = values_nR[rows], weight_n[rows]
    counted = np.ones(values.shape, dtype=bool)
    return _statistics(values, np.zeros(len(rows), dtype=np.int64), counted, ddof, weight)[1][0]


def _checked_spread(spread: Floats, like: Floats) -> Floats:
    spread = np.asarray(spread, dtype=np.float64)
    if not (np.isfinite(spread) & (spread >= 0.0)).all():
        raise ValueError(f"standardize: spread must be finite and >= 0, got {spread}")
    return np.broadcast_to(spread, like.shape)


def relative(values_nR: Floats, group_n: Ints) -> Floats:
    """Returns values minus the first of their group: what is equal but for rounding becomes 0.

    Advantages do not change, but sums over rewards and means over leaves no longer turn a constant
    reward into rounding errors.

    Args:
        values_nR: (n, R) rewards.
        group_n: (n,) group numbers.
    """
    first, group = np.unique(group_n, return_index=True, return_inverse=True)[1:]
    start = values_nR[first][group.reshape(-1)]
    difference = values_nR - start
    size = np.maximum(np.abs(values_nR), np.abs(start))
    return np.where(np.abs(difference) > _ROUNDING * size, difference, 0.0)


def lift(
    plan: Plan,
    leaf_values_LR: Floats,
    weight_M: Floats | None = None,
    leaf_weight_L: Floats | None = None,
) -> Floats:
    """Returns (M, R) node values: own leaf value + sum over children of weight * child's value.

    Args:
        plan: M rows with L leaves.
        leaf_values_LR: (L, R) in the plan's leaf order; nodes that are no leaf own 0.
        weight_M: (M,) weight of the edge into each node; None = 1 (sums over the leaves below).
        leaf_weight_L: (L,) weights of the leaves; None = 1 each. With o_l the product of `weight_M`
            on the way to leaf l, a node gets sum o w r / sum o w * sum o: leaves of weight 0 are
            hidden whatever their values, and stand for what is like the others. 0 where none shows.
    """
    if leaf_values_LR.ndim != 2 or len(leaf_values_LR) != int(plan.leaf.sum()):
        raise ValueError(
            f"lift: leaf_values_LR must be (L, R) with L={int(plan.leaf.sum())}, "
            f"got {leaf_values_LR.shape}"
        )
    if leaf_weight_L is not None:
        w = leaf_weight_L[:, None]
        shown = lift(plan, np.where(w > 0.0, w * leaf_values_LR, 0.0), weight_M)
        mass, every = lift(plan, w, weight_M), lift(plan, np.ones_like(w), weight_M)
        return np.where(mass > 0.0, shown / np.where(mass > 0.0, mass, 1.0) * every, 0.0)
    value = np.zeros((len(plan), leaf_values_LR.shape[1]))
    value[plan.leaf] = leaf_values_LR
    weight = np.ones(len(plan)) if weight_M is None else weight_M
    for lo, hi in plan.levels()[:0:-1]:
        np.add.at(value, plan.parent[lo:hi], weight[lo:hi, None] * value[lo:hi])
    return value


def mean_weight(
    plan: Plan, log_prob_M: Floats | None = None, *, beta: float = 0.0, local: bool = False
) -> Floats:
    """Returns (M,) weights that make `lift` a mean over the leaves below: siblings sum to 1.

    beta = 0: uniform over leaves (unbiased). Otherwise a softmax of beta * log-probability: over
    the paths to all leaves below (the paper's eq. 3; not unbiased, early edges count in every
    mean), or over the siblings' own edges only (`local`, the released code).

    Args:
        plan: the trees.
        log_prob_M: (M,) log-probability of every edge, 0 on deterministic ones; needed if beta > 0.
            Its scale is the caller's: mean or sum over latent elements change what beta means.
        beta: inverse temperature; BranchGRPO's paper uses 1, its script 0.
        local: softmax over the immediate children instead of the paths.

    Source: BranchGRPO eq. 3 and `tree_prob_weighted`.
    """
    inner = plan.leaf & (plan.leaves_below > 1)
    if inner.any():
        raise ValueError(
            f"mean_weight: leaves must have no leaf below them, got row {int(np.argmax(inner))}; "
            "try lift with weights of your own"
        )
    if beta and log_prob_M is None:
        raise ValueError("mean_weight: log_prob_M must be given when beta is not 0, got None")
    edge = beta * log_prob_M if beta and log_prob_M is not None else np.zeros(len(plan))
    with np.errstate(divide="ignore"):
        mass = np.log(plan.leaf.astype(np.float64))
    weight = np.ones(len(plan))
    dead = plan.leaves_below == 0
    for lo, hi in plan.levels()[:0:-1]:
        up = plan.parent[lo:hi]
        logit = np.where(
            dead[lo:hi], -np.inf, edge[lo:hi] + (0.0 if local and beta else mass[lo:hi])
        )
        total = mass.copy()
        np.logaddexp.at(total, up, logit)
        mass[up] = total[up]
        # a parent with nothing but re-noised states below has no mass to share
        share = np.where(dead[lo:hi], -np.inf, logit - np.where(dead[up], 0.0, total[up]))
        weight[lo:hi] = np.exp(share)
    return weight


def edge_values(plan: Plan, node_values_MR: Floats) -> Floats:
    """Returns (M, R) edge values: of the child, or of the parent on matching edges (b = 0)."""
    source = np.where(plan.matching, plan.parent, np.arange(len(plan)))
    return node_values_MR[source]


def split_sign(
    advantage_MR: Floats, reward_weight_R: Floats, *, clip: float = 5.0, separate: bool = False
) -> EdgeCredit:
    """Combines the rewards into two non-negative columns (A+, A-).

    The objective is `-A+ min(r, clip r) + A- max(r, clip r)`; separate clipped losses per reward
    collapse into it exactly with A+ = sum_r w_r max(A_r, 0).

    Args:
        advantage_MR: (M, R).
        reward_weight_R: (R,) weights, >= 0.
        clip: bound on |advantage|; 5 in DanceGRPO, Flow-GRPO and BranchGRPO.
        separate: one loss per reward with the same ratio (DanceGRPO's multi-reward scripts) instead
            of one loss of the weighted sum.
    """
    weight = np.asarray(reward_weight_R, dtype=np.float64)
    if weight.shape != (advantage_MR.shape[1],) or (weight < 0).any():
        raise ValueError(
            f"split_sign: reward_weight_R must be (R,) >= 0 with R={advantage_MR.shape[1]}, "
            f"got {weight}"
        )
    if separate:
        parts, scale = np.clip(advantage_MR, -clip, clip), weight
    else:
        parts, scale = np.clip(advantage_MR @ weight, -clip, clip)[:, None], np.ones(1)
    columns = [np.maximum(parts, 0.0) @ scale, np.maximum(-parts, 0.0) @ scale]
    return EdgeCredit(np.stack(columns, axis=1), advantage_MR @ weight)
