"""DanceGRPO (arXiv 2505.07818): SDE chains from one root noise, a random 60 % of steps trained.

A = (r - mean_group) / (std_group + 1e-8) with the unbiased std; the image is the x0 read-out of the
last step, whose own noise no reward sees. Each sample trains its own random steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.objective import ClippedRatio
from branchcore.recipes.credits import group_credit
from branchcore.recipes.recipe import Moment, Recipe, check_sigmas, check_updates, keeps_options
from branchcore.steps import dance_sde, euler
from branchcore.tree import Tree


@keeps_options
def dance_grpo(
    sigmas: Sequence[float],
    *,
    group: int = 12,
    eta: float = 0.3,
    fraction: float = 0.6,
    clip: float = 1e-4,
    kl: float = 0.0,
    same_noise: bool = True,
    separate: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds DanceGRPO; defaults are FLUX's but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(16, 3).
        group: chains per prompt.
        eta: diffusion of the SDE.
        fraction: share of the first T - 1 steps that a sample trains.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none in the paper.
        same_noise: all chains of a prompt start from one root noise.
        separate: one clipped loss per reward, as its multi-reward scripts do.
        updates: optimizer updates per iteration; 3 in the 16-GPU script.
    """
    sg = check_sigmas("dance_grpo", sigmas)
    num_steps = len(sg) - 2
    num_trained = int(num_steps * fraction)
    if not 1 <= num_trained <= num_steps:
        raise ValueError(
            f"dance_grpo: fraction must select 1 to {num_steps} steps, got {fraction} "
            f"({num_trained} steps)"
        )
    check_updates("dance_grpo", updates, group)
    sde = dance_sde(eta)

    def grow(t: Tree, at: Moment) -> None:
        x = t.roots(group, same_noise=same_noise)
        order = at.rng.permuted(np.tile(np.arange(num_steps), (group, 1)), axis=1)
        update = np.arange(group) * updates // group
        for i, sigma in enumerate(sg[1:-1]):
            train = (order[:, :num_trained] == i).any(1)
            x = t.grow(x, sigma, sde, train=train, update=update)
        t.leaf(t.grow(x, sg[-1], euler))

    return Recipe(
        name="dance_grpo",
        grow=grow,
        credit=group_credit(ddof=1, eps=1e-8, separate=separate),
        objective=ClippedRatio(clip=(clip, clip), kl=kl),
        varies=num_trained < num_steps,
        updates=updates,
    )
