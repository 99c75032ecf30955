"""MixGRPO (arXiv 2507.21802): a sliding window of stochastic steps, ODE before and after.

A = sum_r w_r (r - mean_group) / (std_group + 1e-8), sum_r w_r = 1, unbiased std; only the window is
trained. All samples of a prompt start from one root noise, so that the steps before the window are
common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import check_group, grow_chains, ratio_of
from branchcore.recipes.credits import group_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.recipes.windows import SlidingWindow
from branchcore.schedule import flow_match_euler, shifted_linear
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def mix_grpo(
    sigmas: Sequence[float],
    *,
    group: int = 12,
    window: int = 4,
    schedule: str = "progressive",
    interval: int = 25,
    min_interval: int = 1,
    stride: int = 1,
    start: int = 0,
    roll_back: bool = True,
    cut: bool = False,
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.0,
    kl_form: Literal["gaussian", "flow_grpo"] = "gaussian",
    log_ratio_penalty: float = 0.0,
    same_noise: bool = True,
    reward_first: bool = False,
    trimmed: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds MixGRPO; defaults are FLUX's but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(25, 3).
        group: chains per prompt.
        window: stochastic steps.
        schedule: how the window moves: "progressive", "linear", "exponential", "random" or
            "frozen"; see `windows`.
        interval: iterations between moves.
        min_interval: shortest one of the linear schedule, whose script goes from 10 to 1.
        stride: steps per move.
        start: first step of the first window.
        roll_back: start anew after the last window instead of staying there.
        cut: let windows shrink at step T - 2, as released, instead of keeping their length.
        sde: "flow_sde", or "cps" (the paper's best); see `steps.named_sde`.
        noise_level: its a or eta; 0.7, 0.8 for cps.
        clip: PPO clip range.
        kl: weight of the KL to the base model; 0 on FLUX, 0.001 on SD3.5-M.
        kl_form: "gaussian" is the true KL of the steps, "flow_grpo" that times dt.
        log_ratio_penalty: weight of half the squared log-ratio; 0 in the scripts.
        same_noise: all chains of a prompt start from one root noise.
        reward_first: normalise the weighted sum of raw rewards instead of each reward.
        trimmed: lowest fraction of the group that mean and std leave out.
        updates: optimizer updates per iteration; 4 in the script.
    """
    sg = check_sigmas("mix_grpo", sigmas)
    check_group("mix_grpo", group)
    check_updates("mix_grpo", updates, group)
    moving = SlidingWindow(
        recipe="mix_grpo",
        steps=len(sg) - 1,
        window=window,
        schedule=schedule,
        interval=interval,
        min_interval=min_interval,
        stride=stride,
        start=start,
        roll_back=roll_back,
        cut=cut,
    )
    step = named_sde(sde, noise_level, sg)

    def grow(t: Tree, at: Moment) -> None:
        steps = moving.at(at)
        x = grow_chains(t, sg, step, steps, group=group, same_noise=same_noise, updates=updates)
        t.leaf(x)

    return Recipe(
        name="mix_grpo",
        grow=grow,
        credit=group_credit(
            ddof=1, eps=1e-8, reward_first=reward_first, trimmed=trimmed, average=True
        ),
        objective=ClippedRatio(
            ratio=ratio_of(sde),
            clip=(clip, clip),
            kl=kl,
            kl_form=kl_form,
            log_ratio_penalty=log_ratio_penalty,
        ),
        varies=moving.varies,
        updates=updates,
    )


FLUX_TRAINER = {
    "lr": 1e-5,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "prompts_per_iteration": 32,
}
"""Of the FLUX script, which MixGRPO-Flash shares."""

_SCRIPT = (
    "Tencent-Hunyuan/MixGRPO finetune_flux_grpo_MixGRPO.sh (32 GPUs): 720 px, 50 steps to "
    "evaluate, guidance 3.5, full fine-tune, three or four rewards of equal weight, 300 iterations"
)
PRESETS = {
    "flux": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"updates": 4},
        trainer=FLUX_TRAINER,
        source=_SCRIPT,
    ),
    "flux-random": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"schedule": "random", "updates": 4},
        trainer=FLUX_TRAINER,
        source=_SCRIPT + "; random windows, here alike on all ranks",
    ),
    "flux-linear": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"schedule": "linear", "updates": 4},
        trainer=FLUX_TRAINER,
        source=_SCRIPT + "; linear decay of the interval",
    ),
    "flux-exponential": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"schedule": "exponential", "updates": 4},
        trainer=FLUX_TRAINER,
        source=_SCRIPT + "; exponential decay of the interval",
    ),
    "flux-frozen": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"schedule": "frozen", "updates": 4},
        trainer=FLUX_TRAINER,
        source=_SCRIPT + "; the first four steps only",
    ),
    "flux-cps": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"sde": "cps", "noise_level": 0.8, "updates": 4},
        trainer=FLUX_TRAINER,
        source=_SCRIPT + "; sde_type cps",
    ),
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"group": 24, "interval": 150, "kl": 0.001, "kl_form": "flow_grpo"},
        trainer={"lr": 3e-4},
        source="MixGRPO paper, SD3.5-M (24 GPUs): 512 px, 40 steps to evaluate, CFG 4.5, LoRA; "
        "form of the KL and number of updates not given",
    ),
}
