"""What the branching recipes share: trees with splits, and windows that move over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from branchcore.plan import Ints
from branchcore.steps import Step, euler
from branchcore.tree import Tree


def scaled_splits(preset: str, steps: int, num_splits: int = 4) -> tuple[int, ...]:
    """Returns split steps of a density published for T = 20, scaled to T = steps, all different.

    >>> from branchcore.recipes.branching import scaled_splits
    >>> scaled_splits("dense", 20), scaled_splits("dense", 6)
    ((0, 3, 6, 9), (0, 1, 2, 3))

    Args:
        preset: "dense" (0, 3, 6, 9), "mixed" (0, 4, 8, 12) or "sparse" (0, 5, 10, 15).
        steps: T.
        num_splits: how many.

    Source: BranchGRPO sec. 4 (split ablation).
    """
    spacing = {"dense": 3, "mixed": 4, "sparse": 5}
    if preset not in spacing:
        raise ValueError(f"scaled_splits: preset must be from {tuple(spacing)}, got {preset!r}")
    chosen: list[int] = []
    for j in range(num_splits):
        chosen.append(max(spacing[preset] * steps * j // 20, chosen[-1] + 1 if chosen else 0))
    return tuple(chosen)


def check_splits(
    name: str,
    splits: Sequence[int],
    branching: int | Sequence[int],
    steps: int,
    *,
    roots: int = 1,
) -> dict[int, int]:
    """Returns children per split step; splits must be distinct stochastic steps.

    Args:
        name: of the recipe, for the message.
        splits: steps 0..steps - 1 after which the tree has more nodes.
        branching: children at every split, or one number per split.
        steps: stochastic steps of the schedule.
        roots: trees per prompt.
    """
    factors = [branching] * len(splits) if isinstance(branching, int) else list(branching)
    if len(factors) != len(splits) or not splits:
        raise ValueError(
            f"{name}: branching must be one number per split ({len(splits)}), got {len(factors)}"
        )
    outside = [i for i in splits if not 0 <= i < steps]
    if outside or len(set(splits)) != len(splits):
        raise ValueError(f"{name}: splits must be distinct steps in 0..{steps - 1}, got {splits}")
    check_leaves(name, factors, roots)
    return dict(zip(splits, factors, strict=True))


def check_leaves(name: str, factors: Sequence[int], roots: int) -> None:
    """Raises ValueError unless `roots` trees with these factors make a group of leaves."""
    if min(factors) < 1 or roots * math.prod(factors) < 2:
        trees = "" if roots == 1 else f" in {roots} trees"
        raise ValueError(
            f"{name}: branching must make at least 2 leaves, got {list(factors)}{trees}"
        )


def window_factors(name: str, branching: int | Sequence[int], depth: int, steps: int) -> list[int]:
    """Returns the children per step of a window; step T - 1 is never inside one.

    Args:
        name: of the recipe, for the message.
        branching: children at every step of the window, or one number per step of it.
        depth: steps of the window where branching is one number.
        steps: T.
    """
    factors = [branching] * depth if isinstance(branching, int) else list(branching)
    if not 1 <= len(factors) < steps:
        raise ValueError(
            f"{name}: depth must be in 1..{steps - 1}, so that the window ends before the last "
            f"step, got {len(factors)}"
        )
    return factors


def check_start(name: str, start: int, depth: int, steps: int) -> None:
    """Raises ValueError unless the window start..start + depth - 1 lies in 0..T - 2."""
    if not 0 <= start < steps - depth:
        raise ValueError(
            f"{name}: start must be in 0..{steps - depth - 1}, so that the window of {depth} ends "
            f"before the last step, got {start}"
        )


def geometric_start(ratio: float, positions: int, rng: np.random.Generator) -> int:
    """Draws i from 0..positions - 1 with probability proportional to ratio^i.

    Source: TreeGRPO eq. 7.
    """
    chance = geometric_chances(ratio, positions)
    return int(rng.choice(positions, p=chance))


def geometric_chances(ratio: float, positions: int) -> list[float]:
    """Returns `(1 - r) r^i / (1 - r^n)`, the truncated geometric law; uniform at r = 1."""
    mass = [ratio**i for i in range(positions)]
    return [m / sum(mass) for m in mass]


def grow_trunks(
    t: Tree,
    sigmas: Sequence[float],
    step: Step,
    *,
    trunks: int,
    children: int,
    updates: int,
    tail: Callable[[int], Sequence[float]],
) -> None:
    """Grows ODE trunks with stochastic, trained children at every state but the last.

    Args:
        t: the tree.
        sigmas: (T + 1,) schedule of the trunks.
        step: the children's stochastic step.
        trunks: roots, each from its own noise.
        children: per trunk state.
        updates: optimizer updates that the trunks are dealt to, in equal consecutive parts.
        tail: trunk step i -> noise levels that its children go through, to their image.

    Source: TempFlow-GRPO, arXiv 2508.04324.
    """
    x = t.roots(trunks)
    update = (np.arange(trunks) * updates // trunks).repeat(children)
    for i, sigma in enumerate(sigmas[1:-1]):
        kids = t.grow(x, sigma, step, children=children, train=True, update=update)
        t.leaf(t.chain(kids, tail(i), euler))
        x = t.grow(x, sigma, euler)


def check_split_noise(name: str, correlate: float | None, amplify: float | None) -> None:
    """Raises ValueError unless at most one kind of split noise is asked for."""
    if correlate is not None and amplify is not None:
        raise ValueError(
            f"{name}: correlate must be None with amplify, got {correlate} and {amplify}; try "
            "correlate=None"
        )


def grow_branching(
    t: Tree,
    sigmas: Sequence[float],
    children: Mapping[int, int],
    stochastic: Mapping[int, Step],
    *,
    roots: int = 1,
    correlate: float | None = None,
    amplify: float | None = None,
) -> Ints:
    """Grows trees with K children at the split steps, one elsewhere; returns their last nodes.

    Args:
        t: the tree.
        sigmas: noise levels from 1 down.
        children: per split step.
        stochastic: the SDE of every stochastic step, splits included; these edges are trained, all
            others are Euler.
        roots: trees of the prompt, each from its own noise.
        correlate: s of the sibling noise at splits.
        amplify: c of the released code's split noise.
    """
    x = t.roots(roots)
    for i, sigma in enumerate(sigmas[1:]):
        split = i in children
        x = t.grow(
            x,
            sigma,
            stochastic.get(i, euler),
            children=children.get(i, 1),
            correlate=correlate if split else None,
            amplify=amplify if split else None,
            train=i in stochastic,
        )
    return x
