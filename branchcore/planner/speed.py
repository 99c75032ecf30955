"""Seconds of a model's calls as lines through measured points. Letters: N rows of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STAGES: tuple[str, ...] = ("rollout", "decode", "reward", "update", "reduction", "rest")
"""What an iteration's time is parted into; rest: credit, optimizer, metrics."""


class Curve(NamedTuple):
    """Seconds over rows, piecewise linear."""

    rows: tuple[int, ...]
    """Ascending."""
    seconds: tuple[float, ...]

    @staticmethod
    def line(base: float, per_row: float) -> Curve:
        """Returns a straight line."""
        return Curve((1, 2), (base + per_row, base + 2 * per_row))

    def at(self, rows: int) -> float:
        """Returns the seconds of a call; beyond the points the nearest piece goes on."""
        if not rows or not self.rows:
            return 0.0
        if len(self.rows) == 1:
            return self.seconds[0] * rows / self.rows[0]
        i = int(np.clip(np.searchsorted(self.rows, rows), 1, len(self.rows) - 1))
        (a, b), (s, t) = self.rows[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return max(0.0, s + (t - s) * (rows - a) / (b - a))

    def sum(self, sizes: Sequence[int]) -> float:
        """Returns the seconds of calls of these sizes."""
        return sum(self.at(rows) for rows in sizes)


NOTHING = Curve((), ())


class Speed(NamedTuple):
    """How fast a model is on a device."""

    call: Curve
    """Forward without a graph."""
    tape_call: Curve
    """Forward with a graph."""
    backward: Curve
    """Of such a graph."""
    decode: Curve
    reward: Curve
    """By images."""
    optimizer: float
    """Seconds of an optimizer step."""
    source: str
    """Where the numbers are from, as a sentence."""
