"""What the branching recipes share: the tree with splits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from branchcore.steps import Step, euler
from branchcore.tree import Tree


def scaled_splits(preset: str, steps: int, num_splits: int = 4) -> tuple[int, ...]:
    """Returns split steps of a density published for T = 20, scaled to T = steps.

    Args:
        preset: "dense" (0, 3, 6, 9), "mixed" (0, 4, 8, 12) or "sparse" (0, 5, 10, 15).
        steps: T.
        num_splits: how many.

    Source: BranchGRPO sec. 4 (split ablation).
    """
    spacing = {"dense": 3, "mixed": 4, "sparse": 5}
    if preset not in spacing:
        raise ValueError(f"scaled_splits: preset must be from {tuple(spacing)}, got {preset!r}")
    return tuple(spacing[preset] * steps * j // 20 for j in range(num_splits))


def check_splits(
    name: str, splits: Sequence[int], branching: int | Sequence[int], steps: int
) -> dict[int, int]:
    """Returns children per split step; splits must be distinct stochastic steps.

    Args:
        name: of the recipe, for the message.
        splits: steps 0..steps - 1 after which the tree has more nodes.
        branching: children at every split, or one number per split.
        steps: stochastic steps of the schedule.
    """
    factors = [branching] * len(splits) if isinstance(branching, int) else list(branching)
    if len(factors) != len(splits) or not splits:
        raise ValueError(
            f"{name}: branching must be one number per split ({len(splits)}), got {len(factors)}"
        )
    outside = [i for i in splits if not 0 <= i < steps]
    if outside or len(set(splits)) != len(splits):
        raise ValueError(f"{name}: splits must be distinct steps in 0..{steps - 1}, got {splits}")
    if min(factors) < 1 or math.prod(factors) < 2:
        raise ValueError(f"{name}: branching must make at least 2 leaves, got {factors}")
    return dict(zip(splits, factors, strict=True))


def grow_branching(
    t: Tree,
    sigmas: Sequence[float],
    children: dict[int, int],
    sde_steps: Collection[int],
    sde: Step,
    *,
    correlate: float | None,
    amplify: float | None,
    updates: int,
    rng: np.random.Generator,
) -> None:
    """Grows one tree: K children at the split steps, one elsewhere; stochastic steps are trained.

    Args:
        t: the tree.
        sigmas: (T + 1,) schedule.
        children: per split step.
        sde_steps: steps that use `sde`, splits included; all others are Euler.
        sde: the stochastic step.
        correlate: s of the sibling noise at splits.
        amplify: c of the released code's split noise.
        updates: optimizer updates that the tree's trained edges are dealt out to.
        rng: of the deal.
    """
    x = t.roots(1)
    for i, sigma in enumerate(sigmas[1:]):
        split = i in children
        x = t.grow(
            x,
            sigma,
            sde if i in sde_steps else euler,
            children=children.get(i, 1),
            correlate=correlate if split else None,
            amplify=amplify if split else None,
            train=i in sde_steps,
        )
    t.leaf(x)
    if updates > 1:
        t.deal_updates(updates, rng)
