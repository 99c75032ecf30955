"""Weights of steps: advantages times a factor that the plan alone knows.

Letters: M rows. Import these from `branchcore.recipes.credits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from branchcore.credit import EdgeCredit, Floats
from branchcore.leaf_weights import LeafWeight
from branchcore.plan import Plan
from branchcore.recipes.recipe import Credit, PooledCredit, weighs_leaves


def weighted(credit: Credit, weight: Callable[[Plan], Floats]) -> Credit:
    """Returns a credit with advantages times a step weight: the same as weighing the clipped loss.

    `value` stays, and so does the KL.

    Args:
        credit: of the advantages.
        weight: plan -> (M,) finite weights >= 0, such as `noise_weight`.
    """

    @weighs_leaves
    def reweighed(
        plan: Plan,
        rewards: Floats,
        weights: Floats,
        log_prob: Floats,
        leaf_weight: LeafWeight,
        **given: Any,
    ) -> EdgeCredit:
        advantage, value = credit(
            plan, rewards, weights, log_prob, leaf_weight=leaf_weight, **given
        )
        factor = weight(plan)
        good = np.isfinite(factor) & (factor >= 0.0)
        if factor.shape != (len(plan),) or not good.all():
            got = factor.shape if factor.shape != (len(plan),) else factor[~good][0]
            raise ValueError(
                f"weighted: weight must return ({len(plan)},) finite numbers >= 0, got {got}"
            )
        return EdgeCredit(advantage * factor[:, None], value)

    return replace(credit, credit=reweighed) if isinstance(credit, PooledCredit) else reweighed


def _steps(name: str, plan: Plan) -> NDArray[np.bool_]:
    """(M,) the sampling steps; an error if something else is trained."""
    if (plan.train & plan.matching).any():
        row = int(np.argmax(plan.train & plan.matching))
        raise ValueError(f"{name}: trained edges must be sampling steps, got b = 0 at row {row}")
    return (plan.parent >= 0) & ~plan.matching


def noise_weight(plan: Plan) -> Floats:
    """Returns (M,) TempFlow-GRPO's weights: s over its mean over the prompt's trained edges.

    Source: TempFlow-GRPO; its code has the constants 2.25 (SD3.5, T = 10) and 1.73 (FLUX) for
    1 / mean(s).
    """
    s = np.where(_steps("noise_weight", plan), plan.row[:, 3], 0.0)
    owner = plan.prompt[plan.train]
    total = np.bincount(owner, s[plan.train], minlength=plan.num_prompts)
    count = np.bincount(owner, minlength=plan.num_prompts)
    scale = np.where(count > 0, count / np.where(count > 0, total, 1.0), 0.0)
    return s * scale[plan.prompt]


def inverse_step_weight(plan: Plan) -> Floats:
    """Returns (M,) GRPO-Guard's weights 1 / dt, 0 where an edge is no sampling step."""
    steps = _steps("inverse_step_weight", plan)
    dt = plan.sigma[plan.parent] - plan.sigma
    return np.where(steps, 1.0 / np.where(steps, dt, 1.0), 0.0)
