"""TempFlow's trunk with instant rewards: every stochastic child is read out by one Euler step.

No tail is sampled, so that an action costs one forward instead of up to T - 1: r = R(x - sigma v)
at the child. The read-out is blurred at early steps, alike for all siblings, whose rewards are
standardised together. Source: the trunk of TempFlow-GRPO (arXiv 2508.04324) with the instant
reward of VGPO (arXiv 2512.12387, eq. 9); the combination is no published method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from branchcore.objective import ClippedRatio
from branchcore.recipes.branching import grow_trunks
from branchcore.recipes.chains import ratio_of
from branchcore.recipes.credits import depth_credit, noise_weight, weighted
from branchcore.recipes.recipe import Moment, Recipe, check_sigmas, check_updates, keeps_options
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def instant_rewards(
    sigmas: Sequence[float],
    *,
    trunks: int = 4,
    children: int = 6,
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.004,
    kl_form: Literal["flow_grpo", "gaussian"] = "gaussian",
    step_weights: bool = True,
    updates: int = 1,
) -> Recipe:
    """Builds the recipe; its options are those of `tempflow_grpo`.

    Args:
        sigmas: (T + 1,) schedule.
        trunks: ODE trunks per prompt, each from its own noise.
        children: stochastic children of every trunk state but the last.
        sde: their step, a name for `steps.named_sde`.
        noise_level: its a or eta.
        clip: PPO clip range.
        kl: weight of the KL to the base model.
        kl_form: see `tempflow_grpo`.
        step_weights: weigh the loss of a step with its noise; the weights have mean 1.
        updates: optimizer updates per iteration, trunk by trunk.
    """
    sg = check_sigmas("instant_rewards", sigmas)
    if children < 2:
        raise ValueError(f"instant_rewards: children must be at least 2, got {children}")
    check_updates("instant_rewards", updates, trunks)
    step = named_sde(sde, noise_level, sg)
    size = {"trunks": trunks, "children": children, "updates": updates}

    def grow(t: Tree, _at: Moment) -> None:
        grow_trunks(t, sg, step, **size, tail=lambda _: [0.0])

    credit = depth_credit(columns=("parent",), ddof=0, eps=1e-4, floor=0.0)
    return Recipe(
        name="instant_rewards",
        grow=grow,
        credit=weighted(credit, noise_weight) if step_weights else credit,
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl, kl_form=kl_form),
        varies=False,
        updates=updates,
    )
