"""The PNG of a tree benchmark: where each plan's time goes, and how many times faster is what."""

from __future__ import annotations

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


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a result of tree_throughput."""
    from matplotlib.figure import Figure

    plans, ratios, config = result["plans"], result["ratios"], result["config"]
    height = 1.6 + 0.36 * max(len(plans), len(ratios))
    figure = Figure(figsize=(12.5, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _times(left, plans)
    _ratios(right, ratios)
    figure.suptitle(
        f"{config['model']}: {config['prompts']} prompts x {config['leaves']} leaves, "
        f"{config['steps']} steps, fp32, {config['device']}, {config['threads']} thread, "
        f"{config['rounds']} interleaved rounds",
        fontsize=11,
        color=INK,
    )
    figure.savefig(path, dpi=130)


def _seconds_axis(axis: Any, low: float, high: float, values: list[float], unit: str) -> None:
    ticks = [v for v in values if low <= np.log10(v) <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(np.log10(ticks), [f"{v:g}{unit}" for v in ticks])
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#dddddd", lw=0.7)
    axis.set_axisbelow(True)


def _times(axis: Any, plans: dict[str, Any]) -> None:
    names = list(plans)[::-1]
    totals = [np.log10(plans[n]["cpu_s"]) for n in names]
    low = min(totals) - 0.9
    for y, (name, total) in enumerate(zip(names, totals, strict=True)):
        shares = plans[name]["split"]
        whole, start = sum(shares.values()), low
        for stage, colour in COLOURS.items():
            label = stage if y == 0 else None
            width = (total - low) * shares[stage] / whole
            axis.barh(y, width, left=start, color=colour, height=0.66, label=label)
            start += width
        star = "*" if plans[name]["extrapolated"] else ""
        axis.text(total + 0.03, y, f"{plans[name]['cpu_s']:.2f} s{star}", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9.5)
    grid = [b * 10.0**e for e in range(-4, 5) for b in (1, 2, 5)]
    _seconds_axis(axis, low, max(totals) + 0.35, grid, " s")
    axis.tick_params(axis="x", labelsize=8.5)
    axis.set_title(
        "CPU seconds per iteration (log scale); colours divide a bar by share of time", fontsize=9.5
    )
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles, labels, ncols=6, fontsize=8, frameon=False, loc="upper center",
        bbox_to_anchor=(0.45, -0.07), handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip
    if any(plan["extrapolated"] for plan in plans.values()):
        axis.text(
            1.0, 0.01, "* timed on part of the prompts", fontsize=8, color=INK, ha="right",
            transform=axis.transAxes,
        )  # fmt: skip


def _ratios(axis: Any, ratios: dict[str, Any]) -> None:
    names = list(ratios)[::-1]
    ends = [1.0]
    for y, name in enumerate(names):
        row = ratios[name]
        low, high = row["ci95"]
        ends += [low, high]
        axis.plot(np.log10([low, high]), [y, y], color=INK, lw=2, solid_capstyle="butt")
        axis.plot(np.log10(row["cpu"]), y, "o", color=COLOURS["rollout"], ms=7)
        axis.text(
            np.log10(high) + 0.035, y, f"{row['cpu']:.1f}x", va="center", fontsize=9, color=INK
        )
        if row["target"]:
            ends.append(row["target"])
            axis.plot(np.log10([row["target"]] * 2), [y - 0.3, y + 0.3], color=TARGET, lw=2)
    axis.axvline(0.0, color="#888888", lw=1)
    axis.set_yticks(range(len(names)), names, fontsize=9.5)
    axis.set_ylim(-0.6, len(names) - 0.4)
    grid = [0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200]
    _seconds_axis(axis, np.log10(min(ends)) - 0.08, np.log10(max(ends)) + 0.3, grid, "x")
    axis.tick_params(axis="x", labelsize=8.5)
    axis.set_title("A/B: how many times faster A is, 95 % CI; red = required", fontsize=9.5)
