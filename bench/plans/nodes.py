"""What released tree trainers share: one node after the other, one loss term per edge, batch 1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import Plan
from plans.chains import Ode, Sde
from plans.steps import Seen, clipped_loss, euler_step, log_prob
from plans.task import Clock, Task


class Grown(NamedTuple):
    """Trees whose edges remember how they were drawn."""

    states: dict[int, Tensor]
    old: dict[int, tuple[Tensor, Tensor]]
    """Of every trained edge: the state drawn, and its log-probability."""


def deepest(plan: Plan) -> np.ndarray:
    """Returns (M,) depth of the last stochastic edge in each node's tree, 0 if none."""
    last = np.zeros(len(plan), dtype=np.int64)
    np.maximum.at(last, plan.tree[plan.stochastic], plan.depth[plan.stochastic])
    return last[plan.tree]


def grow(
    task: Task, clock: Clock, plan: Plan, sde: Sde, *, after: Ode | None = None, dead: bool = False
) -> Grown:
    """Samples the trees: a forward per node, whose children share it.

    Args:
        task: model and noise.
        clock: takes the rollout.
        plan: the trees.
        sde: the stochastic step.
        after: solver past a tree's last stochastic step, whose history starts there; None = Euler,
            as everywhere else.
        dead: draw the last step too where its node is trained, as BranchGRPO does beside its image.
    """
    draw, sigma, rows = task.noise(plan), plan.sigma.tolist(), np.arange(len(plan))[:, None]
    tail, states, old, seen = plan.depth >= deepest(plan), {}, {}, {}
    with clock("rollout"), torch.no_grad():
        for n in np.flatnonzero(plan.parent < 0):
            states[n] = draw(rows[n])
        for n in np.flatnonzero(plan.evaluated):
            x = states[n]
            v = task.velocity(plan, rows[n], x)
            if after and tail[n]:
                seen[n] = Seen(sigma[n], x - sigma[n] * v)
            for child in range(plan.child_start[n], plan.child_start[n + 1]):
                noisy = plan.stochastic[child]
                if after and tail[n]:
                    states[child] = after(x, seen[n], seen.get(plan.parent[n]), sigma[child])
                else:
                    states[child] = euler_step(x, v, sigma[n], sigma[child])
                if noisy or (dead and plan.leaf[child] and plan.train[n]):
                    mean, std = sde(x, v, sigma[n], sigma[child])
                    # a dead edge is trained and no reward sees it: any noise does
                    y = mean + std * draw(rows[child] if noisy else rows[n])
                    states[child] = y if noisy else states[child]
                    old[child] = y, log_prob(y, mean, std)
    return Grown(states, old)


def score_leaves(task: Task, clock: Clock, plan: Plan, states: dict[int, Tensor]) -> np.ndarray:
    """Returns (L,) rewards, decoded and scored leaf by leaf."""
    leaves = np.flatnonzero(plan.leaf)[:, None]
    rewards = [task.score(clock, plan, row, states[row[0]]) for row in leaves]
    return torch.cat(rewards).double().cpu().numpy()


def train_edges(
    task: Task, clock: Clock, plan: Plan, grown: Grown, advantage: np.ndarray, sde: Sde
) -> Tensor:
    """Takes the gradient, a forward of the parent and a backward per edge; returns the ratios."""
    sigma, rows = plan.sigma.tolist(), np.arange(len(plan))[:, None]
    ratios, clip = [], task.recipe.objective.clip[0]
    with clock("train"):
        for child, (y, before) in grown.old.items():
            n = plan.parent[child]
            v = task.velocity(plan, rows[n], grown.states[n])
            mean, std = sde(grown.states[n], v, sigma[n], sigma[child])
            a = mean.new_tensor(advantage[child])
            loss, ratio = clipped_loss(log_prob(y, mean, std), before, a, clip)
            (loss / len(grown.old)).sum().backward()
            ratios.append(ratio)
    return torch.cat(ratios)
