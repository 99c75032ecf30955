"""Granular-GRPO as released: one anchor, SDE children of its first half, tails of every stride.

Written from bcmi/Granular-GRPO, fastvideo/train_g2rpo_hps.py: `run_anchor_sample_step` (all T
steps, decoded and scored for the log), `run_sde_sample_step` and `run_ode_sample_step` (for every
generation, anchor state and stride on their own, at batch 1: the anchor's velocity is computed
again for every child, and so are the first steps that tails of two strides share),
`sample_reference_model` (decode and reward one image at a time) and `train_one_step` (one forward
at batch 1 for all children of an anchor state, its prediction repeated, one backward). It steps the
optimizer after each of them; here all share one update.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import Plan
from plans.chains import Sde
from plans.steps import clipped_loss, euler_step, flow_step, group_advantage, log_prob
from plans.task import Clock, Outcome, Task
from plans.tempflow import trunk


class Sampled(NamedTuple):
    states: dict[int, Tensor]
    old: dict[int, Tensor]
    """Log-probability of every child."""
    rewards: dict[int, Tensor]
    """Of every leaf."""


def tails(plan: Plan) -> dict[int, list[list[int]]]:
    """Returns the tails of every child, each the rows from the child to a leaf."""
    found: dict[int, list[list[int]]] = {}
    for leaf in np.flatnonzero(plan.leaf):
        path = [int(leaf)]
        while not plan.stochastic[path[0]]:
            path.insert(0, int(plan.parent[path[0]]))
        found.setdefault(path[0], []).append(path)
    return found


def anchor(task: Task, clock: Clock, prompt: np.ndarray, x: Tensor) -> list[Tensor]:
    """Returns the states of the anchor, from the noise x to the image."""
    levels, states = task.sigmas, [x]
    with clock("rollout"), torch.no_grad():
        for sigma, after in pairwise(levels):
            v = task.velocity_at(np.array([sigma]), prompt, states[-1])
            states.append(euler_step(states[-1], v, sigma, after))
    task.judge(clock, prompt, states[-1])
    return states


def sample(task: Task, clock: Clock, plan: Plan, sde: Sde) -> Sampled:
    draw, sigma, below = task.noise(plan), plan.sigma.tolist(), tails(plan)
    states, old, rewards = {}, {}, {}
    for root in np.flatnonzero(plan.parent < 0):
        steps = list(trunk(plan, root))
        noise, prompt = draw(np.array([root])), plan.prompt[[root]]
        trail = anchor(task, clock, prompt, noise)
        states.update(zip([n for n, _ in steps], trail, strict=False))
        for generation in zip(*(kids for _, kids in steps), strict=True):
            for child in generation:
                n = plan.parent[child]
                with clock("rollout"), torch.no_grad():
                    v = task.velocity(plan, np.array([n]), states[n])
                    mean, std = sde(states[n], v, sigma[n], sigma[child])
                    states[child] = mean + std * draw(np.array([child]))
                    old[child] = log_prob(states[child], mean, std)
                for path in below[child]:
                    x = states[child]
                    with clock("rollout"), torch.no_grad():
                        for here, after in pairwise(path):
                            v = task.velocity(plan, np.array([here]), x)
                            x = euler_step(x, v, sigma[here], sigma[after])
                    states[path[-1]] = x
                    rewards[path[-1]] = task.score(clock, plan, np.array(path[-1:]), x)
    return Sampled(states, old, rewards)


def summed_advantage(plan: Plan, rewards: dict[int, Tensor]) -> np.ndarray:
    """Returns (M,) advantages: z-scored per step and stride of a prompt, summed over strides."""
    leaves = np.flatnonzero(plan.leaf)
    values = torch.cat([rewards[leaf] for leaf in leaves]).double().cpu().numpy()
    group = plan.prompt[leaves] * (plan.label.max() + 1) + plan.label[leaves]
    scores = group_advantage(values, group, ddof=1, eps=1e-8, clip=np.inf)
    position, advantage = dict(zip(leaves, scores, strict=True)), np.full(len(plan), np.nan)
    for child, paths in tails(plan).items():
        advantage[child] = sum(position[path[-1]] for path in paths)
    return advantage.clip(-5, 5)


def g2rpo(task: Task, clock: Clock) -> Outcome:
    plan, level = task.plan(), task.recipe.options["noise_level"]
    sde, sigma = partial(flow_step, level=level, sigma_1=task.sigmas[1]), plan.sigma.tolist()
    states, old, rewards = sample(task, clock, plan, sde)
    with clock("advantage"):
        advantage = summed_advantage(plan, rewards)
    ratios, clip, planned = [], task.recipe.objective.clip[0], len(plan.trained())
    with clock("train"):
        for root in np.flatnonzero(plan.parent < 0):
            for n, kids in trunk(plan, root):
                v = task.velocity(plan, np.array([n]), states[n]).repeat_interleave(len(kids), 0)
                x = states[n].repeat_interleave(len(kids), 0)
                mean, std = sde(x, v, sigma[n], sigma[kids[0]])
                new = log_prob(torch.cat([states[k] for k in kids]), mean, std)
                before = torch.cat([old[k] for k in kids])
                a = new.new_tensor(advantage[kids])
                loss, ratio = clipped_loss(new, before, a, clip)
                (loss / planned).sum().backward()
                ratios.append(ratio)
    task.step(clock)
    ratio = torch.cat(ratios)
    return Outcome(plan, states, advantage, float((ratio - 1).abs().max()), len(ratio))
