"""Flash-GRPO (arXiv 2605.15980): one stochastic step per prompt, equal for its whole group.

The step i is drawn once per prompt, uniformly from first..last - 1; Euler elsewhere. It is the SDE
step with g = sigma_min + (sigma_max - sigma_min) sigma, and the clipped loss is weighted by
(s_i / |b_i|) / mean_j (s_j / |b_j|), j over the candidate steps, which makes the gradient with
respect to the velocity equal in size at every step. A = (r - mean_group) / (std_group + 1e-4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.credit import Floats
from branchcore.objective import ClippedRatio
from branchcore.plan import Plan
from branchcore.recipes.chains import (
    FLOW_GRPO_EMA,
    FLOW_GRPO_TRAINER,
    check_group,
    grow_chains,
)
from branchcore.recipes.credits import group_credit, weighted
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import shifted_linear
from branchcore.steps import linear_sde
from branchcore.tree import Tree


@keeps_options
def flash_grpo(
    sigmas: Sequence[float],
    *,
    group: int = 8,
    sigma_min: float = 0.0,
    sigma_max: float | None = None,
    first: int = 0,
    last: int | None = None,
    clip: float = 1e-3,
    kl: float = 0.0,
    same_noise: bool = True,
    global_std: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds Flash-GRPO; defaults are the released 8-GPU script's but for noise, std and updates.

    Args:
        sigmas: (T + 1,) schedule; Wan2.1: shifted_linear(20, 3).
        group: chains per prompt.
        sigma_min: diffusion at the image; no number is published, the released code takes the
            schedule's last level, 0.
        sigma_max: diffusion at pure noise; None = the schedule's second level, as released.
        first: first candidate step.
        last: one past the last candidate step; None = T // 2, as released.
        clip: PPO clip range.
        kl: weight of the KL to the base model; the first released script had 0.001.
        same_noise: all chains of a prompt start from one root noise, so that they differ by the
            stochastic step alone and share all before it; False in the released code.
        global_std: divide by the std over all prompts of a round; True in the released code.
        updates: optimizer updates per iteration; 2 in the released code.
    """
    sg = check_sigmas("flash_grpo", sigmas)
    check_group("flash_grpo", group)
    check_updates("flash_grpo", updates, group)
    end = (len(sg) - 1) // 2 if last is None else last
    if not 0 <= first < end <= len(sg) - 2:
        raise ValueError(
            f"flash_grpo: first and last must be 0 <= first < last <= {len(sg) - 2}, got {first} "
            f"and {end}"
        )
    step = linear_sde(sigma_min, sg[1] if sigma_max is None else sigma_max)
    rows = [step((), sg[i], sg[i + 1]) for i in range(first, end)]
    mean = float(np.mean([row.s / -row.b for row in rows]))

    def grow(t: Tree, at: Moment) -> None:
        i = int(at.rng.integers(first, end))
        x = grow_chains(t, sg, step, (i,), group=group, same_noise=same_noise, updates=updates)
        t.leaf(x)

    group_std = group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std)
    return Recipe(
        name="flash_grpo",
        grow=grow,
        credit=weighted(group_std, lambda plan: rectification(plan) / mean),
        objective=ClippedRatio(clip=(clip, clip), kl=kl),
        varies=end - first > 1,
        updates=updates,
    )


def rectification(plan: Plan) -> Floats:
    """Returns (M,) s / |b| of every stochastic edge, 0 elsewhere.

    The gradient of the log-ratio with respect to the velocity is |b| / s times the noise.
    """
    b, s = plan.row[:, 1], plan.row[:, 3]
    acts = plan.stochastic
    return np.where(acts, s / np.where(acts, -b, 1.0), 0.0)


PRESETS = {
    "wan2.1": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"same_noise": False, "global_std": True, "updates": 2},
        trainer={
            **FLOW_GRPO_TRAINER,
            "lr": 1e-4,
            "prompts_per_iteration": 4,
            "ema_decay": FLOW_GRPO_EMA,
        },
        source="Shredded-Pork/Flash-GRPO wan2_1_flash (8 GPUs): Wan2.1-T2V-1.3B, 480 x 832 x 81, "
        "50 steps to evaluate, CFG 4.5, bf16, LoRA 16/32 on attention, HPSv3; its weight divides "
        "by the batch's mean, and its UniPC levels start at .9997 and differ by < .001",
    ),
}
