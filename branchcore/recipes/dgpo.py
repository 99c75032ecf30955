"""DGPO (arXiv 2510.08425): direct group preference optimisation, a group as one preference.

Images come from an ODE. The whole group is re-noised at the same levels with the same noise;
per level, with D_i = mean (v - u_i)^2 - mean (v_base - u_i)^2,
loss = -log sigmoid(-(beta / G) sum_i A_i D_i), A = (r - mean_group) / (std_group + 1e-4).

Not built of the release: its PPO-like clip, and the moving average as reference and sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.matching import Preference
from branchcore.recipes.chains import FLOW_GRPO_TRAINER, check_group
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
from branchcore.steps import dpmpp, renoise
from branchcore.tree import Tree


@keeps_options
def dgpo(
    sigmas: Sequence[float],
    *,
    group: int = 16,
    times: int = 4,
    t_min: float = 0.5625,
    order: int = 2,
    beta: float = 100.0,
    kl: float = 2.0,
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds DGPO; defaults are SD3.5-M's for OCR but for the std.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: images per prompt, each from its own root noise; 24 is better.
        times: levels per prompt, distinct ones of the schedule from t_min up.
        t_min: lowest level, since few-step images are worst at low noise; the default is 0.3 under
            shift 3.
        order: of the solver, 1 to 3.
        beta: inverse temperature of the group's mean; 10 to 100.
        kl: weight of mean |v - v_base|^2; the published 0.02 times beta, since the released
            gradient leaves out the factor beta.
        global_std: divide by the std over all prompts of a round; True in the OCR configuration.
        updates: optimizer updates per iteration, whole levels dealt to them.
    """
    sg = check_sigmas("dgpo", sigmas)
    check_group("dgpo", group)
    candidates = np.array([s for s in sg[:-1] if s >= t_min])
    if not 1 <= times <= len(candidates):
        raise ValueError(
            f"dgpo: times must be in 1..{len(candidates)}, the levels from t_min = {t_min} up, got "
            f"{times}"
        )
    check_updates("dgpo", updates, times)
    solver = dpmpp(order, warm_up=True)

    def grow(t: Tree, at: Moment) -> None:
        leaves = t.leaf(t.chain(t.roots(group), sg[1:], solver))
        for j, level in enumerate(at.rng.choice(candidates, times, replace=False)):
            update = j * updates // times
            t.grow(leaves, level, renoise, same_noise=True, train=True, label=j, update=update)

    return Recipe(
        name="dgpo",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=Preference(beta=beta / group, kl=kl),
        varies=True,
        updates=updates,
    )


_SOURCE = "Luo-Yihong/DGPO (4 GPUs): 512 px, CFG 4.5 in the rollout, DPM-Solver 10 steps, LoRA"
# the released gradient leaves out the factor beta, and is clipped to 1
_TRAINER = {**FLOW_GRPO_TRAINER, "prompts_per_iteration": 8}
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"t_min": 0.79, "beta": 101.0, "kl": 0.02 * 101.0},
        trainer={**_TRAINER, "max_grad_norm": 101.0},
        source=_SOURCE + "; GenEval",
    ),
    "sd3.5-m-ocr": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"global_std": True},
        trainer={**_TRAINER, "max_grad_norm": 100.0},
        source=_SOURCE + "; OCR",
    ),
}
