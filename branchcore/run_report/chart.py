"""Line charts as SVG that fits any width: paths stretch, text and strokes do not.

The outer svg has no view box: its lines and texts stand at percentages. The inner one has 1000 by
1000 units that are stretched over the plot. A line of no length with round ends is a dot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from branchcore.run_report.markup import Markup, join, tag
from branchcore.run_report.scale import Axis, axis_of, log_axis_of, number, percent, tick
from branchcore.run_report.series import Chart, Series

HEIGHT = 150
UNITS = 1000.0
COLOURS = 6
_FAR = 100.0
"""Largest over smallest value beyond which an axis of positive values is logarithmic."""


def draw_chart(chart: Chart, first: int, last: int) -> Markup:
    """Returns a chart as a figure, with its values in the legend and for the script.

    Args:
        chart: what to draw.
        first: iteration of the left end.
        last: iteration of the right end.
    """
    axis = _axis(chart)
    across = Axis(first, max(last, first + 1), _ticks(first, last))
    colours = _colours(chart)
    layers = [_band(s, axis, across, c) for s, c in zip(chart.series, colours, strict=True)]
    layers += [_line(s, axis, across, c) for s, c in zip(chart.series, colours, strict=True)]
    curves = tag(
        "svg",
        *layers,
        width="100%",
        height=HEIGHT,
        viewBox=f"0 0 {UNITS:g} {UNITS:g}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    cursor = tag("line", cls="cursor", y1=0, y2=HEIGHT, x1="0%", x2="0%", visibility="hidden")
    plot = tag(
        "svg",
        _grid(axis, chart.share),
        _iterations(across),
        cursor,
        curves,
        cls="plot",
        height=HEIGHT,
        role="img",
        aria_label=_spoken(chart),
    )
    unit = tag("span", "log scale", cls="unit") if axis.log else None
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.title, unit), _legend(chart, colours)),
        tag("div", plot, cls="frame", tabindex="0"),
        cls="chart",
    )


def chart_values(chart: Chart, first: int, last: int) -> dict[str, Any]:
    """Returns what the script needs to name the values of a chart under a finger."""
    return {
        "x": [first, max(last, first + 1)],
        "share": chart.share,
        "series": [
            {
                "label": s.label,
                "colour": colour,
                "level": bool(s.level),
                "x": list(s.x),
                "y": [_short(v) for v in s.y],
                "spread": [_short(v) for v in s.spread],
            }
            for s, colour in zip(chart.series, _colours(chart), strict=True)
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _colours(chart: Chart) -> list[str]:
    """Returns a class per curve; held-out ones have the second colour where they are alone."""
    curves = [s for s in chart.series if not s.level]
    shift = int(all(s.held_out for s in curves))
    order = iter(range(shift, shift + len(curves)))
    return [(f"level {s.level}" if s.level else f"c{next(order) % COLOURS}") for s in chart.series]


def _axis(chart: Chart) -> Axis:
    found: list[float] = []
    for series in chart.series:
        around = series.spread or (0.0,) * len(series.y)
        for value, half in zip(series.y, around, strict=True):
            if value is not None:
                found += [value - (half or 0.0), value + (half or 0.0)]
    # a limit of 0 says nothing on a logarithmic axis: it lies at its low end
    above = [v for v in found if v > 0.0]
    curves = [v for s in chart.series if not s.level for v in s.y if v is not None]
    positive = min(curves) > 0.0 and len(above) > 0 and max(above) > _FAR * min(above)
    if positive and not chart.share and not any(s.spread for s in chart.series):
        return log_axis_of(above)
    return axis_of(found, zero=chart.zero)


def _ticks(first: int, last: int) -> tuple[float, ...]:
    ticks = axis_of((first, max(last, first + 1)), most=4).ticks
    return tuple(t for t in ticks if first <= t <= last and t == round(t))


def _y(axis: Axis, value: float) -> float:
    return round(UNITS * (1.0 - axis.share(value)), 1)


def _points(series: Series, across: Axis) -> list[list[tuple[float, float, float]]]:
    """Returns (x, y, half band) of every stretch without a gap."""
    around = series.spread or (None,) * len(series.y)
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for at, value, half in zip(series.x, series.y, around, strict=True):
        if value is None:
            stretches.append([])
        else:
            x = round(UNITS * across.share(at), 1)
            stretches[-1].append((x, value, half or 0.0))
    return [stretch for stretch in stretches if stretch]


def _line(series: Series, axis: Axis, across: Axis, colour: str) -> Markup:
    parts: list[str] = []
    dots: list[str] = []
    for stretch in _points(series, across):
        places = [f"{x:g} {_y(axis, value):g}" for x, value, _ in stretch]
        parts.append("M" + "L".join(places))
        if series.held_out or len(stretch) == 1:
            dots += [f"M{place}h0" for place in places]
    marks = tag("path", cls=f"dots {colour}", d="".join(dots)) if dots else None
    return join(tag("path", cls=f"curve {colour}", d="".join(parts)), marks)


def _band(series: Series, axis: Axis, across: Axis, colour: str) -> Markup | None:
    if not series.spread:
        return None
    shapes: list[str] = []
    for stretch in _points(series, across):
        top = [f"{x:g} {_y(axis, value + half):g}" for x, value, half in stretch]
        low = [f"{x:g} {_y(axis, value - half):g}" for x, value, half in reversed(stretch)]
        shapes.append("M" + "L".join([*top, *low]) + "Z")
    return tag("path", cls=f"band {colour}", d="".join(shapes))


def _grid(axis: Axis, share: bool) -> Markup:
    lines: list[Markup] = []
    for value in axis.ticks:
        y = round(HEIGHT * (1.0 - axis.share(value)), 1)
        text = percent(value) if share else tick(value)
        lines.append(tag("line", cls="rule", x1=0, x2="100%", y1=y, y2=y))
        lines.append(tag("text", text, cls="tick", x=-8, y=y + 3.5, text_anchor="end"))
    return join(*lines)


def _iterations(across: Axis) -> Markup:
    texts: list[Markup] = []
    for value in across.ticks:
        share = across.share(value)
        anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
        at = {"x": f"{100 * share:.2f}%", "y": HEIGHT + 17, "text_anchor": anchor}
        texts.append(tag("text", f"{value:,.0f}", cls="tick", **at))
    return join(*texts)


def _last(series: Series) -> float | None:
    return next((v for v in reversed(series.y) if v is not None), None)


def shown(value: float | None, share: bool) -> str:
    """Returns a value as its chart shows it."""
    return percent(value) if share else number(value)


def _legend(chart: Chart, colours: Sequence[str]) -> Markup:
    items = [
        tag("li", tag("i", cls=f"key {c}"), s.label, tag("b", shown(_last(s), chart.share)))
        for s, c in zip(chart.series, colours, strict=True)
    ]
    return tag("ul", *items, cls="legend")


def _spoken(chart: Chart) -> str:
    """Returns what a screen reader says instead of the picture."""
    parts: list[str] = []
    for series in chart.series:
        values = [v for v in series.y if v is not None and math.isfinite(v)]
        ends = (shown(values[0], chart.share), shown(values[-1], chart.share))
        parts.append(f"{series.label} from {ends[0]} to {ends[1]}")
    return f"{chart.title}: {', '.join(parts)}"
