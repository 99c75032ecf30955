"""All plans on the clock: one model and optimizer, a warm-up, interleaved rounds in a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import PeakMemory, tape_states
from plans import PLANS
from plans.task import Clock
from ratios import Sample, clock_of, summary
from work import closed_form
from workload import Workload

ROUNDS = (3, 10)
AIM = 8

Samples = dict[str, list[Sample]]


class Bench:
    """One model and optimizer, and the tasks of all plans on it."""

    def __init__(self, load: Workload, names: list[str], prompts: int) -> None:
        self.load, self.names, self.prompts = load, list(names), prompts
        self.model, self.reward = load.timed_model(prompts), load.reward()
        # a step of size 0 costs what any step costs and leaves the weights to the next plan
        trained = [p for p in self.model.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.on_gpu = load.device.type == "cuda"
        if self.on_gpu:
            view = self.task(names[0], prompts).view
            states = tape_states(view, load.device, load.max_batch or 0)
            self.load = load._replace(tape=states)
        self.timed = dict.fromkeys(names, prompts)
        self.once: set[str] = set()
        """Plans too slow for more than the first round."""
        self.too_large: dict[str, str] = {}
        """Plans that ran out of the GPU's memory, and what it said."""

    def task(self, name: str, prompts: int) -> Any:
        recipe = PLANS[name].recipe
        return self.load.task(recipe, self.model, self.reward, prompts, optimizer=self.optimizer)

    def run(self, name: str, prompts: int | None = None) -> Sample:
        prompts = prompts or self.timed[name]
        task, clock = self.task(name, prompts), Clock(self.load.device)
        PLANS[name].run(task, clock)
        return Sample(clock, self.prompts / prompts)

    def warm_up(self, bar: Any, left: float) -> dict[str, float | None]:
        """Runs every plan once, then decides how much of the slow ones is timed.

        Returns:
            Peak memory growth per plan, MiB: of one prompt where prompts run one by one.
        """
        memory: dict[str, float | None] = {}
        cost: dict[str, float] = {}
        start = time.perf_counter()
        for name in list(self.names):
            bar.set_description(f"warm-up {name}")
            try:
                memory[name], cost[name] = self._first(name)
            except torch.OutOfMemoryError as error:
                self.too_large[name] = str(error)
                self.names.remove(name)
            bar.update()
        # measuring memory handed free pages back, and no round is to fault them in again
        large = [name for name in self.names if not PLANS[name].by_prompt]
        if large and not self.on_gpu:
            self.run(max(large, key=lambda name: memory[name] or 0.0))
        left -= time.perf_counter() - start
        by_prompt = [name for name in self.names if PLANS[name].by_prompt]
        if by_prompt:
            whole = sum(cost[name] for name in large)
            fits = int((left / AIM - whole) / sum(cost[name] for name in by_prompt))
            chosen = min(max(fits, 1), self.prompts)
            self.timed |= dict.fromkeys(by_prompt, chosen)
            cost |= {name: chosen * cost[name] for name in by_prompt}
        if self.on_gpu:
            self.once = too_slow(cost, by_prompt, left)
        return memory

    def _first(self, name: str) -> tuple[float | None, float]:
        """Returns memory and seconds of a run, of one prompt if the plan runs prompt by prompt."""
        prompts = 1 if PLANS[name].by_prompt else self.prompts
        if not self.on_gpu:
            # the first call of a process pays for allocations and lazy imports
            self.run(name, 1)
        before = time.perf_counter()
        with PeakMemory(self.load.device) as peak:
            self.run(name, prompts)
        return peak.mib, time.perf_counter() - before

    def rounds(self, bar: Any, end: float, done_one: Callable[[Samples], None]) -> Samples:
        """Times all plans in turn; reports after every round."""
        samples: Samples = {name: [] for name in self.names}
        total, done = ROUNDS[0], 0
        while done < total:
            start = time.perf_counter()
            for name in self.names:
                bar.set_description(f"round {done + 1}/{total} {name}")
                again = done > 0 and name in self.once
                samples[name].append(samples[name][0] if again else self.run(name))
                bar.update()
            done += 1
            done_one(samples)
            if done == 1:
                now = time.perf_counter()
                more = int((end - now) / (now - start))
                total = min(max(1 + more, ROUNDS[0]), ROUNDS[1])
                bar.total = len(self.names) * (1 + total)
            # a neighbour that wakes up must not cost the reader minutes; on a GPU somebody ends us
            least = 1 if self.on_gpu else ROUNDS[0]
            if done >= least and 2 * time.perf_counter() - start > end:
                break
        return samples

    def summary(self, name: str, samples: list[Sample], memory: float | None) -> dict[str, Any]:
        work = closed_form(name, self.load, self.task(name, self.prompts).plan(), self.prompts)
        timed = self.timed[name]
        return {
            **summary(samples, work, clock_of(self.load.device)),
            "peak_mem": memory,
            "prompts_timed": timed,
            "rounds_timed": 1 if name in self.once else len(samples),
            "extrapolated": timed < self.prompts or name in self.once,
        }


def too_slow(cost: dict[str, float], released: list[str], left: float) -> set[str]:
    """Returns the released plans, slowest first, that only one round has time for.

    Args:
        cost: seconds per plan and round.
        released: plans that may be timed once.
        left: seconds for all rounds.
    """
    once: set[str] = set()
    for name in sorted(released, key=lambda name: -cost[name]):
        rounds = {other: 1 if other in once else ROUNDS[0] for other in cost}
        if sum(rounds[other] * cost[other] for other in cost) <= left:
            break
        once.add(name)
    return once
