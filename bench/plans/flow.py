"""Flow-GRPO and GRPO-Guard as released: micro-batches of 9, all steps but the last trained; no KL.

Written from yifan123/flow_grpo: `pipeline_with_logprob` and `sde_step_with_logprob` in
flow_grpo/diffusers_patch/sd3_{pipeline,sde}_with_logprob.py (rollout), `compute_log_prob` and the
loops of `main` in scripts/train_sd3.py (one forward and backward per micro-batch and step). The
models here have no guidance, so a row is one forward where the release pays two.
GRPO-Guard is scripts/train_sd3_GRPO_Guard.py there: the rollout stores the mean of every step too,
the ratio is `ratio_norm`'s and the loss of a step is divided by its dt.
"""

from __future__ import annotations

import numpy as np
import torch

from plans.chains import paths
from plans.steps import (
    clipped_loss,
    euler_step,
    flow_step,
    group_advantage,
    log_prob,
    ppo_loss,
    ratio_norm,
)
from plans.task import Clock, Outcome, Task

MICRO_BATCH = 9
NOISE_LEVEL = 0.7


def flow(task: Task, clock: Clock, *, guard: bool = False) -> Outcome:
    plan = task.plan()
    draw, chains = task.noise(plan), paths(plan)
    sigma = plan.sigma[chains[0]].tolist()
    steps = range(len(sigma) - 2)
    weight = [1 / (sigma[i] - sigma[i + 1]) if guard else 1.0 for i in steps]
    states, old, means, rewards = {}, {}, {}, []
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
                if guard:
                    means[b, i] = mean
            states[b, steps.stop] = x
            x = euler_step(x, task.velocity(plan, batch[:, -2], x), sigma[-2], 0.0)
            states[b, steps.stop + 1] = x
        rewards.append(task.score(clock, plan, batch[:, -1], x))
    with clock("advantage"):
        prompt, values = plan.prompt[chains[:, -1]], torch.cat(rewards).double().cpu().numpy()
        scores = group_advantage(values, prompt, ddof=0, eps=1e-4)
        advantage = np.full(len(plan), np.nan)
        # a loss that is divided by dt is that of an advantage divided by dt
        advantage[chains[:, 1:-1]] = scores[:, None] * np.array(weight)
    ratios, clip, planned = [], task.recipe.objective.clip[0], len(plan.trained())
    with clock("train"):
        for b, batch in enumerate(batches):
            for i in steps:
                x, y = states[b, i], states[b, i + 1]
                v = task.velocity(plan, batch[:, i], x)
                mean, std = flow_step(x, v, sigma[i], sigma[i + 1], NOISE_LEVEL, sigma[1])
                new, a = log_prob(y, mean, std), x.new_tensor(advantage[batch[:, i + 1]])
                if guard:
                    ratio = ratio_norm(new, old[b, i], mean, means[b, i], std)
                    loss = ppo_loss(ratio, a, clip)
                else:
                    loss, ratio = clipped_loss(new, old[b, i], a, clip)
                (loss / planned).sum().backward()
                ratios.append(ratio.detach())
    task.step(clock)
    kept = {
        row: state
        for (b, i), x in states.items()
        for row, state in zip(batches[b][:, i], x, strict=True)
    }
    ratio = torch.cat(ratios)
    return Outcome(plan, kept, advantage, float((ratio - 1).abs().max()), len(ratio))
