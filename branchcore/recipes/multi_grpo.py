"""Multi-GRPO (arXiv 2512.00743): several trees per prompt, one group per step over all of them.

A node's reward is the mean over the leaves below it, per reward; the action into it gets
(r - mean_j) / (std_j + 1e-4) over all nodes of step j in all trees of the prompt, rewards apart
until then. Published are several roots, splits at selected early steps, these groups and
Flow-GRPO as the base. Reconstructed: which steps split, into how many children, that every step
but the last is stochastic (Flow-GRPO's), the std (Flow-GRPO's) and equal weights of the rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from branchcore.objective import ClippedRatio
from branchcore.recipes.branching import check_splits, grow_branching, scaled_splits
from branchcore.recipes.chains import ratio_of
from branchcore.recipes.credits import depth_credit
from branchcore.recipes.recipe import Moment, Recipe, check_sigmas, check_updates, keeps_options
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def multi_grpo(
    sigmas: Sequence[float],
    *,
    roots: int = 4,
    splits: Sequence[int] | str = (0, 2),
    branching: int | Sequence[int] = (2, 3),
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.04,
    kl_form: Literal["flow_grpo", "gaussian"] = "flow_grpo",
    updates: int = 1,
) -> Recipe:
    """Builds Multi-GRPO; defaults make Flow-GRPO's 24 images, with its noise, clip and KL.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        roots: trees per prompt, each from its own noise.
        splits: split steps, or a density for `scaled_splits`.
        branching: children per split.
        sde: the stochastic step, a name for `steps.named_sde`.
        noise_level: its a or eta.
        clip: PPO clip range.
        kl: weight of the KL to the base model.
        kl_form: "flow_grpo" is the released code's of Flow-GRPO; "gaussian" the true KL.
        updates: optimizer updates per iteration, the trained edges dealt out at random.
    """
    sg = check_sigmas("multi_grpo", sigmas)
    steps = len(sg) - 2
    chosen = scaled_splits(splits, len(sg) - 1) if isinstance(splits, str) else tuple(splits)
    children = check_splits("multi_grpo", chosen, branching, steps, roots=roots)
    check_updates("multi_grpo", updates)
    every = dict.fromkeys(range(steps), named_sde(sde, noise_level, sg))

    def grow(t: Tree, at: Moment) -> None:
        t.leaf(grow_branching(t, sg, children, every, roots=roots))
        if updates > 1:
            t.deal_updates(updates, at.rng)

    return Recipe(
        name="multi_grpo",
        grow=grow,
        credit=depth_credit(columns=("prompt", "depth"), ddof=0, eps=1e-4, floor=0.0),
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl, kl_form=kl_form),
        varies=updates > 1,
        updates=updates,
    )
