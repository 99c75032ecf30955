"""AWM, Advantage Weighted Matching (arXiv 2509.25050): PPO on the flow-matching loss of images.

Images come from an ODE. Each is re-noised at `times` levels, x_t = (1 - t) x0 + t eps, and
log p = -w(t) mean (v - (eps - x0))^2 takes the place of the steps' log-probability;
A = (r - mean_group) / (std_group + 1e-4), clamped to 5 and divided by it.

The released rollout is an SA-Solver of order 2, partly stochastic; here it is DPM-Solver++ of
order 2 on Flow-GRPO's levels. The released KL to a slowly moving average of the policy is not
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from branchcore.matching import AdvantageMatching
from branchcore.plan import Ints
from branchcore.recipes.chains import FLOW_GRPO_TRAINER, check_group, renoise_at
from branchcore.recipes.credits import group_credit, weighted
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
def awm(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    times: int = 6,
    order: int = 2,
    weighting: Literal["uniform", "t", "t2", "ghuber"] = "ghuber",
    power: float = 0.25,
    clip: float = 1.0,
    kl: float = 0.001,
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds AWM; defaults are SD3.5-M's for GenEval but for the std.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(14).
        group: images per prompt, each from its own root noise.
        times: re-noised states per image, one from each of as many equal parts of the steps
            1..int(0.9 T) - 1, drawn per image.
        order: of the solver, 1 to 3.
        weighting: w(t), see `AdvantageMatching`.
        power: of "ghuber".
        clip: PPO clip range.
        kl: weight of mean |v - v_base|^2; 0.001 GenEval, 0.003 OCR, 1e-4 PickScore.
        global_std: divide by the std over all prompts of a round; True in the released code.
        updates: optimizer updates per iteration, whole images dealt to them.
    """
    sg = check_sigmas("awm", sigmas)
    check_group("awm", group)
    check_updates("awm", updates, group)
    most = int(0.9 * (len(sg) - 1)) - 1
    if not 1 <= times <= most:
        raise ValueError(f"awm: times must be in 1..{most} with {len(sg) - 1} steps, got {times}")
    solver, levels = dpmpp(order, warm_up=True), np.asarray(sg)

    def grow(t: Tree, at: Moment) -> None:
        leaves = t.leaf(t.chain(t.roots(group), sg[1:], solver))
        steps = stratified(at.rng, times, most + 1, group)
        renoise_at(t, leaves, list(levels[steps]), updates=updates)

    return Recipe(
        name="awm",
        grow=grow,
        credit=weighted(
            group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
            lambda plan: np.full(len(plan), 0.2),
        ),
        objective=AdvantageMatching(weighting=weighting, power=power, clip=(clip, clip), kl=kl),
        varies=True,
        updates=updates,
    )


def stratified(rng: np.random.Generator, times: int, end: int, count: int) -> Ints:
    """Draws (times, count) steps, row j uniform in the j-th of equal parts of 1..end - 1."""
    bounds: NDArray[np.int64] = 1 + (end - 1) * np.arange(times + 1) // times
    return rng.integers(bounds[:-1, None], bounds[1:, None], (times, count))


_TRAINER = {**FLOW_GRPO_TRAINER, "prompts_per_iteration": 72, "ema_decay": 0.99}
_SOURCE = (
    "scxue/advantage_weighted_matching: 512 px, 40 steps to evaluate, no CFG, LoRA 32/64, SA-Solver"
)
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(14).tolist(),
        options={"global_std": True},
        trainer=_TRAINER,
        source=_SOURCE + "; GenEval",
    ),
    "sd3.5-m-ocr": Preset(
        sigmas=flow_match_euler(14).tolist(),
        options={"kl": 0.003, "global_std": True},
        trainer=_TRAINER,
        source=_SOURCE + "; OCR",
    ),
    "sd3.5-m-pickscore": Preset(
        sigmas=flow_match_euler(14).tolist(),
        options={"kl": 1e-4, "global_std": True},
        trainer={**_TRAINER, "prompts_per_iteration": 24},
        source=_SOURCE + "; PickScore; its release draws times from all steps and its levels are "
        "SA-Solver's, neither of which is built",
    ),
}
