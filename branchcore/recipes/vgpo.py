"""VGPO (arXiv 2512.12387): Flow-GRPO chains with a reward after every action, and anchored values.

The state after each action is projected to an image by one Euler step and scored, R_t; with
Q_t = sum_k gamma^k R_(t+k) along the chain and w_t = Q_t / mean_t Q_t, the advantage is
w_t (z_t + anchor Q_t), z the group's z-score and the anchor on in the first steps only. The last
projection is the chain's own image, so that a chain of T steps has T - 1 rewards. From reviews of
the paper; gamma and the anchor's size are not published there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import check_group
from branchcore.recipes.credits import value_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler
from branchcore.steps import euler, flow_sde
from branchcore.tree import Tree


@keeps_options
def vgpo(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    gamma: float = 1.0,
    anchor: float = 0.1,
    anchored_steps: int = 5,
    shift: float = 0.0,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.04,
    kl_form: Literal["flow_grpo", "gaussian"] = "flow_grpo",
    updates: int = 1,
) -> Recipe:
    """Builds VGPO; defaults are Flow-GRPO's for SD3.5-M, gamma and anchor ours.

    Rewards must not be negative, shift included: w_t divides by their sum.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: chains per prompt, each from its own root noise.
        gamma: discount of later rewards, in [0, 1].
        anchor: k, weight of the value itself beside the z-score; 0 = none.
        anchored_steps: steps from the start that have the anchor; 5 in the paper.
        shift: added to every reward, so that none is negative.
        noise_level: the SDE's a.
        clip: PPO clip range.
        kl: weight of the KL to the base model.
        kl_form: "flow_grpo" is the released code's of Flow-GRPO; "gaussian" the true KL.
        updates: optimizer updates per iteration.
    """
    sg = check_sigmas("vgpo", sigmas)
    check_group("vgpo", group)
    check_updates("vgpo", updates, group)
    sde = flow_sde(noise_level, sg[1])
    update = np.arange(group) * updates // group

    def grow(t: Tree, _at: Moment) -> None:
        x = t.roots(group)
        for sigma in sg[1:-1]:
            x = t.grow(x, sigma, sde, train=True, update=update)
            t.leaf(t.grow(x, 0.0, euler))

    return Recipe(
        name="vgpo",
        grow=grow,
        credit=value_credit(gamma=gamma, anchor=anchor, anchored_steps=anchored_steps, shift=shift),
        objective=ClippedRatio(clip=(clip, clip), kl=kl, kl_form=kl_form),
        varies=False,
        updates=updates,
    )


PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={},
        source="arXiv 2512.12387, from reviews: SD3.5-M, 40 steps to evaluate; gamma, the anchor "
        "and the trainer's settings are not published there",
    ),
}
