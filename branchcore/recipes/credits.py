"""How rewards become advantages, one function per published estimator; recipes choose one."""

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


def depth_credit(*, beta: float = 0.0, local: bool = False) -> Credit:
    """Returns BranchGRPO's credit: rewards fused upward, standardised per tree and depth.

    Args:
        beta: inverse temperature of the fusion; 0 = mean over descendant leaves. Multiplies mean
            log-probabilities; for the sum scale multiply it by the number of latent elements.
        local: softmax over the immediate children, as the released code.

    Source: BranchGRPO eq. 3-4: ddof 1, eps 1e-8, advantage 0 where a depth's std is below 1e-6.
    """

    def credit(plan: Plan, rewards_LR: Floats, weight_R: Floats, log_prob_M: Floats) -> EdgeCredit:
        weight_M = mean_weight(plan, log_prob_M, beta=beta, local=local)
        fused = lift(plan, rewards_LR, weight_M)
        value = edge_values(plan, fused)
        group = plan.group(("tree", "depth"))
        advantage = standardize(value, group, ddof=1, eps=1e-8, floor=1e-6, among=plan.stochastic)
        return split_sign(advantage, weight_R)

    return credit
