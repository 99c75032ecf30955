"""G2RPO, Granular-GRPO (arXiv 2510.01982): one noisy step at a time, seen at several granularities.

An ODE anchor per prompt; at each step k of its first half G stochastic children, each finished by
ODE once per stride g, on every g-th noise level. A = sum_g (r_g - mean_g) / (std_g + 1e-8) over the
G children of step k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import check_group
from branchcore.recipes.credits import granular_credit
from branchcore.recipes.recipe import Moment, Preset, Recipe, check_sigmas, keeps_options
from branchcore.schedule import shifted_linear
from branchcore.steps import euler, flow_sde
from branchcore.tree import Tree


@keeps_options
def g2rpo(
    sigmas: Sequence[float],
    *,
    group: int = 12,
    strides: Sequence[int] = (1, 2, 3),
    steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.0,
    update_per_step: bool = False,
) -> Recipe:
    """Builds G2RPO; defaults are FLUX's but for one update per iteration.

    A leaf's label is step * len(strides) + stride index. Labels are part of what makes nodes equal,
    so that tails share their states but never their leaves: where two strides leave the same jump
    to 0, its image is decoded and counted once per stride, as published. A stride given twice
    counts twice.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(16, 3).
        group: stochastic children per step.
        strides: of the tails, in steps; (1, 2, 3) in the paper, (1, 2) in the script.
        steps: how many steps branch, the first ones; None = T // 2.
        noise_level: the SDE's a.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none in the paper.
        update_per_step: one optimizer update per step k, as released, instead of one for all.

    Source: bcmi/Granular-GRPO `train_g2rpo_hps.py`.
    """
    sg = check_sigmas("g2rpo", sigmas)
    num_steps = len(sg) - 1
    branching = num_steps // 2 if steps is None else steps
    if not 1 <= branching < num_steps:
        raise ValueError(f"g2rpo: steps must be in 1..{num_steps - 1}, got {branching}")
    longest = max(1, num_steps - 2)
    if not strides or not all(1 <= g <= longest for g in strides):
        raise ValueError(
            f"g2rpo: strides must be in 1..{longest}, a longer one jumps past the end from every "
            f"step, got {tuple(strides)}"
        )
    check_group("g2rpo", group)
    sde = flow_sde(noise_level, sg[1])

    def grow(t: Tree, _at: Moment) -> None:
        x = t.roots(1)
        for k in range(branching):
            update = k if update_per_step else 0
            kids = t.grow(x, sg[k + 1], sde, children=group, train=True, update=update)
            for j, g in enumerate(strides):
                tail = [*sg[k + 2 :: g][:-1], 0.0]
                t.leaf(t.chain(kids, tail, euler), label=k * len(strides) + j)
            x = t.grow(x, sg[k + 1], euler)

    return Recipe(
        name="g2rpo",
        grow=grow,
        credit=granular_credit(),
        objective=ClippedRatio(clip=(clip, clip), kl=kl),
        varies=False,
        updates=branching if update_per_step else 1,
    )


_TRAINER: dict[str, Any] = {
    "lr": 2e-6,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "prompts_per_iteration": 16,
}
_SETTING = "720 px, guidance 3.5, full fine-tuning, 16 GPUs, HPSv2.1 or HPSv2.1 and CLIP"

PRESETS: dict[str, Preset] = {
    "flux": Preset(
        sigmas=shifted_linear(16, 3.0).tolist(),
        options={"update_per_step": True},
        trainer=_TRAINER,
        source=f"arXiv 2510.01982: {_SETTING}",
    ),
    "flux-released": Preset(
        sigmas=shifted_linear(16, 3.0).tolist(),
        options={"strides": (1, 2), "update_per_step": True},
        trainer=_TRAINER,
        source=f"bcmi/Granular-GRPO finetune_g2rpo_hps.sh: {_SETTING}",
    ),
}
