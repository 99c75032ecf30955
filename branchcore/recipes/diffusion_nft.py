"""DiffusionNFT (arXiv 2509.16117): contrast of a policy pulled to good and pushed off bad images.

Images come from an ODE; each is re-noised at the schedule's levels but one. With
r = clip(A / 10 + 1/2, 0, 1), v+- = v_old +- beta (v - v_old) and x0+- = x_t - t v+-, the loss is
5 mean(r mean (x0+ - x0)^2 / (w+ beta) + (1 - r) mean (x0- - x0)^2 / (w- beta)).

v_old is the policy that samples, an average that follows the trained one: after iteration i it
keeps min(lag i, lag_max) of itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.matching import ContrastiveMatching
from branchcore.recipes.chains import FLOW_GRPO_TRAINER, check_group, renoise_at
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
from branchcore.steps import dpmpp
from branchcore.tree import Tree


@keeps_options
def diffusion_nft(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    times: int | None = None,
    order: int = 2,
    beta: float = 1.0,
    kl: float = 1e-4,
    global_std: bool = False,
    lag: float = 0.001,
    lag_start: int = 0,
    lag_max: float = 0.5,
    updates: int = 1,
) -> Recipe:
    """Builds DiffusionNFT; defaults are SD3.5-M's for GenEval but for the std.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: images per prompt, each from its own root noise.
        times: re-noised states per image at distinct levels of the schedule, drawn per image;
            None = int(0.99 T), T - 1 up to T = 100.
        order: of the solver, 1 to 3.
        beta: how far the two policies are from the old one; 1, 0.1 for OCR and several rewards.
        kl: weight of mean |v - v_base|^2.
        global_std: divide by the std over all prompts of a round; True in the released code.
        lag: growth per iteration of how much the sampling policy keeps of itself; 0 = the trained
            policy samples. Published 0.001 up to 0.5, or 0.0075 from iteration 75 on up to 0.999.
        lag_start: iteration from which it grows.
        lag_max: where it ends, below 1.
        updates: optimizer updates per iteration, whole images dealt to them; 2 for OCR.
    """
    sg = check_sigmas("diffusion_nft", sigmas)
    check_group("diffusion_nft", group)
    check_updates("diffusion_nft", updates, group)
    num_steps = len(sg) - 1
    count = int(0.99 * num_steps) if times is None else times
    if not 1 <= count <= num_steps:
        raise ValueError(f"diffusion_nft: times must be in 1..{num_steps}, got {count}")
    if not (0.0 <= lag < 1.0 and lag_start >= 0 and 0.0 <= lag_max < 1.0):
        raise ValueError(
            "diffusion_nft: lag and lag_max must be in [0, 1) and lag_start >= 0, got "
            f"{lag}, {lag_max} and {lag_start}"
        )
    solver, levels = dpmpp(order, warm_up=True), np.asarray(sg[:-1])

    def keeps(iteration: int) -> float:
        return min(lag * max(iteration - lag_start, 0), lag_max)

    def grow(t: Tree, at: Moment) -> None:
        leaves = t.leaf(t.chain(t.roots(group), sg[1:], solver))
        drawn = at.rng.permuted(np.tile(levels, (group, 1)), axis=1)[:, :count]
        renoise_at(t, leaves, list(drawn.T), updates=updates)

    return Recipe(
        name="diffusion_nft",
        grow=grow,
        credit=group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=ContrastiveMatching(beta=beta, kl=kl),
        sampler_decay=keeps if lag > 0.0 else None,
        varies=True,
        updates=updates,
    )


_TRAINER = {**FLOW_GRPO_TRAINER, "prompts_per_iteration": 48, "ema_decay": 0.9}
_SOURCE = "NVlabs/DiffusionNFT (8 GPUs): 512 px, 40 steps to evaluate, no CFG, LoRA 32/64"
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"global_std": True},
        trainer=_TRAINER,
        source=_SOURCE + "; GenEval, PickScore, HPSv2",
    ),
    "sd3.5-m-ocr": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={
            "beta": 0.1,
            "global_std": True,
            "lag": 0.0075,
            "lag_start": 75,
            "lag_max": 0.999,
            "updates": 2,
        },
        trainer=_TRAINER,
        source=_SOURCE + "; OCR, as copies of its configuration have it; the release counts the "
        "lag in optimizer updates, here in iterations",
    ),
    "sd3.5-m-multi-reward": Preset(
        sigmas=flow_match_euler(25).tolist(),
        options={"beta": 0.1, "global_std": True},
        trainer=_TRAINER,
        source=_SOURCE + "; PickScore, HPSv2 and CLIP score together",
    ),
}
