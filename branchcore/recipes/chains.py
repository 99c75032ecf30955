"""Credit of chain methods: one advantage per image, the same for every step that led to it."""

from __future__ import annotations

from branchcore.credit import Floats, edge_values, lift, mean_weight, split_sign, standardize
from branchcore.plan import Plan
from branchcore.recipes.recipe import Credit


def group_credit(
    *, ddof: int, eps: float, reward_first: bool = False, separate: bool = False
) -> Credit:
    """Returns GRPO's credit: rewards standardised within the prompt, lifted to every edge.

    Args:
        ddof: 1 in DanceGRPO, 0 in Flow-GRPO.
        eps: added to the std; 1e-8 in DanceGRPO, 1e-4 in Flow-GRPO.
        reward_first: normalise the weighted sum of raw rewards (Flow-GRPO) instead of summing
            normalised rewards.
        separate: one clipped loss per reward (DanceGRPO).
    """

    def credit(plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats) -> Floats:
        group = plan.group(("prompt",))[plan.leaf]
        if reward_first:
            rewards_LR, weight_R = (rewards_LR @ weight_R)[:, None], weight_R[:1] * 0.0 + 1.0
        scores = standardize(rewards_LR, group, ddof=ddof, eps=eps)
        advantage = edge_values(plan, lift(plan, scores, mean_weight(plan)))
        return split_sign(advantage, weight_R, separate=separate)

    return credit
