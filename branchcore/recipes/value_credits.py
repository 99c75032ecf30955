"""How rewards of previews become advantages along a chain: a discounted sum of what comes after.

Letters: M rows, L leaves, R rewards. Import this from `branchcore.recipes.credits`.
"""

from __future__ import annotations

import numpy as np

from branchcore.credit import EdgeCredit, Floats, lift, split_sign, standardize
from branchcore.leaf_weights import LeafWeight, edge_weight
from branchcore.plan import Ints, Plan
from branchcore.recipes.recipe import Credit, weighs_leaves


def value_credit(
    *, gamma: float, anchor: float, anchored_steps: int = 5, shift: float = 0.0
) -> Credit:
    """Returns VGPO's credit on chains whose stochastic nodes each have a preview leaf.

    With R_t the reward of the x0 read-out after step t, Q_t = R_t + gamma Q_(next step),
    w_t = Q_t / mean over the chain's steps, z_t the z-score (biased std, eps 1e-8) of Q_t over the
    prompt's chains, and k = anchor in the first `anchored_steps` stochastic steps, else 0:

        A_t = w_t (z_t + k Q_t).

    It is not invariant to a shift of the rewards, by design: a constant one adds to the anchor.
    Where all of a chain's Q are 0, w = 1. A chain with a missing leaf is missing as a whole, and
    the others weigh what their last leaf does.

    Args:
        gamma: discount of later previews, in [0, 1].
        anchor: k, >= 0.
        anchored_steps: stochastic steps of a chain that are anchored.
        shift: added to every reward; the paper assumes that none is negative.

    Raises:
        ValueError: at build, a number out of range; at credit, negative rewards or a plan without
            the previews.

    Source: VGPO, arXiv 2512.12387, eq. 9-13 as reconstructed from reviews.
    """
    if not (0.0 <= gamma <= 1.0 and anchor >= 0.0 and anchored_steps >= 0):
        raise ValueError(
            "value_credit: gamma must be in [0, 1], anchor and anchored_steps >= 0, got "
            f"{gamma}, {anchor} and {anchored_steps}"
        )

    @weighs_leaves
    def credit(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats, leaf_weight: LeafWeight
    ) -> EdgeCredit:
        if rewards_LR.min() + shift < 0.0:
            raise ValueError(
                f"value_credit: rewards must be >= {0.0 - shift:g}, got {rewards_LR.min():g}; try "
                "a larger shift"
            )
        rewards_LR = rewards_LR + shift
        acts = plan.stochastic
        head, position = _chains(plan)
        q = lift(plan, rewards_LR, np.where(acts, gamma, 1.0))
        total = np.zeros_like(q)
        np.add.at(total, head[acts], q[acts])
        steps = np.bincount(head[acts], minlength=len(plan))[:, None]
        mean = (total / np.maximum(steps, 1))[head]
        omega = np.where(mean > 0.0, q / np.where(mean > 0.0, mean, 1.0), 1.0)
        weight = None if leaf_weight is None else _chain_weights(plan, head, leaf_weight)
        z = standardize(q, plan.group(("prompt", "depth")), ddof=0, among=acts, weight_n=weight)
        k = np.where(position < anchored_steps, anchor, 0.0)[:, None]
        result = split_sign(np.where(acts[:, None], omega * (z + k * q), 0.0), weight_R)
        if weight is None:
            return result
        # an edge will be weighed by the leaves below it, but counts for what its chain does
        scale = weight / np.where(weight > 0.0, edge_weight(plan, leaf_weight), 1.0)
        return EdgeCredit(result.advantage * scale[:, None], result.value * scale)

    return credit


def _chain_weights(plan: Plan, head: Ints, leaf_weight_L: Floats) -> Floats:
    """(M,) the leaf weight at the end of every row's chain; 0 where a leaf of it is missing."""
    low, high = np.full(len(plan), np.inf), np.zeros(len(plan))
    np.minimum.at(low, head[plan.leaf], leaf_weight_L)
    np.maximum.at(high, head[plan.leaf], leaf_weight_L)
    return np.where(low > 0.0, high, 0.0)[head]


def _chains(plan: Plan) -> tuple[Ints, Ints]:
    """Returns (M,) the first stochastic row of every row's chain and the stochastic steps before.

    Raises ValueError unless every stochastic node has one preview leaf and at most one stochastic
    step below it.
    """
    acts = plan.stochastic
    own, following = plan.leaf.astype(np.int64), acts.astype(np.int64)
    for lo, hi in plan.levels()[:0:-1]:
        passed = ~acts[lo:hi]
        np.add.at(own, plan.parent[lo:hi], own[lo:hi] * passed)
        np.add.at(following, plan.parent[lo:hi], np.where(passed, following[lo:hi], 1))
    below = following - acts
    bad = acts & ((own != 1) | (below > 1))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            "value_credit: a stochastic node must have one preview leaf and at most one stochastic "
            f"step below it, got {own[i]} and {below[i]} at row {i}"
        )
    head, position = np.arange(len(plan)), np.zeros(len(plan), dtype=np.int64)
    started = acts.copy()
    for lo, hi in plan.levels()[1:]:
        up = plan.parent[lo:hi]
        head[lo:hi] = np.where(started[up], head[up], head[lo:hi])
        position[lo:hi] = position[up] + acts[up]
        started[lo:hi] |= started[up]
    return head, position
