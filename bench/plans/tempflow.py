"""TempFlow-GRPO as released: an ODE trunk per seed, K SDE children and K ODE tails at every step.

Written from Shredded-Pork/TempFlow-GRPO: `pipeline_with_logprob` and `sde_step_with_logprob` in
flow_grpo/diffusers_patch/sd3_{pipeline,sde}_with_logprob_perstep.py (seed by seed; the trunk at
batch 1, the children of a step drawn from its velocity, finished, decoded and scored as a batch of
K before the trunk goes on) and the training loop of scripts/train_sd3_pr.py (micro-batches of K,
step by step: the state that K edges share is forwarded K times). Groups are the K children of one
state. The weight is s over its mean, whose reciprocal the release writes as 2.25 for its schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import Plan
from plans.chains import Sde
from plans.steps import clipped_loss, euler_step, flow_step, group_advantage, log_prob
from plans.task import Clock, Outcome, Task


def trunk(plan: Plan, root: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields every state of a trunk and its stochastic children."""
    n = root
    while n >= 0:
        children = np.arange(plan.child_start[n], plan.child_start[n + 1])
        noisy = plan.stochastic[children]
        yield n, children[noisy]
        n = next(iter(children[~noisy]), -1)


class Branched(NamedTuple):
    """One state of a trunk, and what was tried from it."""

    node: int
    kids: np.ndarray
    """(K,) rows."""
    drawn: Tensor
    """(K, *latent_shape) states of the kids."""
    log_prob: Tensor
    std: float
    rewards: np.ndarray
    """(K,) of the images that the kids end in."""


def sample(
    task: Task, clock: Clock, plan: Plan, sde: Sde
) -> tuple[dict[int, Tensor], list[Branched]]:
    draw, sigma, states, tried = task.noise(plan), plan.sigma.tolist(), {}, []
    for seed in np.flatnonzero(plan.parent < 0):
        with clock("rollout"):
            x = draw(np.array([seed]))
        for n, kids in trunk(plan, seed):
            states[n], after = x, sigma[kids[0]]
            with clock("rollout"), torch.no_grad():
                v = task.velocity(plan, np.array([n]), x)
                mean, std = sde(x, v, sigma[n], after)
                mean = mean.repeat_interleave(len(kids), 0)
                drawn = mean + std * draw(kids)
                old, x = log_prob(drawn, mean, std), euler_step(x, v, sigma[n], after)
                rows, y = kids, drawn
                while not plan.leaf[rows].any():
                    below = plan.child_start[rows]
                    v = task.velocity(plan, rows, y)
                    y, rows = euler_step(y, v, sigma[rows[0]], sigma[below[0]]), below
            rewards = task.score(clock, plan, rows, y).double().cpu().numpy()
            states.update(zip(rows, y[:, None], strict=True))
            tried.append(Branched(n, kids, drawn, old, std, rewards))
    return states, tried


def tempflow(task: Task, clock: Clock) -> Outcome:
    plan, level = task.plan(), task.recipe.options["noise_level"]
    sde, sigma = partial(flow_step, level=level, sigma_1=task.sigmas[1]), plan.sigma.tolist()
    states, tried = sample(task, clock, plan, sde)
    with clock("advantage"):
        advantage, mean_std = np.full(len(plan), np.nan), np.mean([b.std for b in tried])
        for b in tried:
            score = group_advantage(b.rewards, np.zeros(len(b.kids)), ddof=0, eps=1e-4)
            advantage[b.kids] = score * b.std / mean_std
    ratios, clip, planned = [], task.recipe.objective.clip[0], len(plan.trained())
    with clock("train"):
        for b in tried:
            x = states[b.node].repeat_interleave(len(b.kids), 0)
            v = task.velocity(plan, np.full(len(b.kids), b.node), x)
            mean, std = sde(x, v, sigma[b.node], sigma[b.kids[0]])
            new = log_prob(b.drawn, mean, std)
            a = new.new_tensor(advantage[b.kids])
            loss, ratio = clipped_loss(new, b.log_prob, a, clip)
            (loss / planned).sum().backward()
            ratios.append(ratio)
    task.step(clock)
    ratio = torch.cat(ratios)
    return Outcome(plan, states, advantage, float((ratio - 1).abs().max()), len(ratio))
