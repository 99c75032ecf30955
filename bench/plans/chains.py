"""What DanceGRPO and its descendants share: one sample after the other, everything at batch 1.

DanceGRPO's `run_sample_step` (T forwards per sample), `sample_reference_model` (decode and reward
one image at a time) and `train_one_step` (one forward and backward per trained step of a sample);
MixGRPO's functions of the same names differ in the steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from branchcore import Plan
from plans.steps import Seen, clipped_loss, euler_step, group_advantage, log_prob
from plans.task import Clock, Outcome, Task

Sde = Callable[[Tensor, Tensor, float, float], tuple[Tensor, float]]
"""(x, v, sigma, next_sigma) -> mean and std."""
Ode = Callable[[Tensor, Seen, Seen | None, float], Tensor]
"""(x, prediction here, the one before, next_sigma) -> next state."""


def paths(plan: Plan) -> np.ndarray:
    """Returns (L, T + 1) rows of every chain, root to leaf."""
    rows = [np.flatnonzero(plan.leaf)]
    while (plan.parent[rows[0]] >= 0).all():
        rows.insert(0, plan.parent[rows[0]].astype(np.int64))
    return np.stack(rows, axis=1)


def sample_by_sample(task: Task, clock: Clock, sde: Sde, after: Ode | None = None) -> Outcome:
    """Runs an iteration; every chain on its own, whatever part of it others have too.

    Args:
        task: its plan says which steps are stochastic and which are trained.
        clock: takes the stages.
        sde: the stochastic step.
        after: solver past the last stochastic step; None = Euler, as before and between them.
    """
    plan = task.plan()
    draw, sigma, chains = task.noise(plan), plan.sigma.tolist(), paths(plan)
    rows = np.arange(len(plan))[:, None]
    states, old, rewards = {}, {}, []
    for chain in chains:
        with clock("rollout"), torch.no_grad():
            x, before = draw(rows[chain[0]]), None
            states[chain[0]] = x
            last = chain[plan.stochastic[chain]][-1]
            for n, child in pairwise(chain):
                v = task.velocity(plan, rows[n], x)
                here = Seen(sigma[n], x - sigma[n] * v) if after else None
                if plan.stochastic[child]:
                    mean, std = sde(x, v, sigma[n], sigma[child])
                    x = mean + std * draw(rows[child])
                    old[child] = log_prob(x, mean, std)
                elif after is not None and n >= last:
                    x = after(x, here, before, sigma[child])
                else:
                    x = euler_step(x, v, sigma[n], sigma[child])
                states[child], before = x, here
        rewards.append(task.score(clock, plan, chain[-1:], x))
    with clock("advantage"):
        prompt, values = plan.prompt[chains[:, -1]], torch.cat(rewards).double().cpu().numpy()
        scores = group_advantage(values, prompt, ddof=1, eps=1e-8)
        advantage = np.full(len(plan), np.nan)
        for score, chain in zip(scores, chains, strict=True):
            advantage[chain[plan.stochastic[chain]]] = score
    ratios, clip, planned = [], task.recipe.objective.clip[0], len(plan.trained())
    with clock("train"):
        for chain in chains:
            for n, child in pairwise(chain):
                if not plan.train[child]:
                    continue
                v = task.velocity(plan, rows[n], states[n])
                mean, std = sde(states[n], v, sigma[n], sigma[child])
                new = log_prob(states[child], mean, std)
                loss, ratio = clipped_loss(new, old[child], new.new_tensor(advantage[child]), clip)
                (loss / planned).sum().backward()
                ratios.append(ratio)
    task.step(clock)
    worst = float((torch.cat(ratios) - 1).abs().max())
    return Outcome(plan, states, advantage, worst, len(ratios))
