"""Where the wall time of an iteration goes: exclusive seconds of named stages, on the CPU or a GPU.

Letters: W ranks, S stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from branchcore.credit import Floats

STAGES = (
    *("rollout", "decode", "reward", "credit", "update", "optimizer"),
    *("evaluation", "checkpoint", "callbacks", "other"),
)
"""All that a lap may hold; `other` is whatever runs in no stage."""
Clock = Callable[[str], AbstractContextManager[None]]
"""What a function takes that has stages: `with clock("rollout"): ...`."""


def untimed(stage: str) -> AbstractContextManager[None]:
    """The clock of whoever has none."""
    del stage
    return nullcontext()


class Stages:
    """Books the time between two marks to the stage that is open; stages nest, times are exclusive.

    On a GPU a mark is a timing event in the current stream: the moment when the host has come there
    and the device has done all that was queued before it. Nothing waits for it before `lap`, so
    that timing costs two events a stage (some microseconds) and one wait a lap. Work that others
    put into the same stream meanwhile, such as a scorer in a thread, counts where it delays.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._ruler: _Ruler = _Events(device) if device.type == "cuda" else _Host()
        self._open = ["other"]
        self._spans: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def begin(self) -> None:
        """Starts the first lap, unless it is running: what came before is nobody's time."""
        if self._last is None:
            self._last = self._ruler.mark()

    @property
    def current(self) -> str:
        """The stage that is open; other threads may ask."""
        return self._open[-1]

    @contextmanager
    def __call__(self, stage: str) -> Generator[None]:
        """Books the block to a stage; the one around it stands still meanwhile.

        Raises:
            ValueError: no such stage.
        """
        if stage not in STAGES:
            raise ValueError(f"Stages: stage must be one of {STAGES}, got {stage!r}")
        self._book()
        self._open.append(stage)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def _book(self) -> None:
        self.begin()
        now = self._ruler.mark()
        self._spans.append((self._open[-1], self._last, now))
        self._last = now

    def lap(self) -> dict[str, float]:
        """Returns the seconds of every stage since the last lap, and begins the next one.

        They add up to the whole time. Waits for the device.
        """
        self._book()
        self._ruler.wait(self._last)
        seconds: dict[str, float] = {}
        for stage, begin, end in self._spans:
            seconds[stage] = seconds.get(stage, 0.0) + self._ruler.between(begin, end)
        self._spans.clear()
        return {stage: seconds[stage] for stage in STAGES if stage in seconds}


class _Ruler(Protocol):
    """How moments are taken, and told apart later."""

    def mark(self) -> Any: ...

    def wait(self, mark: Any) -> None: ...

    def between(self, begin: Any, end: Any) -> float: ...


class _Host:
    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        del mark

    def between(self, begin: float, end: float) -> float:
        return end - begin


class _Events:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3


def skew(seconds_WS: Floats, stages: Sequence[str]) -> dict[str, float]:
    """Returns how uneven the ranks are: what the slowest one makes the others wait for.

    Args:
        seconds_WS: (W, S) time of every rank in every stage.
        stages: S names.

    Returns:
        `skew/<stage>`, max / mean - 1, and `slowest/<stage>`, the rank (the first of equals), of
        the stages in which any rank spent time.

    Raises:
        ValueError: another shape, or no rank.
    """
    if seconds_WS.ndim != 2 or len(seconds_WS) < 1 or seconds_WS.shape[1] != len(stages):
        raise ValueError(
            f"skew: seconds_WS must be (W, S) with W >= 1, S={len(stages)}, got {seconds_WS.shape}"
        )
    mean, slowest = seconds_WS.mean(0), seconds_WS.argmax(0)
    uneven: dict[str, float] = {}
    for column in np.flatnonzero(mean > 0.0).tolist():
        stage, rank = stages[column], int(slowest[column])
        uneven[f"skew/{stage}"] = float(seconds_WS[rank, column] / mean[column] - 1.0)
        uneven[f"slowest/{stage}"] = rank
    return uneven
