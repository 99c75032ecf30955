"""Flow-GRPO (arXiv 2505.05470): independent SDE chains, group advantage, PPO clip, KL.

A = (r - mean_group) / (std_group + 1e-4); every step but the last is stochastic and trained.
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
    ratio_of,
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
from branchcore.schedule import flow_match_euler, flux_dynamic, shifted_linear
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def flow_grpo(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.04,
    kl_form: Literal["flow_grpo", "gaussian"] = "flow_grpo",
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds Flow-GRPO; defaults are SD3.5-M's (GenEval, OCR) but for the std and the updates.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: chains per prompt, each from its own root noise.
        sde: "flow_sde", "dance_sde", "cps", or "linear_sde" (Wan), see `steps.named_sde`.
        noise_level: its a or eta; 0.7 SD3.5-M, 0.9 FLUX.
        clip: PPO clip range.
        kl: weight of the KL to the base model; 0.04 GenEval and OCR, 0.01 PickScore, 0 FLUX.
        kl_form: "flow_grpo" is the released code's, which lacks a factor 1 / dt; "gaussian" the
            true KL of the steps.
        global_std: divide by the std over all prompts of a round, not the prompt's own; True in
            the released SD3 configurations.
        updates: optimizer updates per iteration; 2 in the released code.
    """
    sg = check_sigmas("flow_grpo", sigmas)
    check_group("flow_grpo", group)
    check_updates("flow_grpo", updates, group)
    step = named_sde(sde, noise_level, sg)

    def grow(t: Tree, _at: Moment) -> None:
        t.leaf(grow_chains(t, sg, step, range(len(sg) - 2), group=group, updates=updates))

    return Recipe(
        name="flow_grpo",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=ClippedRatio(
            ratio=ratio_of(sde),
            clip=(clip, clip),
            kl=kl,
            # the release divides by the returned std^2, which for cps is the step's own
            kl_form="gaussian" if sde == "cps" else kl_form,
        ),
        varies=False,
        updates=updates,
    )


_TRAINER = {**FLOW_GRPO_TRAINER, "prompts_per_iteration": 48, "ema_decay": FLOW_GRPO_EMA}
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo geneval_sd3, general_ocr_sd3: 512 px, 40 steps to evaluate, "
        "CFG 4.5, LoRA 32/64 on attention",
    ),
    "sd3.5-m-pickscore": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"kl": 0.01, "global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo pickscore_sd3: 512 px, CFG 4.5, LoRA 32/64 on attention",
    ),
    "sd3.5-m-no-kl": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"kl": 0.0, "global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="arXiv 2505.05470, OCR and PickScore without KL: 512 px, CFG 4.5, LoRA 32/64",
    ),
    "sd3.5-m-1gpu": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"group": 8, "global_std": True, "updates": 2},
        trainer={**_TRAINER, "prompts_per_iteration": 8},
        source="yifan123/flow_grpo demo configuration for one GPU: 512 px, CFG 4.5, LoRA 32/64",
    ),
    "sd3.5-m-4gpu": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"group": 16, "global_std": True, "updates": 2},
        trainer={**_TRAINER, "prompts_per_iteration": 16},
        source="yifan123/flow_grpo demo configuration for four GPUs: 512 px, CFG 4.5, LoRA 32/64",
    ),
    "flux": Preset(
        sigmas=flux_dynamic(6, 1024).tolist(),
        options={"noise_level": 0.9, "kl": 0.0, "global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo pickscore_flux: 512 px, 28 steps to evaluate, guidance 3.5, "
        "LoRA 64/128 on attention and feed-forward",
    ),
    "wan2.1": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={
            "group": 4,
            "sde": "linear_sde",
            "noise_level": 1.0,
            "clip": 1e-3,
            "kl": 0.004,
            "updates": 2,
        },
        trainer={**FLOW_GRPO_TRAINER, "lr": 1e-4, "ema_decay": FLOW_GRPO_EMA},
        source="yifan123/flow_grpo general_ocr_wan2_1: Wan2.1-T2V-1.3B, 240 x 416 x 33, 50 steps "
        "to evaluate, CFG 4.5, LoRA; its UniPC levels start at .9997 and differ by < .001",
    ),
}
