"""Where the time went: one bar of all stages, and bars of iterations side by side."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from branchcore.clock import STAGES
from branchcore.run_report.markup import Markup, join, tag
from branchcore.run_report.read import Run
from branchcore.run_report.scale import axis_of, duration, percent

BARS, HEIGHT, UNITS = 48, 220, 1000.0


class Bar(NamedTuple):
    """Mean seconds of every stage over some iterations."""

    first: int
    last: int
    seconds: dict[str, float]


def stages_of(run: Run) -> list[str]:
    """Returns the stages in which a run spent time, in their order."""
    names = {name for row in run.rows for name in row}
    return [stage for stage in STAGES if f"time/{stage}" in names]


def bars_of(run: Run) -> list[Bar]:
    """Returns the bars of a run: an iteration each, or means over equally many."""
    rows = [row for row in run.rows if row["iteration"] > 0 and "wall_s" in row]
    size = math.ceil(len(rows) / BARS) or 1
    bars: list[Bar] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        seconds = {s: sum(_seconds(row, s) for row in part) / len(part) for s in stages_of(run)}
        bars.append(Bar(part[0]["iteration"], part[-1]["iteration"], seconds))
    return bars


def _seconds(row: dict[str, Any], stage: str) -> float:
    value = row.get(f"time/{stage}", 0.0)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def draw_stages(run: Run) -> Markup | None:
    """Returns both pictures and the table beside them, None if no time was measured."""
    stages, bars = stages_of(run), bars_of(run)
    total = {s: sum(_seconds(row, s) for row in run.rows) for s in stages}
    whole = sum(total.values())
    if not bars or not whole:
        return None
    colour = {stage: f"s{STAGES.index(stage)}" for stage in stages}
    strip = [
        tag("i", cls=colour[s], style=f"flex-grow:{1000 * total[s] / whole:.3f}", title=s)
        for s in stages
    ]
    count = sum(1 for row in run.rows if row["iteration"] > 0)
    lines = [
        tag(
            "tr",
            tag("th", tag("i", cls=f"key {colour[s]}"), s, scope="row"),
            tag("td", percent(total[s] / whole)),
            tag("td", duration(total[s] / count), cls="quiet"),
        )
        for s in sorted(stages, key=lambda s: -total[s])
    ]
    head = tag("tr", tag("th", "stage"), tag("td", "share"), tag("td", "per iteration"))
    table = tag("table", tag("thead", head), tag("tbody", *lines), cls="stages")
    return tag(
        "div",
        tag("div", *strip, cls="strip", aria_hidden="true"),
        tag("div", _bars(bars, stages, colour), table, cls="beside"),
    )


def _bars(bars: list[Bar], stages: list[str], colour: dict[str, str]) -> Markup:
    axis = axis_of([sum(bar.seconds.values()) for bar in bars], zero=True)
    width, parts = UNITS / len(bars), []
    for i, bar in enumerate(bars):
        parts.append(_stack(bar, i * width, width, axis.high, stages, colour))
    rules: list[Markup] = []
    for tick in axis.ticks:
        y = round(HEIGHT * (1.0 - axis.share(tick)), 1)
        text = tag("text", f"{tick:g}", cls="tick", x=-8, y=y + 3.5, text_anchor="end")
        rules += [tag("line", cls="rule", x1=0, x2="100%", y1=y, y2=y), text]
    ends = [
        tag("text", f"{bars[0].first:,}", cls="tick", x="0%", y=HEIGHT + 17),
        tag("text", f"{bars[-1].last:,}", cls="tick", x="100%", y=HEIGHT + 17, text_anchor="end"),
    ]
    box = f"0 0 {UNITS:g} {UNITS:g}"
    inner = tag("svg", *parts, width="100%", height=HEIGHT, viewBox=box, preserveAspectRatio="none")
    spoken = {"role": "img", "aria_label": "seconds of every stage over iterations"}
    plot = tag("svg", join(*rules), inner, join(*ends), cls="plot", height=HEIGHT, **spoken)
    caption = tag("figcaption", tag("h3", "seconds per iteration"))
    return tag("figure", caption, tag("div", plot, cls="frame"), cls="chart bars")


def _stack(
    bar: Bar, x: float, width: float, high: float, stages: list[str], colour: dict[str, str]
) -> Markup:
    gap, bottom = min(0.2 * width, 4.0), UNITS
    parts: list[Markup] = []
    for stage in stages:
        height = UNITS * bar.seconds[stage] / high
        bottom -= height
        if height >= 0.5:
            at = {"x": round(x + gap / 2, 2), "y": round(bottom, 1)}
            size = {"width": round(width - gap, 2), "height": round(height, 1)}
            parts.append(tag("rect", cls=colour[stage], **at, **size))
    spent = sorted(bar.seconds.items(), key=lambda item: -item[1])
    lines = [f"{stage} {duration(seconds)}" for stage, seconds in spent if seconds > 0][:5]
    which = f"{bar.first}" if bar.first == bar.last else f"{bar.first} to {bar.last}"
    whole = duration(sum(bar.seconds.values()))
    told = tag("title", "\n".join([f"iteration {which}: {whole}", *lines]))
    area = tag("rect", cls="hit", x=round(x, 2), y=0, width=round(width, 2), height=UNITS)
    return tag("g", told, *parts, area, cls="stack")
