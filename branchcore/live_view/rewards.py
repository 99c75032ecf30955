"""Rewards as a table: now, their spread within a prompt, held out, and their curve."""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from branchcore.live_view.seen import Seen
from branchcore.live_view.style import HEAD, LIVE, QUIET, packed
from branchcore.live_view.text import number, sparkline

NARROW = 52
"""Columns below which the table is tighter and has no held-out column."""


class _Row(NamedTuple):
    title: str
    now: float
    spread: float
    held_out: float
    curve: list[float]


def reward_table(seen: Seen, width: int, most: int, measures: int) -> list[Text]:
    """Returns the lines.

    Args:
        seen: the rows of the run; nothing is returned before there are rewards.
        width: columns.
        most: components.
        measures: lines of what else an evaluation found; 0 = none.
    """
    if not (seen.row or seen.evaluation):
        return []
    names = seen.components()
    rows = [_component(seen, name) for name in names[:most]]
    alone = len(names) == 1 and rows and rows[0].now == seen.number("reward")
    if not alone:
        reward, held_out = seen.number("reward"), seen.held_out("reward")
        rows.insert(0, _Row("total", reward, math.nan, held_out, seen.curve("reward")))
    found = _table(rows, width, max(len(names) - most, 0))
    return found + (_measures(seen, width, measures) if measures and seen.evaluation else [])


def _component(seen: Seen, name: str) -> _Row:
    metric = f"reward/{name}"
    spread, held_out = seen.number(f"reward_std/{name}"), seen.held_out(name)
    return _Row(name, seen.number(metric), spread, held_out, seen.curve(metric))


def _table(rows: list[_Row], width: int, hidden: int) -> list[Text]:
    indent, gap = (3, 3) if width >= NARROW else (1, 1)
    longest = max(cell_len(row.title) for row in rows)
    size = min(max(longest, 10), 20 if width >= NARROW else 10)
    columns = {
        "now": [_cell(row.now) for row in rows],
        "spread": [f"± {number(row.spread)}" * (not math.isnan(row.spread)) for row in rows],
        "held out": [_cell(row.held_out) for row in rows] if width >= NARROW else [],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    wide = {"now": 9, "spread": 10, "held out": 11}
    head = Text().append(" reward", HEAD)
    head.append((f" +{hidden}" if hidden else "").ljust(indent + size - 7), QUIET)
    head.append("".join(f"{title:>{wide[title]}}" for title in columns), QUIET)
    room = width - head.cell_len - gap
    found = [head]
    for i, row in enumerate(rows):
        line = Text(" " * indent).append(set_cell_size(row.title, size))
        for title, cells in columns.items():
            line.append(f"{cells[i]:>{wide[title]}}", QUIET if title == "spread" else "")
        found.append(line.append(" " * gap).append(sparkline(row.curve, room), LIVE))
    return found


def _cell(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _measures(seen: Seen, width: int, most: int) -> list[Text]:
    """The curve of the held-out reward, and held-out measures that are no reward."""
    curve = sparkline(seen.curve("eval/reward"), width // 3)
    head = Text().append(f"   held out at {seen.evaluation['iteration']}", QUIET)
    head.append(f"   {curve}" if len(curve) > 1 else "", LIVE)
    others = [f"{name} {number(value)}" for name, value in seen.others().items()]
    if most < 2 or not others:
        return [head]
    return [head, *(Text("     ").append(line) for line in packed(others, width - 5, most - 1))]
