"""How rewards become advantages inside a tree: what a step is worth, not what an image is worth.

Letters: M rows, L leaves, R rewards. Import these from `branchcore.recipes.credits`.
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
    relative,
    split_sign,
    standardize,
)
from branchcore.leaf_weights import LeafWeight, edge_weight
from branchcore.plan import Ints, Plan
from branchcore.recipes.recipe import Credit, weighs_leaves


def leaf_prompts(plan: Plan) -> Ints:
    """Returns (L,) the prompt of every leaf."""
    return plan.group(("prompt",))[plan.leaf]


def depth_credit(
    *,
    beta: float = 0.0,
    local: bool = False,
    columns: Sequence[str] = ("tree", "depth"),
    ddof: int = 1,
    eps: float = 1e-8,
    floor: float = 1e-6,
) -> Credit:
    """Returns the credit of fused rewards: lifted first, standardised per group of nodes.

    BranchGRPO groups by ("tree", "depth"), Multi-GRPO and TempFlow's paper by ("prompt", "depth"),
    TempFlow's code and TreeRPO by ("parent",). Only stochastic edges take part, trained or not.

    Args:
        beta: inverse temperature of the fusion; 0 = mean over descendant leaves. Multiplies mean
            log-probabilities; for the sum scale multiply it by the number of latent elements.
        local: softmax over the immediate children, as BranchGRPO's released code.
        columns: of the plan, which make the groups; one of them must be prompt, tree or parent.
        ddof: 1 in BranchGRPO, 0 in TempFlow.
        eps: added to the std; 1e-8 in BranchGRPO, 1e-4 in TempFlow.
        floor: groups whose std is below it get 0; 1e-6 in BranchGRPO, TreeRPO's spread filter.

    Raises:
        ValueError: groups would cross prompts.

    Source: BranchGRPO eq. 3-4; Multi-GRPO, arXiv 2512.00743; TempFlow-GRPO; TreeRPO, 2506.05183.
    """
    columns = tuple(columns)
    if not {"prompt", "tree", "parent"} & set(columns):
        raise ValueError(f"depth_credit: columns must have prompt, tree or parent, got {columns}")

    @weighs_leaves
    def credit(
        plan: Plan,
        rewards_LR: Floats,
        weight_R: Floats,
        log_prob_M: Floats,
        leaf_weight: LeafWeight,
    ) -> EdgeCredit:
        weight_M = mean_weight(plan, log_prob_M, beta=beta, local=local)
        fused = lift(plan, relative(rewards_LR, leaf_prompts(plan)), weight_M, leaf_weight)
        group, value = plan.group(columns), edge_values(plan, fused)
        advantage = standardize(
            value,
            group,
            ddof=ddof,
            eps=eps,
            floor=floor,
            among=plan.stochastic,
            weight_n=edge_weight(plan, leaf_weight),
        )
        return split_sign(advantage, weight_R)

    return credit


def leaf_credit(
    *, beta: float = 0.0, local: bool = True, ddof: int = 1, eps: float = 1e-8
) -> Credit:
    """Returns TreeGRPO's credit: leaves standardised per prompt and reward, then fused upward.

    Args:
        beta: 0 = mean over descendant leaves, unbiased; 1 = the paper's softmax of log-probability,
            which counts probability twice since children are drawn by it. Multiplies mean
            log-probabilities; for the sum scale multiply it by the number of latent elements.
        local: softmax over siblings (the paper) instead of over paths.
        ddof: of the std.
        eps: added to the std.

    Source: TreeGRPO, arXiv 2512.08153, eq. 9-11.
    """

    @weighs_leaves
    def credit(
        plan: Plan,
        rewards_LR: Floats,
        weight_R: Floats,
        log_prob_M: Floats,
        leaf_weight: LeafWeight,
    ) -> EdgeCredit:
        prompts = leaf_prompts(plan)
        scores = standardize(rewards_LR, prompts, ddof=ddof, eps=eps, weight_n=leaf_weight)
        weight_M = mean_weight(plan, log_prob_M, beta=beta, local=local)
        return split_sign(edge_values(plan, lift(plan, scores, weight_M, leaf_weight)), weight_R)

    return credit


def gain_credit() -> Credit:
    """Returns d-TreeRPO's credit: V(child) - V(parent), V the mean over descendant leaves.

    Nothing is normalised; along a path it telescopes to R - V(root). Roots get 0.

    Source: d-TreeRPO, arXiv 2512.09675.
    """

    @weighs_leaves
    def credit(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats, leaf_weight: LeafWeight
    ) -> EdgeCredit:
        value = lift(plan, rewards_LR, mean_weight(plan), leaf_weight)
        above = np.where(plan.parent < 0, np.arange(len(plan)), plan.parent)
        # a mean of equal leaves may differ from them by its rounding: that is no gain
        same = np.isclose(value, value[above], rtol=1e-12, atol=0.0)
        return split_sign(edge_values(plan, np.where(same, 0.0, value - value[above])), weight_R)

    return credit


def ancestor_credit(*, weights: str = "equal", ddof: int = 1, eps: float = 1e-8) -> Credit:
    """Returns TreePO's credit: leaves against the means of all their ancestors, whitened.

    An ancestor is a node where leaves part, and the prompt where it has several trees; chains
    between splits repeat the same leaves and count once. A(leaf) is the weighted average of
    R - mean(ancestor), standardised per prompt; an edge gets the mean over its leaves.

    Args:
        weights: of ancestors, "equal" (the released script) or "size", their number of leaves.
        ddof: of the whitening.
        eps: of the whitening.

    Raises:
        ValueError: another name of weights.

    Source: TreePO, arXiv 2508.17445.
    """
    if weights not in ("equal", "size"):
        raise ValueError(f"ancestor_credit: weights must be 'equal' or 'size', got {weights!r}")

    @weighs_leaves
    def credit(
        plan: Plan, rewards_LR: Floats, weight_R: Floats, _log_prob: Floats, leaf_weight: LeafWeight
    ) -> EdgeCredit:
        prompts = leaf_prompts(plan)
        values = relative(rewards_LR, prompts)
        mean = mean_weight(plan)
        means = lift(plan, values, mean, leaf_weight)
        baseline = _ancestor_means(plan, values, means, weights == "size", leaf_weight)
        gains = values - baseline
        scores = standardize(gains, prompts, ddof=ddof, eps=eps, weight_n=leaf_weight)
        return split_sign(edge_values(plan, lift(plan, scores, mean, leaf_weight)), weight_R)

    return credit


def _ancestor_means(
    plan: Plan, values_LR: Floats, mean_MR: Floats, by_size: bool, leaf_weight: LeafWeight
) -> Floats:
    """(L, R) average over every leaf's ancestors of the mean of their leaves."""
    size = plan.leaves_below.astype(np.float64)
    inner = plan.parent >= 0
    branches = np.bincount(plan.parent[inner & (size > 0)], minlength=len(plan))
    counted = np.where(branches > 1, size if by_size else 1.0, 0.0)[:, None]
    weight, total = counted.copy(), counted * mean_MR
    owner = plan.prompt[plan.leaf]
    leaves = np.bincount(owner, minlength=plan.num_prompts).astype(np.float64)
    trees = np.bincount(plan.prompt[~inner & (size > 0)], minlength=plan.num_prompts)
    sums = np.zeros((plan.num_prompts, values_LR.shape[1]))
    share = np.ones(len(owner)) if leaf_weight is None else leaf_weight
    np.add.at(sums, owner, share[:, None] * values_LR)
    prompt = np.where(trees > 1, leaves if by_size else 1.0, 0.0)[:, None]
    mass = np.bincount(owner, share, plan.num_prompts)
    prompt_mean = sums / np.where(mass > 0.0, mass, 1.0)[:, None]
    roots = np.flatnonzero(~inner)
    weight[roots] += prompt[plan.prompt[roots]]
    total[roots] += (prompt * prompt_mean)[plan.prompt[roots]]
    for lo, hi in plan.levels()[1:]:
        weight[lo:hi] += weight[plan.parent[lo:hi]]
        total[lo:hi] += total[plan.parent[lo:hi]]
    weight, total = weight[plan.leaf], total[plan.leaf]
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), values_LR)
