"""BranchGRPO (arXiv 2509.06040): SDE trees, fused rewards, depth-wise advantages, pruning.

xi_b = (s own_b + shared) / sqrt(1 + s^2) at splits; r_bar(n) = sum_l w_l r_l over the leaves below;
A_d(n) = (r_bar(n) - mean_d) / (std_d + 1e-8) over one tree's nodes of depth d.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore import prune
from branchcore.credit import Floats
from branchcore.objective import Objective
from branchcore.plan import Plan
from branchcore.recipes.branching import check_splits, depth_credit, grow_branching, scaled_splits
from branchcore.recipes.recipe import Prune, Recipe, check_sigmas
from branchcore.steps import dance_sde
from branchcore.tree import Tree


def branch_grpo(
    sigmas: Sequence[float],
    *,
    splits: Sequence[int] | str = "dense",
    branching: int | Sequence[int] = 2,
    eta: float = 0.3,
    correlate: float | None = 4.0,
    amplify: float | None = None,
    beta: float = 0.0,
    local: bool = False,
    clip: float = 1e-3,
    kl: float = 0.0,
    pruning: str = "none",
    prune_depths: Sequence[int] = (),
    prune_share: float = 0.5,
    prune_pool: str = "tree",
    slide_interval: int | None = None,
    slide_stop: int | None = None,
    last_step: str = "euler",
) -> Recipe:
    """Builds BranchGRPO; defaults are FLUX's (16 leaves) but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(20, 3).
        splits: split steps, or a density for `scaled_splits`.
        branching: children per split.
        eta: diffusion of the SDE.
        correlate: s of the sibling noise mixture (the paper); None = independent.
        amplify: c of the released code, c * own noise with the log-prob of c = 1; not both.
        beta: fusion temperature; 0 in the script, 1 in the paper.
        local: fuse over immediate children, as the released code does with beta.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none in the paper.
        pruning: "none", "parent_top1", "extremes" or "depth".
        prune_depths: child depths of the "depth" window; empty = the 5 past the last split.
        prune_share: share of chains that "extremes" keeps.
        prune_pool: "tree", or "call" as the released code.
        slide_interval: iterations per move of the depth window; None = fixed. 30 in the paper.
        slide_stop: depth where the window stops; None = the last split's own depth.
        last_step: "euler": the image is the x0 read-out, the reward sees all trained noise;
            "sde": the last step is stochastic and trained too and the image is its sample.
    """
    sg = check_sigmas("branch_grpo", sigmas)
    if last_step not in ("euler", "sde"):
        raise ValueError(f"branch_grpo: last_step must be 'euler' or 'sde', got {last_step!r}")
    steps = len(sg) - 1 if last_step == "sde" else len(sg) - 2
    chosen = scaled_splits(splits, len(sg) - 1) if isinstance(splits, str) else tuple(splits)
    children = check_splits("branch_grpo", chosen, branching, steps)
    sde = dance_sde(eta)
    window = tuple(prune_depths) or tuple(range(max(chosen) + 2, max(chosen) + 7))
    stop = max(chosen) if slide_stop is None else slide_stop

    def grow(t: Tree, _iteration: int, _rng: np.random.Generator) -> None:
        grow_branching(t, sg, children, range(steps), sde, correlate=correlate, amplify=amplify)

    def depth(plan: Plan, _value: Floats, iteration: int) -> Floats:
        depths = np.asarray(window)
        if slide_interval is not None:
            depths = prune.slide(depths, iteration, interval=slide_interval, stop=stop)
        return prune.depth_window(plan, depths)

    pruners: dict[str, Prune] = {
        "none": lambda plan, _value, _iteration: prune.keep_all(plan),
        "parent_top1": lambda plan, value, _iteration: prune.parent_top1(plan, value),
        "extremes": lambda plan, value, _iteration: prune.extremes(
            plan, value, share=prune_share, pool=prune_pool
        ),
        "depth": depth,
    }
    if pruning not in pruners:
        raise ValueError(f"branch_grpo: pruning must be from {tuple(pruners)}, got {pruning!r}")
    return Recipe(
        name="branch_grpo",
        grow=grow,
        credit=depth_credit(beta=beta, local=local),
        objective=Objective(clip=(clip, clip), kl=kl),
        prune=pruners[pruning],
    )
