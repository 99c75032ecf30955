"""branchcore's own recipe: SDE and training only at splits, Euler elsewhere, the prefix shared.

Every stochastic edge has siblings, so every trained parent serves K edges with one backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from branchcore.objective import ClippedRatio
from branchcore.recipes.branching import check_splits, grow_branching, scaled_splits
from branchcore.recipes.credits import depth_credit
from branchcore.recipes.recipe import Moment, Recipe, check_sigmas, check_updates, keeps_options
from branchcore.steps import dance_sde
from branchcore.tree import Tree


@keeps_options
def branchcore(
    sigmas: Sequence[float],
    *,
    splits: Sequence[int] | str = "dense",
    branching: int | Sequence[int] = 2,
    eta: float = 0.7,
    correlate: float | None = 4.0,
    clip: float = 1e-3,
    kl: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds the recipe; its options are those of `branch_mix` without a window.

    Args:
        sigmas: (T + 1,) schedule.
        splits: split steps, or a density for `scaled_splits`.
        branching: children per split.
        eta: diffusion of the SDE; larger than BranchGRPO's since few steps draw noise.
        correlate: s of the sibling noise mixture; None = independent.
        clip: PPO clip range.
        kl: weight of the KL to the base model.
        updates: optimizer updates per iteration.
    """
    sg = check_sigmas("branchcore", sigmas)
    chosen = scaled_splits(splits, len(sg) - 1) if isinstance(splits, str) else tuple(splits)
    children = check_splits("branchcore", chosen, branching, len(sg) - 2)
    check_updates("branchcore", updates)
    sde = dance_sde(eta)

    def grow(t: Tree, at: Moment) -> None:
        noise = {"correlate": correlate, "amplify": None}
        grow_branching(t, sg, children, children, sde, **noise, updates=updates, rng=at.rng)

    return Recipe(
        name="branchcore",
        grow=grow,
        credit=depth_credit(),
        objective=ClippedRatio(clip=(clip, clip), kl=kl),
        varies=updates > 1,
        updates=updates,
    )
