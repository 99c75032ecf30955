"""BranchGRPO as released: the tree node by node, one forward and backward per edge, batch 1.

Written from Fredreic1849/BranchGRPO, fastvideo/train_branchgrpo_flux.py: `run_tree_sample_step` and
`flux_step_with_split` (a forward per node), `sample_reference_model_tree` (decode and reward leaf
by leaf), `compute_node_rewards_from_leaves`, `compute_hierarchical_advantages_by_depth`, and
`train_one_step_tree` with `grpo_one_step` (each child edge forwards its parent anew).
As released, the edge of depth T is sampled and trained although the image is the x0 read-out above
it; `dead=False` leaves it out, where gradients are compared. Branch noise is the paper's mixture,
and all edges of an iteration share one update instead of one per 12.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from branchcore import Plan
from plans.nodes import grow, score_leaves, train_edges
from plans.steps import dance_step, dpm_step, group_advantage
from plans.task import Clock, Outcome, Task


def lift_mean(plan: Plan, leaf_values: np.ndarray) -> np.ndarray:
    """Returns (M,) means of the leaf values below every node."""
    total, count = np.zeros(len(plan)), plan.leaf.astype(np.float64)
    total[plan.leaf] = leaf_values
    for row in range(len(plan) - 1, -1, -1):
        if plan.parent[row] >= 0:
            total[plan.parent[row]] += total[row]
            count[plan.parent[row]] += count[row]
    return total / count


def depth_advantage(plan: Plan, rewards: np.ndarray) -> np.ndarray:
    """Returns (M,) advantages: mean reward of the leaves below, z-scored per tree and depth."""
    group = plan.tree * (plan.depth.max() + 1) + plan.depth
    value = lift_mean(plan, rewards)
    advantage = group_advantage(value, group, ddof=1, eps=1e-8, floor=1e-6)
    advantage[plan.parent < 0] = np.nan
    return advantage


def branch(task: Task, clock: Clock, *, dead: bool = True, multistep: bool = False) -> Outcome:
    """Runs an iteration.

    Args:
        task: its plan is the trees.
        clock: takes the stages.
        dead: with the edges that no reward sees, as released.
        multistep: DPM-Solver++(2M) past the last split: the engine's own recipe, edge by edge.
    """
    plan, sde = task.plan(), partial(dance_step, eta=task.eta)
    grown = grow(task, clock, plan, sde, after=dpm_step if multistep else None, dead=dead)
    rewards = score_leaves(task, clock, plan, grown.states)
    with clock("advantage"):
        advantage = depth_advantage(plan, rewards)
    ratio = train_edges(task, clock, plan, grown, advantage, sde)
    task.step(clock)
    return Outcome(plan, grown.states, advantage, float((ratio - 1).abs().max()), len(ratio))
