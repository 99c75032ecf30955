"""DanceGRPO as released: leaf by leaf, batch 1, a random 60 % of the steps trained.

Written from XueZeyue/DanceGRPO, fastvideo/train_grpo_flux.py: `run_sample_step` and `flux_step`
(T forwards per sample at batch 1, one shared root noise; the image is the x0 read-out of the last
step, which is Euler's step to 0), `sample_reference_model`, `train_one_step` (last transition
dropped, per-sample random steps). Its random steps and noise are those of the shared Plan.
"""

from __future__ import annotations

from functools import partial

from plans.chains import sample_by_sample
from plans.steps import dance_step
from plans.task import Clock, Outcome, Task


def dance(task: Task, clock: Clock) -> Outcome:
    return sample_by_sample(task, clock, partial(dance_step, eta=task.eta))
