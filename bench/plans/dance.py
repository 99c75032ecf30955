"""DanceGRPO as released: leaf by leaf, batch 1, a random 60 % of the steps trained.

Written from XueZeyue/DanceGRPO, fastvideo/train_grpo_flux.py: `run_sample_step` and `flux_step`
(T forwards per sample at batch 1, one shared root noise), `sample_reference_model` (decode and
reward one image at a time), `train_one_step` (last transition dropped, per-sample random steps, one
forward and backward per step). Its random steps and noise are those of the shared Plan.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from branchcore import Plan
from plans.steps import clipped_loss, dance_step, group_advantage, log_prob
from plans.task import Clock, Outcome, Task


def paths(plan: Plan) -> np.ndarray:
    """Returns (L, T + 1) rows of every chain, root to leaf."""
    rows = [np.flatnonzero(plan.leaf)]
    while (plan.parent[rows[0]] >= 0).all():
        rows.insert(0, plan.parent[rows[0]].astype(np.int64))
    return np.stack(rows, axis=1)


def dance(task: Task, clock: Clock) -> Outcome:
    plan = task.plan()
    draw, sigma, chains = task.noise(plan), plan.sigma.tolist(), paths(plan)
    rows = np.arange(len(plan))[:, None]
    states, old, rewards = {}, {}, []
    for chain in chains:
        with clock("rollout"), torch.no_grad():
            x = draw(rows[chain[0]])
            states[chain[0]] = x
            for n, child in pairwise(chain[:-1]):
                v = task.velocity(plan, rows[n], x)
                mean, std = dance_step(x, v, sigma[n], sigma[child], task.eta)
                x = mean + std * draw(rows[child])
                states[child], old[child] = x, log_prob(x, mean, std)
            # the image is the x0 read-out of the last step
            n = chain[-2]
            x = x - sigma[n] * task.velocity(plan, rows[n], x)
            states[chain[-1]] = x
        rewards.append(task.score(clock, plan, chain[-1:], x))
    with clock("advantage"):
        prompt, values = plan.prompt[chains[:, -1]], torch.cat(rewards).double().cpu().numpy()
        scores = group_advantage(values, prompt, ddof=1, eps=1e-8)
        advantage = np.full(len(plan), np.nan)
        for score, chain in zip(scores, chains, strict=True):
            advantage[chain[1:-1]] = score
    ratios, clip, planned = [], task.recipe.objective.clip[0], len(plan.trained())
    with clock("train"):
        for chain in chains:
            for n, child in pairwise(chain[:-1]):
                if not plan.train[child]:
                    continue
                x = states[n]
                v = task.velocity(plan, rows[n], x)
                mean, std = dance_step(x, v, sigma[n], sigma[child], task.eta)
                new = log_prob(states[child], mean, std)
                loss, ratio = clipped_loss(new, old[child], new.new_tensor(advantage[child]), clip)
                (loss / planned).sum().backward()
                ratios.append(ratio)
    task.step(clock)
    worst = float((torch.cat(ratios) - 1).abs().max())
    return Outcome(plan, states, advantage, worst, len(ratios))
