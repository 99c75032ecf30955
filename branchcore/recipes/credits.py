"""How rewards become advantages, one builder per published estimator; recipes choose one.

Credit is `lift` and `standardize` of `branchcore.credit` in some order; single-node and zero-std
groups get 0 there. Edges with b = 0 take the value of the image that they re-noise. The estimators
of trees are in `tree_credits`, weights of steps in `step_weights`, and importable from here, too.
Letters: M rows, L leaves, R rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.credit import (
    EdgeCredit,
    Floats,
    edge_values,
    lift,
    mean_weight,
    pooled_std,
    relative,
    split_sign,
    standardize,
)
from branchcore.leaf_weights import LeafWeight
from branchcore.plan import Plan
from branchcore.recipes.recipe import Credit, PooledCredit, weighs_leaves
from branchcore.recipes.step_weights import inverse_step_weight, noise_weight, weighted
from branchcore.recipes.tree_credits import (
    ancestor_credit,
    depth_credit,
    gain_credit,
    leaf_credit,
    leaf_prompts,
)
from branchcore.recipes.value_credits import value_credit

__all__ = [
    "ancestor_credit",
    "depth_credit",
    "exponential_credit",
    "gain_credit",
    "gdpo_credit",
    "granular_credit",
    "group_credit",
    "inverse_step_weight",
    "leaf_credit",
    "noise_weight",
    "pair_credit",
    "value_credit",
    "weighted",
]

Condition = tuple[int, int, float]


def _weighted_sum(values_nR: Floats, weight_R: Floats) -> Floats:
    """(n, 1) sum over rewards, in which a reward of zeros leaves no trace."""
    return (values_nR * weight_R).sum(1, keepdims=True)


def group_credit(
    *,
    ddof: int,
    eps: float,
    reward_first: bool = False,
    global_std: bool = False,
    separate: bool = False,
    trimmed: float = 0.0,
    average: bool = False,
) -> Credit:
    """Returns GRPO's credit: rewards standardised within the prompt, lifted to every edge.

    Args:
        ddof: 1 in DanceGRPO, 0 in Flow-GRPO.
        eps: added to the std; 1e-8 in DanceGRPO, 1e-4 in Flow-GRPO.
        reward_first: normalise the weighted sum of raw rewards (Flow-GRPO) instead of summing
            normalised rewards.
        global_std: divide by the std over all prompts of the call instead of the prompt's own; the
            result is a `PooledCredit`.
        separate: one clipped loss per reward (DanceGRPO).
        trimmed: lowest fraction of the group that mean and std leave out (MixGRPO), in [0, 1).
        average: divide the rewards' weights by their sum (MixGRPO).

    Raises:
        ValueError: trimmed outside [0, 1), or options that exclude each other.
    """
    if not 0.0 <= trimmed < 1.0:
        raise ValueError(f"group_credit: trimmed must be in [0, 1), got {trimmed}")
    if reward_first and separate:
        raise ValueError("group_credit: separate must be False with reward_first, got True")
    if global_std and trimmed:
        raise ValueError(f"group_credit: trimmed must be 0 with global_std, got {trimmed}")

    def pool(
        _plan: Plan, rewards_LR: Floats, weight_R: Floats, _leaf_weight: LeafWeight = None, /
    ) -> Floats:
        return _weighted_sum(rewards_LR, weight_R) if reward_first else rewards_LR

    @weighs_leaves
    def credit(
        plan: Plan,
        rewards_LR: Floats,
        weight_R: Floats,
        _log_prob: Floats,
        leaf_weight: LeafWeight,
        spread: Floats | None = None,
    ) -> EdgeCredit:
        prompts, scored = leaf_prompts(plan), rewards_LR
        if global_std and spread is None:
            near = relative(rewards_LR, np.zeros_like(prompts)) if reward_first else rewards_LR
            spread = pooled_std(pool(plan, near, weight_R), ddof, leaf_weight)
        if reward_first:
            scored = _weighted_sum(relative(rewards_LR, prompts), weight_R)
            weight_R = np.ones(1)
        scores = standardize(
            scored,
            prompts,
            ddof=ddof,
            eps=eps,
            spread=spread,
            trimmed=trimmed,
            weight_n=leaf_weight,
        )
        advantage = edge_values(plan, lift(plan, scores, mean_weight(plan), leaf_weight))
        share_R = weight_R / weight_R.sum() if average else weight_R
        return split_sign(advantage, share_R, separate=separate)

    return PooledCredit(credit=credit, pool=pool, ddof=ddof) if global_std else credit


def granular_credit(*, ddof: int = 1, eps: float = 1e-8) -> Credit:
    """Returns G2RPO's credit: standardised per prompt and label, summed over the leaves below.

    Leaves of one label are continued alike (step and stride), so that an action's advantage is the
    sum over its granularities, clipped after the sum.

    Args:
        ddof: of the std.
        eps: added to the std; 1e-8 in the released code.

    Source: G2RPO, arXiv 2510.01982; bcmi/Granular-GRPO.
    """

    @weighs_leaves
    def credit(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats, leaf_weight: LeafWeight
    ) -> EdgeCredit:
        group = plan.group(("prompt", "label"))[plan.leaf]
        scores = standardize(rewards_LR, group, ddof=ddof, eps=eps, weight_n=leaf_weight)
        lifted = lift(plan, scores, leaf_weight_L=leaf_weight)
        return split_sign(edge_values(plan, lifted), weight_R)

    return credit


def gdpo_credit(
    *, ddof: int = 1, eps: float = 1e-4, conditions: Sequence[Condition] = ()
) -> Credit:
    """Returns GDPO's credit: every reward standardised alone, summed, divided by the call's std.

    Every group's sum has mean 0, so that the batch step is one positive factor for all prompts,
    which a `PooledCredit` may be given.

    Args:
        ddof: of both stds; 1 in the released code.
        eps: added to both stds; 1e-4 in the released code.
        conditions: (reward, behind, threshold) by index: `reward` counts only where reward `behind`
            is at least the threshold, else as 0.

    Raises:
        ValueError: at build, a condition on itself; at credit, fewer than 2 rewards or an index
            that names none.

    Source: GDPO, arXiv 2601.05242; NVlabs/GDPO.
    """
    conditions = tuple(conditions)
    for reward, behind, _ in conditions:
        if reward == behind or min(reward, behind) < 0:
            raise ValueError(
                f"gdpo_credit: conditions must name two different rewards from 0, got "
                f"{(reward, behind)}"
            )

    def pool(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, leaf_weight: LeafWeight = None, /
    ) -> Floats:
        num_rewards = rewards_LR.shape[1]
        if num_rewards < 2:
            raise ValueError(
                f"gdpo_credit: rewards must have at least 2 components, got {num_rewards}; "
                "try group_credit"
            )
        values = rewards_LR.copy()
        for reward, behind, threshold in conditions:
            if max(reward, behind) >= num_rewards:
                raise ValueError(
                    f"gdpo_credit: conditions must name rewards in 0..{num_rewards - 1}, got "
                    f"{(reward, behind)}"
                )
            values[rewards_LR[:, behind] < threshold, reward] = 0.0
        each = standardize(values, leaf_prompts(plan), ddof=ddof, eps=eps, weight_n=leaf_weight)
        return _weighted_sum(each, weight_R)

    @weighs_leaves
    def credit(
        plan: Plan,
        rewards_LR: Floats,
        weight_R: Floats,
        _log_prob: Floats,
        leaf_weight: LeafWeight,
        spread: Floats | None = None,
    ) -> EdgeCredit:
        total = pool(plan, rewards_LR, weight_R, leaf_weight)
        spread = pooled_std(total, ddof, leaf_weight) if spread is None else spread
        prompts = leaf_prompts(plan)
        scores = standardize(total, prompts, eps=eps, spread=spread, weight_n=leaf_weight)
        advantage = edge_values(plan, lift(plan, scores, mean_weight(plan), leaf_weight))
        return split_sign(advantage, np.ones(1))

    return PooledCredit(credit=credit, pool=pool, ddof=ddof)


def pair_credit() -> Credit:
    """Returns Flow-DPO's credit: a prompt's best leaf gets 1, its worst -1, all others 0.

    Leaves rank by the weighted sum of their rewards, the first of equals is taken; a prompt whose
    leaves all tie gets 0. Leaf weights only say who is missing.

    Source: Flow-DPO, arXiv 2501.13918; yifan123/flow_grpo takes argmax and argmin of a group.
    """

    @weighs_leaves
    def credit(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats, leaf_weight: LeafWeight
    ) -> EdgeCredit:
        owner = leaf_prompts(plan)
        there = np.ones(len(owner), dtype=bool) if leaf_weight is None else leaf_weight > 0.0
        score = _weighted_sum(relative(rewards_LR, owner), weight_R)[:, 0]
        rows, node = np.flatnonzero(plan.leaf), np.zeros((len(plan), 1))
        for prompt in range(plan.num_prompts):
            mine = np.flatnonzero((owner == prompt) & there)
            if not len(mine):
                continue
            best, worst = mine[np.argmax(score[mine])], mine[np.argmin(score[mine])]
            if score[best] > score[worst]:
                node[rows[best]], node[rows[worst]] = 1.0, -1.0
        return split_sign(edge_values(plan, node), np.ones(1))

    return credit


def exponential_credit(*, temperature: float = 1.0, cap: float) -> Credit:
    """Returns Flow-RWR's credit: A+ = min(exp(z / temperature), cap), A- = 0.

    z is the weighted sum of the rewards' z-scores within the prompt (biased std, eps 1e-4); the
    paper exponentiates the raw reward. Without a spread z is 0 and A+ 1, a plain matching loss.

    Args:
        temperature: > 0.
        cap: bound on A+, > 0.

    Raises:
        ValueError: a number that is not positive.

    Source: Flow-RWR, arXiv 2501.13918.
    """
    if not (temperature > 0.0 and 0.0 < cap < np.inf):
        raise ValueError(
            "exponential_credit: temperature and cap must be positive and finite, got "
            f"{temperature} and {cap}"
        )

    @weighs_leaves
    def credit(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats, leaf_weight: LeafWeight
    ) -> EdgeCredit:
        prompts = leaf_prompts(plan)
        scores = standardize(rewards_LR, prompts, ddof=0, eps=1e-4, weight_n=leaf_weight)
        z = edge_values(plan, lift(plan, scores, mean_weight(plan), leaf_weight)) @ weight_R
        # exp alone may overflow, and exp(log(cap)) may miss cap by its rounding
        plus = np.minimum(np.exp(np.minimum(z / temperature, np.log(cap))), cap)
        return EdgeCredit(np.stack([plus, np.zeros_like(plus)], axis=1), z)

    return credit
