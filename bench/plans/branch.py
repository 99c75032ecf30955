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

import numpy as np
import torch

from branchcore import Plan
from plans.steps import clipped_loss, dance_step, group_advantage, log_prob
from plans.task import Clock, Outcome, Task


def depth_advantage(plan: Plan, rewards: np.ndarray) -> np.ndarray:
    """Returns (M,) advantages: mean reward of the leaves below, z-scored per tree and depth."""
    total, count = np.zeros(len(plan)), plan.leaf.astype(np.float64)
    total[plan.leaf] = rewards
    for row in range(len(plan) - 1, -1, -1):
        if plan.parent[row] >= 0:
            total[plan.parent[row]] += total[row]
            count[plan.parent[row]] += count[row]
    group = plan.tree * (plan.depth.max() + 1) + plan.depth
    advantage = group_advantage(total / count, group, ddof=1, eps=1e-8, floor=1e-6)
    advantage[plan.parent < 0] = np.nan
    return advantage


def branch(task: Task, clock: Clock, *, dead: bool = True) -> Outcome:
    plan = task.plan()
    draw, sigma, rows = task.noise(plan), plan.sigma.tolist(), np.arange(len(plan))[:, None]
    states, old, trained, rewards = {}, {}, [], []
    with clock("rollout"), torch.no_grad():
        for n in np.flatnonzero(plan.parent < 0):
            states[n] = draw(rows[n])
        for n in np.flatnonzero(plan.evaluated):
            x = states[n]
            v = task.velocity(plan, rows[n], x)
            for child in range(plan.child_start[n], plan.child_start[n + 1]):
                noisy = plan.stochastic[child]
                states[child] = x + (sigma[child] - sigma[n]) * v
                if noisy or (dead and plan.leaf[child] and plan.train[n]):
                    mean, std = dance_step(x, v, sigma[n], sigma[child], task.eta)
                    # a dead edge is trained and no reward sees it: any noise does
                    y = mean + std * draw(rows[child] if noisy else rows[n])
                    states[child] = y if noisy else states[child]
                    old[child] = y, log_prob(y, mean, std)
                    trained.append(child)
    for leaf in np.flatnonzero(plan.leaf):
        rewards.append(task.score(clock, plan, rows[leaf], states[leaf]))
    with clock("advantage"):
        advantage = depth_advantage(plan, torch.cat(rewards).double().cpu().numpy())
    ratios, clip = [], task.recipe.objective.clip[0]
    with clock("train"):
        for child in trained:
            n = plan.parent[child]
            y, before = old[child]
            v = task.velocity(plan, rows[n], states[n])
            mean, std = dance_step(states[n], v, sigma[n], sigma[child], task.eta)
            a = mean.new_tensor(advantage[child])
            loss, ratio = clipped_loss(log_prob(y, mean, std), before, a, clip)
            (loss / len(trained)).sum().backward()
            ratios.append(ratio)
    task.step(clock)
    worst = float((torch.cat(ratios) - 1).abs().max())
    return Outcome(plan, states, advantage, worst, len(ratios))
