"""TreeGRPO as its algorithm box has it: the window node by node, a tail per leaf, batch 1.

Written from Algorithm 1 of arXiv 2512.08153, since its code was not at hand, with the batch sizes
of the other tree trainer: one noise per tree, Euler up to the window, k SDE children at every node
of it, one node after the other, and Euler from each of its ends to the image; rewards standardised
over the prompt's leaves, advantages averaged upward (uniformly, which is what a softmax of mean
log-probabilities comes to); a term per window edge, each with its own forward and backward.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from plans.branch import lift_mean
from plans.nodes import grow, score_leaves, train_edges
from plans.steps import flow_step, group_advantage
from plans.task import Clock, Outcome, Task


def tree(task: Task, clock: Clock) -> Outcome:
    plan = task.plan()
    sde = partial(flow_step, level=task.recipe.options["noise_level"], sigma_1=task.sigmas[1])
    grown = grow(task, clock, plan, sde)
    rewards = score_leaves(task, clock, plan, grown.states)
    with clock("advantage"):
        scores = group_advantage(rewards, plan.prompt[plan.leaf], ddof=1, eps=1e-8, clip=np.inf)
        advantage = lift_mean(plan, scores).clip(-5, 5)
    ratio = train_edges(task, clock, plan, grown, advantage, sde)
    task.step(clock)
    return Outcome(plan, grown.states, advantage, float((ratio - 1).abs().max()), len(ratio))
