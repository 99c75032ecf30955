"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a zero-mean log-ratio and equal step gradients.

log ratio = mean(eps (mu - mu_old)), without the 1 / s and the quadratic drift of the exact one;
the clipped loss of a step is divided by its dt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import (
    FLOW_GRPO_EMA,
    FLOW_GRPO_TRAINER,
    check_group,
    grow_chains,
)
from branchcore.recipes.credits import group_credit, inverse_step_weight, weighted
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler
from branchcore.steps import flow_sde
from branchcore.tree import Tree


@keeps_options
def grpo_guard(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    noise_level: float = 0.7,
    clip: float = 2e-6,
    kl: float = 0.0,
    kl_form: Literal["flow_grpo", "gaussian"] = "flow_grpo",
    updates: int = 1,
) -> Recipe:
    """Builds GRPO-Guard; defaults are SD3.5-M's (GenEval, OCR) but for the updates.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: chains per prompt, each from its own root noise.
        noise_level: the SDE's a.
        clip: PPO clip range; 4e-6 for PickScore.
        kl: weight of the KL to the base model, in Flow-GRPO's form; none in the paper.
        kl_form: "flow_grpo" is the released code's, which lacks a factor 1 / dt; "gaussian" the
            true KL of the steps.
        updates: optimizer updates per iteration; 2 in the released code.
    """
    sg = check_sigmas("grpo_guard", sigmas)
    check_group("grpo_guard", group)
    check_updates("grpo_guard", updates, group)
    step = flow_sde(noise_level, sg[1])

    def grow(t: Tree, _at: Moment) -> None:
        t.leaf(grow_chains(t, sg, step, range(len(sg) - 2), group=group, updates=updates))

    return Recipe(
        name="grpo_guard",
        grow=grow,
        credit=weighted(group_credit(ddof=0, eps=1e-4, reward_first=True), inverse_step_weight),
        objective=ClippedRatio(ratio="guard", clip=(clip, clip), kl=kl, kl_form=kl_form),
        varies=False,
        updates=updates,
    )


_TRAINER = {
    **FLOW_GRPO_TRAINER,
    "lr": 1e-4,
    "prompts_per_iteration": 48,
    "ema_decay": FLOW_GRPO_EMA,
}
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo config/grpo_guard.py, GenEval and OCR: 512 px, CFG 4.5, fp16, "
        "LoRA 32/64",
    ),
    "sd3.5-m-pickscore": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"clip": 4e-6, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo config/grpo_guard.py, PickScore: 512 px, CFG 4.5, fp16, "
        "LoRA 32/64",
    ),
}
