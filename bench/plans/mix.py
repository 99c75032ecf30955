"""MixGRPO and MixGRPO-Flash as released: leaf by leaf, batch 1, SDE in a window, ODE elsewhere.

Written from Tencent-Hunyuan/MixGRPO, fastvideo/utils/sampling_utils.py (`run_sample_step`,
`flow_grpo_step`, `dpm_step`) and fastvideo/train_grpo_flux.py (`sample_reference_model`,
`train_one_step`). All samples start from one noise and are equal up to the window's first step, and
each still pays for its own. Flash follows a shorter list of sigmas after the window with
DPM-Solver++(2M), whose history the window has filled; its last step is first-order. Of the
released 4 updates per iteration this is one.
"""

from __future__ import annotations

from functools import partial

from plans.chains import sample_by_sample
from plans.steps import dpm_step, flow_step
from plans.task import Clock, Outcome, Task

NOISE_LEVEL = 0.7


def mix(task: Task, clock: Clock, *, flash: bool = False) -> Outcome:
    sde = partial(flow_step, level=NOISE_LEVEL, sigma_1=task.sigmas[1])
    return sample_by_sample(task, clock, sde, after=dpm_step if flash else None)
