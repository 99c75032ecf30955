"""Flow-GRPO-Fast, current version (October 2025): a random window of stochastic steps.

The window starts uniformly in first..last - window and is all that is trained; Euler elsewhere.
A = (r - mean_group) / (std_group + 1e-4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import (
    FLOW_GRPO_EMA,
    FLOW_GRPO_TRAINER,
    check_group,
    check_window,
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
from branchcore.schedule import flow_match_euler, flux_dynamic
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def flow_grpo_fast_v2(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    window: int = 3,
    first: int = 0,
    last: int | None = None,
    sde: str = "cps",
    noise_level: float = 0.8,
    clip: float = 1e-5,
    kl: float = 0.0,
    global_std: bool = False,
    per: str = "prompt",
    updates: int = 1,
) -> Recipe:
    """Builds Flow-GRPO-Fast v2; defaults are SD3.5-M's GenEval but for the std and the updates.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: chains per prompt, each from its own root noise.
        window: stochastic steps.
        first: first step that a window may have.
        last: one past the last step that a window may have; None = T // 2, as published.
        sde: "cps", or "flow_sde" (Qwen-Image); see `steps.named_sde`.
        noise_level: its a or eta.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none published.
        global_std: divide by the std over all prompts of a round; True in the released code but
            for FLUX's PickScore.
        per: "prompt": a group shares its window; "iteration": all prompts of the iteration do. The
            released code draws per pipeline call, so that groups mix windows.
        updates: optimizer updates per iteration; 2 in the released code.
    """
    sg = check_sigmas("flow_grpo_fast_v2", sigmas)
    check_group("flow_grpo_fast_v2", group)
    check_updates("flow_grpo_fast_v2", updates, group)
    num_steps = len(sg) - 1
    end = num_steps // 2 if last is None else last
    if not 0 <= first < end <= num_steps - 1:
        raise ValueError(
            f"flow_grpo_fast_v2: first and last must be 0 <= first < last <= {num_steps - 1}, got "
            f"{first} and {end}"
        )
    check_window("flow_grpo_fast_v2", window, end - first, f"from {first} to {end - 1}")
    if per not in ("prompt", "iteration"):
        raise ValueError(f"flow_grpo_fast_v2: per must be 'prompt' or 'iteration', got {per!r}")
    step = named_sde(sde, noise_level, sg)

    def grow(t: Tree, at: Moment) -> None:
        rng = at.rng if per == "prompt" else at.shared_rng
        start = int(rng.integers(first, end - window + 1))
        steps = range(start, start + window)
        t.leaf(grow_chains(t, sg, step, steps, group=group, updates=updates))

    return Recipe(
        name="flow_grpo_fast_v2",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl),
        varies=end - first > window,
        updates=updates,
    )


def _qwen_image(steps: int, image_tokens: int) -> list[float]:
    """Returns Qwen-Image's schedule: FLUX's with other anchors, stretched to end at 0.02, then 0.

    Source: diffusers' scheduler with the shifts and `shift_terminal` of Qwen/Qwen-Image.
    """
    mu = 0.5 + (0.9 - 0.5) * (image_tokens - 256) / (8192 - 256)
    t = np.linspace(1.0, 1.0 / steps, steps)
    sigma = math.exp(mu) / (math.exp(mu) + 1.0 / t - 1.0)
    stretched = 1.0 - (1.0 - sigma) * (1.0 - 0.02) / (1.0 - sigma[-1])
    return [1.0, *stretched[1:].tolist(), 0.0]


_TRAINER = {**FLOW_GRPO_TRAINER, "prompts_per_iteration": 48, "ema_decay": FLOW_GRPO_EMA}
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo geneval_sd3_fast_nocfg: 512 px, no CFG, LoRA 32/64",
    ),
    "sd3.5-m-pickscore": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"group": 18, "global_std": True, "updates": 2},
        trainer={**_TRAINER, "prompts_per_iteration": 64},
        source="yifan123/flow_grpo pickscore_sd3_fast_nocfg: 512 px, no CFG, LoRA 32/64",
    ),
    "flux": Preset(
        sigmas=flux_dynamic(6, 1024).tolist(),
        options={"global_std": True, "updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo geneval_flux_fast: 512 px, guidance 3.5, LoRA 64/128",
    ),
    "flux-pickscore": Preset(
        sigmas=flux_dynamic(6, 1024).tolist(),
        options={"updates": 2},
        trainer=_TRAINER,
        source="yifan123/flow_grpo pickscore_flux_fast: 512 px, guidance 3.5, LoRA 64/128",
    ),
    "qwen-image": Preset(
        sigmas=_qwen_image(10, 1024),
        options={
            "group": 16,
            "window": 2,
            "sde": "flow_sde",
            "noise_level": 1.2,
            "clip": 1e-4,
            "global_std": True,
            "updates": 2,
        },
        trainer={**FLOW_GRPO_TRAINER, "prompts_per_iteration": 32},
        source="yifan123/flow_grpo pickscore_qwenimage: 512 px, 50 steps to evaluate, CFG 4, LoRA",
    ),
}
