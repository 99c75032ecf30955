"""MixGRPO's window of stochastic steps as a pure function of the iteration: no state, no ranks.

The window [l, l + w) starts at l = start and moves by `stride` steps every tau iterations:
tau = interval (progressive), falls with l from interval to min_interval (linear), or is
ceil(interval exp(-0.1 max(0, l - 13))) (exponential). It never passes step T - 2, since the last
step ends at the image, and it is never empty.

Source: MixGRPO, arXiv 2507.21802, and its released `grpo_states.py`, where the window is cut at
T - 2, is empty at l = T - 2, and ranks disagree on random windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from branchcore.recipes.recipe import Moment

SCHEDULES = ("progressive", "linear", "exponential", "random", "frozen")


def moving_start(
    iteration: int,
    interval: Callable[[int], int],
    *,
    start: int,
    last: int,
    stride: int,
    roll_back: bool,
) -> int:
    """Returns the window's first step.

    Args:
        iteration: from 0.
        interval: l -> iterations that the window stays at l.
        start: first l.
        last: greatest l.
        stride: steps per move.
        roll_back: start anew after the last window, instead of staying at `last`.
    """
    visited = range(start, last + 1, stride)
    ends = np.cumsum([interval(position) for position in visited])
    if roll_back:
        iteration %= int(ends[-1])
    index = int(np.searchsorted(ends, iteration, side="right"))
    return visited[index] if index < len(visited) else last


def linear_interval(position: int, steps: int, longest: int, shortest: int) -> int:
    """Returns iterations at window `position`: from longest at 0 to shortest at T - 2."""
    share = position / max(steps - 2, 1)
    return max(shortest, int(longest * (1.0 - share) + shortest * share))


def exponential_interval(position: int, longest: int) -> int:
    """Returns iterations at window `position`: longest up to 13, then ceil of exp(-0.1) a step."""
    return math.ceil(longest * math.exp(-0.1 * max(0, position - 13)))


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """Which steps of an iteration are stochastic and trained."""

    recipe: str
    """Who asks, for the messages."""
    steps: int
    """T."""
    window: int
    """w, steps in the window."""
    schedule: str
    """One of SCHEDULES; random draws l anew in every iteration, alike for all prompts and ranks."""
    interval: int
    """Iterations between moves; the longest of them if they differ."""
    min_interval: int = 1
    """Shortest interval of the linear schedule."""
    stride: int = 1
    """Steps per move; w = windows that do not overlap."""
    start: int = 0
    """First l; the only one if frozen."""
    roll_back: bool = True
    """Start anew after the last window, as the released script; False stays there."""
    cut: bool = False
    """[l, min(l + w, T - 2)) with l <= T - 3, as released: windows shrink at the end."""

    def __post_init__(self) -> None:
        name, room = self.recipe, self.steps - (2 if self.cut else 1)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"{name}: schedule must be from {SCHEDULES}, got {self.schedule!r}")
        if not 1 <= self.window <= room:
            raise ValueError(
                f"{name}: window must be in 1..{room} with {self.steps} steps, got {self.window}"
            )
        if not 0 <= self.start <= self.last:
            raise ValueError(f"{name}: start must be in 0..{self.last}, got {self.start}")
        if self.stride < 1 and self.schedule != "frozen":
            raise ValueError(
                f"{name}: stride must be at least 1, got {self.stride}; try schedule='frozen'"
            )
        if not 1 <= self.min_interval <= self.interval:
            raise ValueError(
                f"{name}: interval must be at least min_interval and that at least 1, got "
                f"{self.interval} and {self.min_interval}"
            )

    @property
    def last(self) -> int:
        """Greatest l."""
        return self.steps - (3 if self.cut else self.window + 1)

    @property
    def varies(self) -> bool:
        """The window depends on the iteration."""
        return self.schedule != "frozen"

    def at(self, moment: Moment) -> range:
        """Returns the window's steps."""
        first = self._first(moment)
        return range(first, min(first + self.window, self.steps - (2 if self.cut else 1)))

    def _first(self, moment: Moment) -> int:
        if self.schedule == "frozen":
            return self.start
        if self.schedule == "random":
            return int(moment.shared_rng.integers(self.start, self.last + 1))
        intervals: dict[str, Callable[[int], int]] = {
            "progressive": lambda _: self.interval,
            "linear": lambda at: linear_interval(at, self.steps, self.interval, self.min_interval),
            "exponential": lambda at: exponential_interval(at, self.interval),
        }
        return moving_start(
            moment.iteration,
            intervals[self.schedule],
            start=self.start,
            last=self.last,
            stride=self.stride,
            roll_back=self.roll_back,
        )
