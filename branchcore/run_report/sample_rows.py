"""Samples of the same noise: as they were at first, and as they are at a chosen iteration.

A sheet is one picture of all rows. It is in the page once, as a custom property of CSS; a row shows
its part of it as a background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from branchcore.run_report.markup import Markup, data_uri, join, tag
from branchcore.run_report.read import Grid

SHEETS = 9
"""Most sheets of a page: the first, the last, and others evenly between."""
T = TypeVar("T")


def chosen(found: Sequence[T], most: int) -> list[T]:
    """Returns the first, the last and evenly spaced ones between, in order."""
    if len(found) <= most:
        return list(found)
    places = [round(i * (len(found) - 1) / (most - 1)) for i in range(most)]
    return [found[i] for i in places]


def draw_samples(grid: Grid | None) -> Markup | None:
    """Returns rows of samples with a slider, None without any."""
    if grid is None or not grid.prompts:
        return None
    times = chosen(list(grid.files), SHEETS)
    sheets = [f"--sheet{i}:url({data_uri(grid.files[at])})" for i, at in enumerate(times)]
    last = len(times) - 1
    # the page's own style element: an attribute of megabytes is slow to read
    shape = f"--rows:{len(grid.prompts)};--aspect:{grid.aspect:.6g};--shown:var(--sheet{last})"
    style = Markup(f".samples{{{shape};{';'.join(sheets)}}}")
    before = tag("span", f"iteration {times[0]}", cls="when")
    now = tag("output", f"iteration {times[last]}", cls="when now", for_="moment")
    heads = [tag("span", cls="corner"), before, *([now] if last else [])]
    rows = [_row(grid, row, last > 0) for row in range(len(grid.prompts))]
    left_out = len(grid.files) - len(times)
    note = tag("p", f"{left_out} grids between are not shown.", cls="quiet") if left_out else None
    kind = "samples pixelated" if grid.pixelated else "samples"
    return join(
        tag("style", style),
        _slider(times) if last else None,
        tag(
            "div",
            tag("div", *heads, cls="row head"),
            *rows,
            cls=kind + ("" if last else " single"),
            data_times=" ".join(map(str, times)),
        ),
        note,
    )


def _slider(times: Sequence[int]) -> Markup:
    last = len(times) - 1
    bounds = {"min": 0, "max": last, "value": last, "step": 1}
    slider = tag(
        "input", type="range", id="moment", aria_label="iteration of the samples", **bounds
    )
    return tag(
        "div", tag("span", times[0]), slider, tag("span", times[-1]), cls="slider", hidden=True
    )


def _row(grid: Grid, row: int, two: bool) -> Markup:
    prompt = grid.prompts[row]
    share = 100 * row / max(len(grid.prompts) - 1, 1)
    place = f"background-position:0 {share:.4f}%"
    said = {"role": "img", "style": place}
    first = tag("div", cls="shot first", aria_label=f"{prompt}, at first", **said)
    now = tag("div", cls="shot now", aria_label=f"{prompt}, later", **said)
    return tag("div", tag("span", prompt, cls="prompt"), first, now if two else None, cls="row")
