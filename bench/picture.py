"""The PNG of a tree benchmark: where each plan's time goes, and how many times faster is what."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {
    "rollout": "#4c78a8",
    "decode": "#72b7b2",
    "reward": "#eeca3b",
    "advantage": "#b279a2",
    "train": "#f58518",
    "optimizer": "#9d9da1",
}
INK, TARGET = "#333333", "#c23b22"
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
SECONDS = {"cpu": ("CPU", "cpu_s"), "wall": ("Wall", "median_s")}


def kind(name: str) -> str:
    """Returns what rows of a panel have in common: exact, steel, engine or released, or a pair."""
    parts = name.split("/")
    return "/".join(
        part.split(":")[0] if ":" in part or part == "engine" else "released" for part in parts
    )


def heights(names: list[str]) -> list[float]:
    """Returns the height of every row, top to bottom, with a gap between kinds."""
    found = [0.0]
    for before, name in pairwise(names):
        found.append(found[-1] - (1.0 if kind(before) == kind(name) else 1.5))
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a result of tree_throughput."""
    from matplotlib.figure import Figure

    plans, ratios, config = result["plans"], result["ratios"], result["config"]
    deepest = max((-heights(list(rows))[-1] for rows in (plans, ratios) if rows), default=0.0)
    figure = Figure(figsize=(12.5, 1.9 + 0.3 * (1.0 + deepest)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    clock = config.get("clock", "cpu")
    _times(left, plans, clock)
    _ratios(right, ratios, clock)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=len(labels), fontsize=8.5, frameon=False, loc="outside lower left",
        handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip
    figure.suptitle(
        f"{config['model']}: {config['prompts']} prompts x {config['leaves']} leaves, "
        f"{config['steps']} steps, {DTYPES[config['dtype']]}, {config['device']}, "
        f"{config['threads']} thread, "
        f"{config['rounds']} interleaved rounds",
        fontsize=11,
        color=INK,
    )
    figure.savefig(path, dpi=130)


def _rows(axis: Any, names: list[str]) -> list[float]:
    """Labels the rows of a panel and rules off its kinds; returns their heights."""
    found = heights(names)
    axis.set_yticks(found, names, fontsize=9.5)
    axis.set_ylim(min(found, default=0.0) - 0.7, 0.7)
    for above, below in pairwise(found):
        if above - below > 1.0:
            axis.axhline((above + below) / 2, color="#dddddd", lw=0.7)
    return found


def _scale(axis: Any, low: float, high: float, values: list[float], unit: str) -> None:
    ticks = [v for v in values if low <= np.log10(v) <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(np.log10(ticks), [f"{v:g}{unit}" for v in ticks])
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#dddddd", lw=0.7)
    axis.set_axisbelow(True)


def _times(axis: Any, plans: dict[str, Any], clock: str) -> None:
    head, key = SECONDS[clock]
    totals = [np.log10(plan[key]) for plan in plans.values()]
    low, labels = min(totals) - 0.9, dict.fromkeys(COLOURS)
    rows = zip(plans.values(), totals, _rows(axis, list(plans)), strict=True)
    for plan, total, y in rows:
        whole, start = sum(plan["split"].values()), low
        for stage, colour in COLOURS.items():
            width = (total - low) * plan["split"][stage] / whole
            label = stage if stage in labels else None
            labels.pop(stage, None)
            axis.barh(y, width, left=start, color=colour, height=0.7, label=label)
            start += width
        star = "*" if plan["extrapolated"] else ""
        axis.text(total + 0.03, y, f"{plan[key]:.2f} s{star}", va="center", fontsize=9)
    grid = [b * 10.0**e for e in range(-4, 5) for b in (1, 2, 5)]
    _scale(axis, low, max(totals) + 0.35, grid, " s")
    axis.set_title(
        f"{head} seconds per iteration (log scale); colours divide a bar by share of time",
        fontsize=9.5,
    )
    if any(plan["extrapolated"] for plan in plans.values()):
        once = any(plan.get("rounds_timed") == 1 for plan in plans.values())
        how = "the first round alone" if once else "part of the prompts, scaled"
        axis.set_xlabel(f"* timed on {how}", fontsize=8.5, color=INK)


def _ratios(axis: Any, ratios: dict[str, Any], clock: str) -> None:
    ends = [1.0]
    for row, y in zip(ratios.values(), _rows(axis, list(ratios)), strict=True):
        low, high = row["ci95"]
        ends += [low, high]
        if row["target"]:
            ends.append(row["target"])
            axis.plot(np.log10([row["target"]] * 2), [y - 0.34, y + 0.34], color=TARGET, lw=2)
        axis.plot(np.log10([low, high]), [y, y], color=INK, lw=2, solid_capstyle="butt")
        axis.plot(np.log10(row[clock]), y, "o", color=COLOURS["rollout"], ms=6.5)
        right = max(high, 1.05 * row[clock])
        if row["target"] and right <= row["target"] < 1.3 * right:
            right = row["target"]
        axis.text(np.log10(right) + 0.03, y, f"{row[clock]:.1f}x", va="center", fontsize=9)
    axis.axvline(0.0, color="#888888", lw=1)
    grid = [0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200]
    _scale(axis, np.log10(min(ends)) - 0.08, np.log10(max(ends)) + 0.3, grid, "x")
    axis.set_title("A/B: how many times faster A is, 95 % CI; red = required", fontsize=9.5)
