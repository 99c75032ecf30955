"""Flow-GRPO (arXiv 2505.05470): independent SDE chains, group advantage, PPO clip, KL.

A = (r - mean_group) / (std_group + 1e-4); every step but the last is stochastic and trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.objective import ClippedRatio
from branchcore.recipes.credits import group_credit
from branchcore.recipes.recipe import Moment, Recipe, check_sigmas, check_updates, keeps_options
from branchcore.steps import euler, flow_sde
from branchcore.tree import Tree


@keeps_options
def flow_grpo(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.04,
    kl_form: str = "flow_grpo",
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds Flow-GRPO; defaults are SD3.5-M's (GenEval, OCR) but for the std and the updates.

    Args:
        sigmas: (T + 1,) schedule.
        group: chains per prompt, each from its own root noise.
        noise_level: the SDE's a.
        clip: PPO clip range.
        kl: weight of the KL to the base model; 0.04 GenEval and OCR, 0.01 PickScore, 0 FLUX.
        kl_form: "flow_grpo" is the released code's; "gaussian" the true KL of the steps.
        global_std: divide by the std over all prompts of a round, not the prompt's own; True in
            the released SD3 configurations.
        updates: optimizer updates per iteration; 2 in the released code.
    """
    sg = check_sigmas("flow_grpo", sigmas)
    sde = flow_sde(noise_level, sg[1])
    check_updates("flow_grpo", updates, group)

    def grow(t: Tree, _at: Moment) -> None:
        x = t.roots(group)
        update = np.arange(group) * updates // group
        for sigma in sg[1:-1]:
            x = t.grow(x, sigma, sde, train=True, update=update)
        t.leaf(t.grow(x, sg[-1], euler))

    return Recipe(
        name="flow_grpo",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=ClippedRatio(clip=(clip, clip), kl=kl, kl_form=kl_form),  # pyright: ignore[reportArgumentType]
        varies=False,
        updates=updates,
    )
