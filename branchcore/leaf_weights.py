"""Weights of leaves: what stands for leaves that were not grown, or not scored.

A leaf that was kept with probability p weighs 1/p, one that is missing 0: its mean over the coins
is 1. An edge weighs the mean over the leaves below it, 1/p below the coin and above it what is left
of its leaves, so that at every edge weight times weighted mean of values is sum w r / L, the
Horvitz-Thompson estimate of the mean over all its leaves. Letters: M rows, L leaves, R rewards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from branchcore.credit import Floats, edge_values, lift
from branchcore.plan import Plan

LeafWeight = Floats | None
"""(L,) weights of the leaves in the plan's leaf order, 0 = missing; None = all are there."""


def edge_weight(plan: Plan, leaf_weight_L: LeafWeight) -> Floats:
    """Returns (M,) the mean weight of the leaves below every edge, of the image on matching edges.

    Args:
        plan: the trees.
        leaf_weight_L: of the leaves; None = 1 each.
    """
    if leaf_weight_L is None:
        return np.ones(len(plan))
    below = lift(plan, leaf_weight_L[:, None]) / np.maximum(plan.leaves_below, 1)[:, None]
    return edge_values(plan, below)[:, 0]


def without(leaf_weight_L: LeafWeight, masked_L: NDArray[np.bool_] | None) -> LeafWeight:
    """Returns the weights with those of masked leaves set to 0.

    The others keep theirs: nobody knows with what probability a leaf fails.

    Args:
        leaf_weight_L: of the leaves; None = 1 each.
        masked_L: leaves without a score; None = none.
    """
    if masked_L is None:
        return leaf_weight_L
    return np.where(masked_L, 0.0, 1.0 if leaf_weight_L is None else leaf_weight_L)


def checked(plan: Plan, leaf_weight_L: Floats) -> LeafWeight:
    """Returns the weights, or None where all are equal: they change nothing then.

    Raises:
        ValueError: wrong shape, negative or not finite.
    """
    shape = (int(plan.leaf.sum()),)
    if np.shape(leaf_weight_L) != shape:
        raise ValueError(f"credit: leaf_weight must be {shape}, got {np.shape(leaf_weight_L)}")
    good = np.isfinite(leaf_weight_L) & (leaf_weight_L >= 0.0)
    if not good.all():
        bad = int(np.argmin(good))
        raise ValueError(
            f"credit: leaf_weight must be finite and >= 0, got {leaf_weight_L[bad]} at {bad}"
        )
    equal = leaf_weight_L.min() == leaf_weight_L.max() > 0.0
    return None if equal else leaf_weight_L


def filled(plan: Plan, rewards_LR: Floats, leaf_weight_L: Floats) -> Floats:
    """Returns rewards with those of missing leaves replaced, so that no value of theirs is read.

    They get those of their prompt's first leaf that is there, else of the call's first.

    Args:
        plan: the trees.
        rewards_LR: (L, R) rewards; anything, NaN too, where the weight is 0.
        leaf_weight_L: (L,) not all 0.
    """
    owner, there = plan.prompt[plan.leaf], leaf_weight_L > 0.0
    first = np.full(plan.num_prompts, np.argmax(there))
    rows = np.flatnonzero(there)[::-1]
    # of rows that name one prompt the last one assigned stays: its first leaf
    first[owner[rows]] = rows
    return np.where(there[:, None], rewards_LR, rewards_LR[first[owner]])
