"""TempFlow-GRPO (arXiv 2508.04324): an ODE trunk that branches at every step, noise-aware weights.

K stochastic children leave the trunk at every step 0..T - 2 and go on by ODE, so that an image
tells about one action: A = (r - mean) / (std + 1e-4) over the siblings. The loss of step i is
weighed with s_i / mean_j s_j, s = g sqrt(dt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from branchcore.objective import ClippedRatio
from branchcore.recipes.branching import grow_trunks
from branchcore.recipes.chains import FLOW_GRPO_EMA, FLOW_GRPO_TRAINER, ratio_of
from branchcore.recipes.credits import depth_credit, noise_weight, weighted
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler, flux_dynamic
from branchcore.steps import named_sde
from branchcore.tree import Tree

_GROUPS = {"parent": ("parent",), "prompt": ("prompt", "depth")}


@keeps_options
def tempflow_grpo(
    sigmas: Sequence[float],
    *,
    trunks: int = 4,
    children: int = 6,
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.004,
    kl_form: Literal["flow_grpo", "gaussian"] = "gaussian",
    grouping: str = "parent",
    step_weights: bool = True,
    updates: int = 1,
) -> Recipe:
    """Builds TempFlow-GRPO; defaults are SD3.5-M's (GenEval) but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        trunks: ODE trunks per prompt, each from its own noise.
        children: stochastic children of every trunk state but the last.
        sde: their step, a name for `steps.named_sde`.
        noise_level: its a or eta; 0.7 SD3.5-M, 0.9 FLUX.
        clip: PPO clip range.
        kl: weight of the KL to the base model; 0.004 GenEval and FLUX, 0.001 PickScore.
        kl_form: "gaussian" is the released code's, the true KL of the steps.
        grouping: whose rewards are standardised together: "parent" the children of one state, as
            released; "prompt" those of one step over all trunks.
        step_weights: weigh the loss of a step with its noise; the weights have mean 1.
        updates: optimizer updates per iteration, trunk by trunk; 2 in the released code.

    Source: Shredded-Pork/TempFlow-GRPO `train_sd3_pr.py`, `sd3_pipeline_with_logprob_perstep.py`.
    """
    sg = check_sigmas("tempflow_grpo", sigmas)
    if grouping not in _GROUPS:
        raise ValueError(f"tempflow_grpo: grouping must be from {tuple(_GROUPS)}, got {grouping!r}")
    if (children if grouping == "parent" else trunks * children) < 2:
        raise ValueError(
            f"tempflow_grpo: children must make groups of at least 2 by {grouping}, got {children} "
            f"of {trunks} trunks"
        )
    check_updates("tempflow_grpo", updates, trunks)
    step = named_sde(sde, noise_level, sg)
    size = {"trunks": trunks, "children": children, "updates": updates}

    def grow(t: Tree, _at: Moment) -> None:
        grow_trunks(t, sg, step, **size, tail=lambda i: sg[i + 2 :])

    credit = depth_credit(columns=_GROUPS[grouping], ddof=0, eps=1e-4, floor=0.0)
    return Recipe(
        name="tempflow_grpo",
        grow=grow,
        credit=weighted(credit, noise_weight) if step_weights else credit,
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl, kl_form=kl_form),
        varies=False,
        updates=updates,
    )


_TRAINER: dict[str, Any] = {
    **FLOW_GRPO_TRAINER,
    "prompts_per_iteration": 48,
    "ema_decay": FLOW_GRPO_EMA,
}
_SD35 = "LoRA rank 32, 512 px, CFG 4.5, 48 GPUs"

PRESETS: dict[str, Preset] = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"updates": 2},
        trainer=_TRAINER,
        source=f"Shredded-Pork/TempFlow-GRPO config geneval_sd3_pr: {_SD35}",
    ),
    "sd3.5-m-pickscore": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"kl": 0.001, "updates": 2},
        trainer=_TRAINER,
        source=f"Shredded-Pork/TempFlow-GRPO config pickscore_sd3_pr: {_SD35}",
    ),
    "sd3.5-m-prompt-groups": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"grouping": "prompt", "updates": 2},
        trainer=_TRAINER,
        source=f"arXiv 2508.04324: groups of 4 x 6 over the prompt; else geneval_sd3_pr: {_SD35}",
    ),
    "flux": Preset(
        sigmas=flux_dynamic(10, 4096).tolist(),
        options={"noise_level": 0.9, "updates": 2},
        trainer=_TRAINER,
        source=(
            "Shredded-Pork/TempFlow-GRPO config flux_pr: LoRA rank 64, 1024 px, guidance 3.5, "
            "HPSv3; a = 0.9 is what its weight 1.73 normalises"
        ),
    ),
}
