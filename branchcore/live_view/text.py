"""Numbers as few characters: signs, durations, curves and shares of a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_LEVELS = "▁▂▃▄▅▆▇█"
_FULL, _HALF, _EMPTY = "━", "╸", "─"


def number(value: float) -> str:
    """Returns a number of at most nine characters, three digits behind the point if they show it.

    NaN is a dash: nothing was measured.
    """
    if math.isnan(value):
        return "-"
    if value == 0.0 or 1e-2 <= abs(value) < 1e5:
        digits = max(0, min(3, 5 - len(str(int(abs(value))))))
        return f"{value:.{digits}f}"
    return tiny(value)


def tiny(value: float) -> str:
    """Returns a number that may be far from 1, to two digits: 2.4e-05, 0."""
    if math.isnan(value):
        return "-"
    return "0" if value == 0.0 else f"{value:.1e}"


def percent(share: float) -> str:
    """Returns a share; what is there is never called 0 %."""
    if math.isnan(share):
        return "-"
    return "< 1 %" if 0.0 < share < 0.005 else f"{share:.0%}".replace("%", " %")


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: 0.42 s, 12 s, 3 min 50 s, 2 h 05 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 10.0:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns a curve of at most `width` characters from its smallest value to its largest.

    Args:
        values: in order; where there are more than characters, means of equal parts. NaN is a gap.
        width: characters; below 1 there is none.
    """
    if width < 1:
        return ""
    cells = _means(values, width) if len(values) > width else list(values)
    known = [v for v in cells if math.isfinite(v)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    if span <= 1e-9 * max(abs(low), abs(low + span)):
        return "".join(" " if math.isnan(v) else _LEVELS[3] for v in cells)
    levels = [0 if not math.isfinite(v) else round((v - low) / span * 7.0) for v in cells]
    return "".join(
        _LEVELS[level] if math.isfinite(v) else " " for v, level in zip(cells, levels, strict=True)
    )


def _means(values: Sequence[float], width: int) -> list[float]:
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    parts = [values[lo:hi] for lo, hi in pairwise(cuts)]
    known = [[v for v in part if math.isfinite(v)] for part in parts]
    return [sum(part) / len(part) if part else math.nan for part in known]


def meter(share: float, width: int) -> tuple[str, str]:
    """Returns the full and the empty part of a bar of `width` characters, to half a character."""
    halves = round(2 * width * min(max(share, 0.0), 1.0)) if math.isfinite(share) else 0
    full = _FULL * (halves // 2) + _HALF * (halves % 2)
    return full, _EMPTY * (width - len(full))
