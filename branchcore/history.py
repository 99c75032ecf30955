"""What prompts and steps were worth in past iterations: running means that coins are drawn by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchcore.credit import Floats
from branchcore.plan import Ints

_KINDS = ("prompts", "steps")
_MEMORY = 0.5
"""Share of its past that a prompt's running score keeps."""


class Seen:
    """Count and sum of what one process saw of every prompt and step in an iteration."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, tuple[int, float]]] = {kind: {} for kind in _KINDS}

    def add(self, kind: str, key_n: Ints, value_n: Floats) -> None:
        """Adds some values of a kind under their keys."""
        into = self.sums[kind]
        for key in np.unique(key_n).tolist():
            mine = value_n[key_n == key]
            count, total = into.get(key, (0, 0.0))
            into[key] = count + len(mine), total + float(mine.sum())


class History:
    """Running means by prompt index (|advantage|) and by depth (squared advantage)."""

    def __init__(self) -> None:
        self.means: dict[str, dict[int, float]] = {kind: {} for kind in _KINDS}

    def remember(self, seen: Sequence[Seen]) -> None:
        """Moves the mean of every key that any process saw towards the mean of its values."""
        for kind, known in self.means.items():
            for key in sorted({key for one in seen for key in one.sums[kind]}):
                found = [one.sums[kind][key] for one in seen if key in one.sums[kind]]
                now = sum(total for _, total in found) / sum(count for count, _ in found)
                known[key] = _MEMORY * known.get(key, now) + (1.0 - _MEMORY) * now

    def state(self) -> dict[str, dict[str, float]]:
        """Returns what `load` takes, ready for JSON."""
        return {
            kind: {str(key): mean for key, mean in known.items()}
            for kind, known in self.means.items()
        }

    def load(self, state: Mapping[str, Any], where: Path | str) -> None:
        """Takes a state back.

        Raises:
            ValueError: it is damaged; names `where`.
        """
        for kind, into in self.means.items():
            into.clear()
            for key, value in state[kind].items():
                if not (key.isdecimal() and isinstance(value, float) and 0.0 <= value < math.inf):
                    raise ValueError(
                        f"Pruning: {where} must hold a number >= 0 per key of {kind}, got "
                        f"{value!r} for {key!r}"
                    )
                into[int(key)] = value
