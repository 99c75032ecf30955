"""Flow-CPS (arXiv 2509.05952): Flow-GRPO whose steps keep the noise level of the schedule.

s = sigma' sin(eta pi / 2), mean = (1 - sigma') x0 + sigma' cos(eta pi / 2) x1; the log-ratio is
that of -mean (x' - mean)^2, without 1 / (2 s^2), so that late steps of small noise fade out.
"""

from __future__ import annotations

from collections.abc import Sequence

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import (
    FLOW_GRPO_EMA,
    FLOW_GRPO_TRAINER,
    check_group,
    grow_chains,
)
from branchcore.recipes.credits import group_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler, flux_dynamic
from branchcore.steps import cps
from branchcore.tree import Tree


@keeps_options
def flow_cps(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    eta: float = 0.8,
    clip: float = 1e-5,
    kl: float = 0.0,
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds Flow-CPS; defaults are those of Flow-GRPO's CPS configurations but for the updates.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: chains per prompt, each from its own root noise.
        eta: share of the noise that a step renews, in (0, 1].
        clip: PPO clip range; on the scale of the log-ratio above, not comparable to other methods.
        kl: weight of the KL to the base model, the true one of the steps; none published.
        global_std: divide by the std over all prompts of a round, not the prompt's own.
        updates: optimizer updates per iteration; 2 in the released code.
    """
    sg = check_sigmas("flow_cps", sigmas)
    check_group("flow_cps", group)
    check_updates("flow_cps", updates, group)
    step = cps(eta)

    def grow(t: Tree, _at: Moment) -> None:
        t.leaf(grow_chains(t, sg, step, range(len(sg) - 2), group=group, updates=updates))

    return Recipe(
        name="flow_cps",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=ClippedRatio(ratio="cps", clip=(clip, clip), kl=kl),
        varies=False,
        updates=updates,
    )


_TRAINER = {**FLOW_GRPO_TRAINER, "prompts_per_iteration": 48, "ema_decay": FLOW_GRPO_EMA}
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo, sde_type cps: 512 px, no CFG, LoRA 32/64; its configurations "
        "also restrict the steps to a window, see flow_grpo_fast_v2",
    ),
    "flux": Preset(
        sigmas=flux_dynamic(6, 1024).tolist(),
        options={"updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo pickscore_flux_fast, sde_type cps: 512 px, guidance 3.5, LoRA "
        "64/128; there in a window of 3 steps, see flow_grpo_fast_v2",
    ),
}
