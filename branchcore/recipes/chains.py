"""Credit of chain methods: one advantage per image, the same for every step that led to it."""

from __future__ import annotations

import numpy as np

from branchcore.credit import (
    EdgeCredit,
    Floats,
    edge_values,
    lift,
    mean_weight,
    split_sign,
    standardize,
)
from branchcore.plan import Plan
from branchcore.recipes.recipe import Credit


def group_credit(
    *,
    ddof: int,
    eps: float,
    reward_first: bool = False,
    global_std: bool = False,
    separate: bool = False,
) -> Credit:
    """Returns GRPO's credit: rewards standardised within the prompt, lifted to every edge.

    Args:
        ddof: 1 in DanceGRPO, 0 in Flow-GRPO.
        eps: added to the std; 1e-8 in DanceGRPO, 1e-4 in Flow-GRPO.
        reward_first: normalise the weighted sum of raw rewards (Flow-GRPO) instead of summing
            normalised rewards.
        global_std: divide by the std over all prompts of the call instead of the prompt's own.
        separate: one clipped loss per reward (DanceGRPO).
    """

    def credit(plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats) -> EdgeCredit:
        group = plan.group(("prompt",))[plan.leaf]
        if reward_first:
            rewards_LR, weight_R = (rewards_LR @ weight_R)[:, None], np.ones(1)
        spread = rewards_LR.std(0, ddof=ddof) if global_std else None
        scores = standardize(rewards_LR, group, ddof=ddof, eps=eps, spread=spread)
        advantage = edge_values(plan, lift(plan, scores, mean_weight(plan)))
        return split_sign(advantage, weight_R, separate=separate)

    return credit
