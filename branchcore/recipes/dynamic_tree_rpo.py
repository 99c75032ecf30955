"""Dynamic-TreeRPO (arXiv 2509.23352): a binary tree in a sliding window, noisier with depth.

Only its sampler: published are a binary tree of depth 4 in a window of SDE steps, ODE elsewhere,
and a noise level that rises linearly with depth. Reconstructed: the levels themselves, how the
window slides (as MixGRPO's), and the advantage, TreeGRPO's mean of the leaves below. Not included:
its reward-dependent clip range and its supervised loss towards the best leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

from branchcore.objective import ClippedRatio
from branchcore.recipes.branching import check_leaves, grow_branching, window_factors
from branchcore.recipes.chains import ratio_of
from branchcore.recipes.credits import leaf_credit
from branchcore.recipes.recipe import Moment, Recipe, check_sigmas, check_updates, keeps_options
from branchcore.recipes.windows import SlidingWindow
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def dynamic_tree_rpo(
    sigmas: Sequence[float],
    *,
    branching: int | Sequence[int] = 2,
    depth: int = 4,
    noise_levels: Sequence[float] | None = None,
    noise_level: float = 0.7,
    growth: float = 0.5,
    sde: str = "flow_sde",
    start: int = 0,
    schedule: str = "progressive",
    interval: int = 25,
    clip: float = 1e-4,
    kl: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds Dynamic-TreeRPO; noise levels, growth and clip are ours, for want of published ones.

    Args:
        sigmas: (T + 1,) schedule.
        branching: children per node of the window, or one number per depth.
        depth: steps of the window; a sequence of branching has its own length instead.
        noise_levels: a or eta of the step, one per depth; None = rising evenly from `noise_level`
            to (1 + growth) times it.
        noise_level: of the first depth, if noise_levels is None.
        growth: relative rise over the depths, if noise_levels is None.
        sde: step inside the window, a name for `steps.named_sde`.
        start: first step of the window at iteration 0.
        schedule: how the window moves on, MixGRPO's: see `windows`; "frozen" stays.
        interval: iterations that the window stays at a place.
        clip: PPO clip range.
        kl: weight of the KL to the base model.
        updates: optimizer updates per iteration, the trained edges dealt out at random.
    """
    sg = check_sigmas("dynamic_tree_rpo", sigmas)
    factors = window_factors("dynamic_tree_rpo", branching, depth, len(sg) - 1)
    check_leaves("dynamic_tree_rpo", factors, 1)
    size = len(factors)
    window = SlidingWindow(
        recipe="dynamic_tree_rpo",
        steps=len(sg) - 1,
        window=size,
        schedule=schedule,
        interval=interval,
        start=start,
    )
    check_updates("dynamic_tree_rpo", updates)
    if noise_levels is None:
        noise_levels = [noise_level * (1.0 + growth * j / max(size - 1, 1)) for j in range(size)]
    if len(noise_levels) != size:
        raise ValueError(
            f"dynamic_tree_rpo: noise_levels must be one per depth ({size}), got "
            f"{len(noise_levels)}"
        )
    steps = [named_sde(sde, level, sg) for level in noise_levels]

    def grow(t: Tree, at: Moment) -> None:
        inside = window.at(at)
        children = dict(zip(inside, factors, strict=True))
        t.leaf(grow_branching(t, sg, children, dict(zip(inside, steps, strict=True))))
        if updates > 1:
            t.deal_updates(updates, at.rng)

    return Recipe(
        name="dynamic_tree_rpo",
        grow=grow,
        credit=leaf_credit(),
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl),
        varies=window.varies or updates > 1,
        updates=updates,
    )
