"""Flow-GRPO-Fast, first version (July 2025): a prefix of one state, then a group of branches.

Each trunk has its own root noise: ODE with one state up to its own random step k, `children` SDE
children there, window - 1 more SDE steps, ODE to the end. Only the window is trained; the group of
a prompt mixes its trunks: A = (r - mean_group) / (std_group + 1e-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import FLOW_GRPO_EMA, FLOW_GRPO_TRAINER, check_window
from branchcore.recipes.credits import group_credit
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
def flow_grpo_fast_v1(
    sigmas: Sequence[float],
    *,
    trunks: int = 2,
    children: int = 9,
    window: int = 2,
    latest: int | None = None,
    noise_level: float = 0.8,
    clip: float = 1e-5,
    kl: float = 0.0,
    kl_form: Literal["flow_grpo", "gaussian"] = "flow_grpo",
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds Flow-GRPO-Fast v1; defaults are SD3.5-M's but for the std and the updates.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        trunks: prefixes per prompt, each with its own root noise and its own k.
        children: branches of every trunk.
        window: stochastic steps of a branch, the branching one included.
        latest: greatest k, drawn from 0..latest; None = T // 2, as far as the window then ends
            before the last step. 1 in the first script.
        noise_level: the SDE's a.
        clip: PPO clip range.
        kl: weight of the KL to the base model, in Flow-GRPO's form; none published.
        kl_form: "flow_grpo" is the released code's, which lacks a factor 1 / dt; "gaussian" the
            true KL of the steps.
        global_std: divide by the std over all prompts of a round; True in the released code.
        updates: optimizer updates per iteration, whole branches dealt to them; 2 in the released
            code.
    """
    sg = check_sigmas("flow_grpo_fast_v1", sigmas)
    leaves, num_steps = trunks * children, len(sg) - 1
    if trunks < 1 or children < 1 or leaves < 2:
        raise ValueError(
            "flow_grpo_fast_v1: trunks and children must be at least 1 and make at least 2 leaves, "
            f"got {trunks} and {children}"
        )
    check_window("flow_grpo_fast_v1", window, num_steps - 1, "before the last")
    room = num_steps - 1 - window
    final = min(num_steps // 2, room) if latest is None else latest
    if not 0 <= final <= room:
        raise ValueError(
            f"flow_grpo_fast_v1: latest must be in 0..{room}, got {final}; the window must end "
            "before the last step"
        )
    check_updates("flow_grpo_fast_v1", updates, leaves)
    step = flow_sde(noise_level, sg[1])

    def grow(t: Tree, at: Moment) -> None:
        dealt = (np.arange(leaves) * updates // leaves).reshape(trunks, children)
        for update in dealt:
            k = int(at.rng.integers(final + 1))
            x = t.chain(t.roots(1), sg[1 : k + 1], euler)
            x = t.grow(x, sg[k + 1], step, children=children, train=True, update=update)
            x = t.chain(x, sg[k + 2 : k + window + 1], step, train=True, update=update)
            t.leaf(t.chain(x, sg[k + window + 1 :], euler))

    return Recipe(
        name="flow_grpo_fast_v1",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=ClippedRatio(clip=(clip, clip), kl=kl, kl_form=kl_form),
        varies=final > 0,
        updates=updates,
    )


PRESETS = {
    "sd3.5-m-pickscore": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"global_std": True, "updates": 2},
        trainer={**FLOW_GRPO_TRAINER, "prompts_per_iteration": 64, "ema_decay": FLOW_GRPO_EMA},
        source="yifan123/flow_grpo pickscore_sd3_fast (July 2025): 512 px, CFG 4.5, LoRA 32/64; "
        "24 nominal samples in trunks of 9",
    ),
}
