"""What a run costs, row by row: time of every stage, work, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from branchcore.clock import Stages
from branchcore.recipes.recipe import Recipe
from branchcore.stages import Batch
from branchcore.work_meter import PassFlop, WorkMeter, mfu, pass_flop

BESIDE = ("evaluation", "checkpoint", "callbacks")
"""Stages that are no part of an iteration's work."""


class Watch:
    """Measures from row to row of metrics.jsonl.

    Args:
        device: where the model lives.
        recipe: the method.
    """

    def __init__(self, device: torch.device, recipe: Recipe) -> None:
        self.device, self.recipe = device, recipe
        self.clock, self.work = Stages(device), WorkMeter(recipe)
        self.flop: PassFlop | None = None
        """Of a row, once counted."""
        self._counted = False
        self._since: float | None = None

    def begin(self) -> None:
        """Begins an iteration, without any work yet; starts the clock unless it is running."""
        self.work = WorkMeter(self.recipe)
        if self._since is None:
            self.clock.begin()
            self._since = time.perf_counter()

    def count_flop(self, batch: Batch, parameters: Sequence[Tensor], max_batch: int | None) -> None:
        """Counts the operations of a row, the first time only; see `pass_flop`."""
        if not self._counted:
            self.flop = pass_flop(batch, parameters, max_batch)
            self._counted = True

    def row(self) -> dict[str, float]:
        """Returns what was measured since the last row, and starts anew.

        Returns:
            `time/<stage>` seconds, which add up to `wall_s`; a row's checkpoint and callbacks are
            in the next one. `tokens`, `tflop` and `mfu` of the iteration's model passes, as far as
            they are known; evaluation, checkpoint and callbacks are no part of MFU's time.
            `memory_gb`, the most that torch had allocated on the GPU meanwhile, or without one
            `rss_gb`, the most memory that the process ever had.
        """
        seconds = self.clock.lap()
        now = time.perf_counter()
        wall, self._since = now - (now if self._since is None else self._since), now
        work, self.work = self.work.metrics(self.flop), WorkMeter(self.recipe)
        busy = sum(s for stage, s in seconds.items() if stage not in BESIDE)
        share = mfu(work["tflop"], busy, self.device) if work.get("tflop") else None
        return {
            "wall_s": wall,
            **{f"time/{stage}": s for stage, s in seconds.items()},
            **work,
            **({} if share is None else {"mfu": share}),
            **self._memory(),
        }

    def _memory(self) -> dict[str, float]:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return {"memory_gb": peak / 1e9}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}

    def state(self) -> list[float]:
        """Returns the operations of a row, ready for JSON, empty if they are not known."""
        return [] if self.flop is None else list(self.flop)

    def load(self, state: Sequence[float]) -> None:
        """Takes a state back, so that a resumed run counts with the same; else it counts anew."""
        self.flop, self._counted = (PassFlop(*state), True) if state else (None, False)


Args = ParamSpec("Args")
Result = TypeVar("Result")


class _Watched(Protocol):
    watch: Watch


Owner = TypeVar("Owner", bound=_Watched)
Method = Callable[Concatenate[Owner, Args], Result]


def timed(stage: str) -> Callable[[Method[Owner, Args, Result]], Method[Owner, Args, Result]]:
    """Books the calls of a method of something with a `watch` to a stage."""

    def decorate(method: Method[Owner, Args, Result]) -> Method[Owner, Args, Result]:
        @wraps(method)
        def call(self: Owner, *args: Args.args, **kwargs: Args.kwargs) -> Result:
            with self.watch.clock(stage):
                return method(self, *args, **kwargs)

        return call

    return decorate
