"""The metrics of a run as curves: what belongs into one chart, thinned to what a page can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from branchcore.run_report.read import Run

POINTS = 300
"""Most points of a curve; more are averaged, evenly spaced."""
Values = Sequence[tuple[int, float]]


class Series(NamedTuple):
    """One curve; `y` is None where the metric was no finite number."""

    label: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    spread: tuple[float | None, ...] = ()
    """Half the height of the band around it; empty = no band."""
    held_out: bool = False
    """Points far apart, to be marked."""
    level: Literal["", "dashed", "dotted"] = ""
    """A limit, and how it is drawn."""


class Chart(NamedTuple):
    """Curves that share their axes."""

    title: str
    series: tuple[Series, ...]
    note: str = ""
    share: bool = False
    """Values are shares, shown in percent."""
    zero: bool = False
    """The axis begins at 0."""


def curve(run: Run, name: str, label: str, *, spread: str = "", **kind: Any) -> Series | None:
    """Returns the curve of a metric, None if the run has no finite value of it.

    Args:
        run: the run.
        name: of the metric.
        label: in the legend.
        spread: metric that is the half height of a band.
        kind: fields of `Series`.
    """
    values = run.values(name)
    if not any(math.isfinite(v) for _, v in values):
        return None
    x, y = thinned(values, largest=name.endswith("_max"))
    around: tuple[float | None, ...] = ()
    if spread:
        known = dict(run.values(spread))
        around = thinned([(at, known.get(at, math.nan)) for at, _ in values])[1]
    return Series(label, x, y, around, **kind)


def thinned(
    values: Values, *, largest: bool = False
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Returns iterations and values, means (or maxima) over runs of neighbours if there are many.

    A mean is over the finite values; None where there are none.
    """
    size = math.ceil(len(values) / POINTS)
    x: list[float] = []
    y: list[float | None] = []
    for start in range(0, len(values), size or 1):
        part = values[start : start + size]
        finite = [v for _, v in part if math.isfinite(v)]
        x.append(part[-1][0] if size == 1 else sum(at for at, _ in part) / len(part))
        most = max(finite) if largest and finite else None
        y.append(most if largest else sum(finite) / len(finite) if finite else None)
    return tuple(x), tuple(y)


def reward_charts(run: Run) -> list[Chart]:
    """Returns the reward and its components, training with its spread, and held-out."""
    names = ["", *run.components]
    charts: list[Chart] = []
    for name in names:
        own, around = (f"reward/{name}", f"reward_std/{name}") if name else ("reward", "")
        found = [
            curve(run, own, "training", spread=around if run.values(around) else ""),
            curve(run, f"eval/{name or 'reward'}", "held-out", held_out=True),
        ]
        charts += _chart(name or "reward", found)
    return charts


def held_out_charts(run: Run) -> list[Chart]:
    """Returns the other held-out measures; shares that end in `_right` are in one chart."""
    names = dict.fromkeys(name for row in run.rows for name in row if name.startswith("eval/"))
    rewards = {"eval/reward", *(f"eval/{name}" for name in run.components)}
    others = [name for name in names if name not in rewards]
    right = [name for name in others if name.endswith("_right")]
    found = [curve(run, n, _plain(n).removesuffix(" right"), held_out=True) for n in right]
    charts = _chart("share right", found, share=True, zero=True)
    for name in others:
        if name not in right:
            charts += _chart(_plain(name), [curve(run, name, "held-out", held_out=True)])
    return charts


def policy_charts(run: Run, clip: float | None) -> list[Chart]:
    """Returns how far the policy moves: ratios, clipping, gradient, KL, diversity of rewards."""
    ratio = [
        curve(run, "ratio_dev_mean", "mean"),
        curve(run, "ratio_dev_max", "largest"),
        curve(run, "noise_floor", "noise floor", level="dotted"),
    ]
    if clip is not None and ratio[0] is not None:
        ends = ratio[0].x[:: max(len(ratio[0].x) - 1, 1)]
        ratio.append(Series("clip range", ends, (clip,) * len(ends), level="dashed"))
    shares = [
        curve(run, "clip_share", "clipped edges"),
        curve(run, "zero_std_share", "groups without spread"),
        curve(run, "stopped_share", "stopped leaves"),
    ]
    pruned = [
        curve(run, "work_saved", "work saved"),
        curve(run, "kept_share", "parents kept"),
        curve(run, "prompts_share", "prompts kept"),
    ]
    spread = [curve(run, f"reward_std/{name}", name) for name in run.components]
    return [
        *_chart("ratio, distance from 1", ratio, zero=True),
        *_chart("clipping and idle groups", shares, share=True, zero=True),
        *_chart("gradient norm", [curve(run, "grad_norm", "largest of the updates")], zero=True),
        *_chart("KL term", [curve(run, "kl", "of the loss")], zero=True),
        *_chart("spread within a prompt", spread, zero=True),
        *_chart("pruning", pruned, share=True, zero=True),
    ]


def work_charts(run: Run) -> list[Chart]:
    """Returns what the machine did: MFU, memory, how uneven processes are, skipped updates."""
    stages = dict.fromkeys(n for row in run.rows for n in row if n.startswith("skew/"))
    last = {name: run.values(name)[-1][1] for name in stages if run.values(name)}
    worst = sorted(last, key=lambda name: -last[name])[:4]
    skew = [curve(run, name, name.removeprefix("skew/")) for name in worst]
    memory = [curve(run, "memory_gb", "GPU, peak"), curve(run, "rss_gb", "process, peak")]
    skipped = [curve(run, "skipped_updates", "so far")]
    return [
        *_chart("MFU", [curve(run, "mfu", "of the peak")], share=True, zero=True),
        *_chart("memory, GB", memory, zero=True),
        *_chart("skew: slowest process over mean", skew, share=True, zero=True),
        *_chart("skipped updates", skipped, zero=True),
    ]


def _chart(
    title: str, series: Sequence[Series | None], *, share: bool = False, zero: bool = False
) -> list[Chart]:
    """Returns a chart of the curves there are, none if there are none."""
    found = tuple(s for s in series if s is not None)
    if not found or all(s.level for s in found):
        return []
    return [Chart(title, found, share=share, zero=zero)]


def _plain(name: str) -> str:
    return name.split("/", 1)[-1].replace("_", " ")
