"""What the rows of a run have said so far, in as little memory as a view of it needs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from branchcore.clock import STAGES

Row = Mapping[str, Any]
CELLS = 256
"""Points of a curve; twice as many are made into these."""
RECENT = 10
"""Iterations of which times are means."""
PACE = 20
"""Iterations of which the time that is left is told, or as many as between evaluations."""
_CURVES = ("reward", "grad_norm")


class Curve:
    """The history of a metric, of bounded length: neighbours are averaged when there are many."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """Takes the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self.values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.values) == 2 * CELLS:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(a + b) / 2.0 for a, b in pairs]
            self._each *= 2


class Said(NamedTuple):
    """A warning and when it was given."""

    iteration: int
    text: str


class Seen:
    """Takes the rows of a run, of those before a resumption too.

    Args:
        evaluate_every: iterations between evaluations; None = there are none.
    """

    def __init__(self, evaluate_every: int | None = None) -> None:
        self.iteration = 0
        self.row: Row = {}
        """The last one of an iteration that was not skipped."""
        self.evaluation: Row = {}
        """The last one with held-out measures."""
        self.skipped = 0
        """Iterations without an update."""
        self.reason = ""
        """Why the last iteration had none; empty if it had."""
        self.warnings: deque[Said] = deque(maxlen=3)
        self.curves: dict[str, Curve] = {}
        self._recent: deque[Row] = deque(maxlen=RECENT)
        self._walls: deque[float] = deque(maxlen=max(PACE, evaluate_every or 0))

    def add(self, row: Row) -> None:
        """Takes the next row."""
        self.iteration = int(row["iteration"])
        self.warnings.extend(Said(self.iteration, text) for text in row.get("warnings", ()))
        if any(name.startswith("eval/") for name in row):
            self.evaluation = row
        for name, value in row.items():
            if name in _CURVES or name.startswith(("reward/", "eval/")):
                self.curves.setdefault(name, Curve()).add(float(value))
        if not self.iteration:
            return
        self.reason = str(row.get("skipped", ""))
        self.skipped += bool(self.reason)
        self._recent.append(row)
        self._walls.append(_number(row, "wall_s"))
        if not self.reason:
            self.row = row

    def replay(self, rows: Iterable[Row]) -> None:
        """Takes the rows of a run that goes on; how fast it was does not count."""
        for row in rows:
            self.add(row)
        self._walls.clear()
        self._recent.clear()

    def number(self, name: str) -> float:
        """Returns a metric of the last iteration, NaN if there is none."""
        return _number(self.row, name)

    def held_out(self, name: str) -> float:
        """Returns a metric of the last evaluation, NaN if there is none."""
        return _number(self.evaluation, f"eval/{name}")

    def curve(self, name: str) -> list[float]:
        """Returns the history of a reward, an evaluation or the gradient's norm."""
        return self.curves[name].values if name in self.curves else []

    def components(self) -> list[str]:
        """Returns the components of the reward, in order."""
        return [name.removeprefix("reward/") for name in self.row if name.startswith("reward/")]

    def others(self) -> dict[str, float]:
        """Returns held-out measures that are no reward: by name."""
        known = {"reward", "diversity", *self.components()}
        found = {n.removeprefix("eval/"): v for n, v in self.evaluation.items() if "eval/" in n}
        return {name: float(value) for name, value in found.items() if name not in known}

    def pace(self) -> float:
        """Returns seconds per iteration, evaluations and checkpoints included; NaN at first."""
        walls = [wall for wall in self._walls if math.isfinite(wall)]
        return fmean(walls) if walls else math.nan

    def times(self) -> dict[str, float]:
        """Returns mean seconds of every stage in the last iterations, evaluations included."""
        rows = self._recent
        sums = {
            stage: sum(float(row.get(f"time/{stage}", 0.0)) for row in rows) for stage in STAGES
        }
        return {stage: total / len(rows) for stage, total in sums.items() if total > 0.0}


def _number(row: Row, name: str) -> float:
    return float(row.get(name, math.nan))
