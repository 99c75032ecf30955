"""Flow-GRPO as released: leaves in micro-batches of 9, all steps but the last trained; no KL.

Written from yifan123/flow_grpo: `pipeline_with_logprob` and `sde_step_with_logprob` in
flow_grpo/diffusers_patch/sd3_{pipeline,sde}_with_logprob.py (rollout), `compute_log_prob` and the
loops of `main` in scripts/train_sd3.py (one forward and backward per micro-batch and step). The
models here have no guidance, so a row is one forward where the release pays two.
"""

from __future__ import annotations

import numpy as np
import torch

from plans.dance import paths
from plans.steps import clipped_loss, flow_step, group_advantage, log_prob
from plans.task import Clock, Outcome, Task

MICRO_BATCH = 9
NOISE_LEVEL = 0.7


def flow(task: Task, clock: Clock) -> Outcome:
    plan = task.plan()
    draw, chains = task.noise(plan), paths(plan)
    sigma = plan.sigma[chains[0]].tolist()
    steps = range(len(sigma) - 2)
    states, old, rewards = {}, {}, []
    batches = [chains[i : i + MICRO_BATCH] for i in range(0, len(chains), MICRO_BATCH)]
    for b, batch in enumerate(batches):
        with clock("rollout"), torch.no_grad():
            x = draw(batch[:, 0])
            for i in steps:
                states[b, i] = x
                v = task.velocity(plan, batch[:, i], x)
                mean, std = flow_step(x, v, sigma[i], sigma[i + 1], NOISE_LEVEL, sigma[1])
                x = mean + std * draw(batch[:, i + 1])
                old[b, i] = log_prob(x, mean, std)
            states[b, steps.stop] = x
            x = x - sigma[-2] * task.velocity(plan, batch[:, -2], x)
            states[b, steps.stop + 1] = x
        rewards.append(task.score(clock, plan, batch[:, -1], x))
    with clock("advantage"):
        prompt, values = plan.prompt[chains[:, -1]], torch.cat(rewards).double().cpu().numpy()
        scores = group_advantage(values, prompt, ddof=0, eps=1e-4)
        advantage = np.full(len(plan), np.nan)
        advantage[chains[:, 1:-1]] = scores[:, None]
    ratios, clip, planned = [], task.recipe.objective.clip[0], len(plan.trained())
    with clock("train"):
        for b, batch in enumerate(batches):
            for i in steps:
                x, y = states[b, i], states[b, i + 1]
                v = task.velocity(plan, batch[:, i], x)
                mean, std = flow_step(x, v, sigma[i], sigma[i + 1], NOISE_LEVEL, sigma[1])
                a = x.new_tensor(advantage[batch[:, i + 1]])
                loss, ratio = clipped_loss(log_prob(y, mean, std), old[b, i], a, clip)
                (loss / planned).sum().backward()
                ratios.append(ratio)
    task.step(clock)
    kept = {
        row: state
        for (b, i), x in states.items()
        for row, state in zip(batches[b][:, i], x, strict=True)
    }
    ratio = torch.cat(ratios)
    return Outcome(plan, kept, advantage, float((ratio - 1).abs().max()), len(ratio))
