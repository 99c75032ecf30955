"""The same algorithms in the engine: shared prefixes, one backward per parent, any batch shape.

With `tape` the rollout's graph is kept and training is its backward. These are the public calls of
`branchcore.collect` and `branchcore.accumulate`, opened up so that each stage is on the clock.
"""

from __future__ import annotations

import numpy as np
import torch

import branchcore
from plans.task import ITERATION, SEED, Clock, Outcome, Task


def exact(
    task: Task,
    clock: Clock,
    *,
    tape: bool = True,
    anchor: str = "auto",
    max_batch: int | None = None,
) -> Outcome:
    recipe, max_batch = task.recipe, max_batch or task.max_batch
    with clock("rollout"):
        plan = task.plan()
        taped = len(plan) if task.tape is None else task.tape
        forest = branchcore.rollout(
            plan,
            task.view,
            task.uids,
            seed=SEED,
            iteration=ITERATION,
            tape=taped if tape else 0,
            max_batch=max_batch,
            keep_velocity=anchor == "rollout",
            dtype=task.dtype,
            device=task.device,
        )
    with clock("decode"), torch.no_grad():
        images = task.model.decode(forest.leaves.view(-1, *task.view.latent_shape))
    with clock("reward"):
        texts = [task.prompts[p] for p in plan.prompt[plan.leaf]]
        scores = branchcore.score(task.reward, images, texts).values
    with clock("advantage"):
        scores = scores if task.rewards is None else task.rewards[:, None]
        log_prob = forest.log_prob.double().cpu().numpy()
        credit = recipe.credit(plan, scores, np.ones(1), log_prob)
        advantage = credit.advantage
        weight = recipe.prune(plan, credit.value, ITERATION)
    with clock("train"):
        stats = branchcore.gradient(
            forest,
            task.view,
            advantage,
            weight,
            recipe.objective,
            anchor=anchor,
            max_batch=max_batch,
        )
    task.step(clock)
    states = {int(n): forest.x[forest.slot[n]] for n in np.flatnonzero(forest.slot >= 0)}
    signed = np.where(plan.train, advantage[:, 0] - advantage[:, 1], np.nan)
    return Outcome(plan, states, signed, float(stats.ratio.max_abs_dev), int(stats.ratio.edges))
