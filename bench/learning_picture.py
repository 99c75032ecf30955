"""The PNG of a learning benchmark: curves over CPU seconds, and the differences at their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, FAINT = "#333333", "#dddddd"
# Colour and dashes; the unbiased in blue, the biased in warm colours. Dashes alone tell them apart.
STYLES: dict[str, tuple[str, Any]] = {
    "full": ("#000000", "-"),
    "dppo": ("#3a78b8", (0, (6, 1.5))),
    "optimal": ("#1b3f8b", (0, (3, 1.2))),
    "cppo": ("#d9822b", (0, (6, 1.5, 1.2, 1.5))),
    "parent_top1": ("#b8332a", (0, (1.2, 1.2))),
    "depth": ("#8a5a9e", (0, (3, 1.5, 1, 1.5, 1, 1.5))),
}
TITLES = {
    "reward": "Held-out reward",
    "both_right": "Held-out: both style words right",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a result of learning.py.

    Args:
        result: of `learning_summary.summary`, with `recipe`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    others = [
        name for name, arm in result["arms"].items() if arm["final"]["reward"]["against_full"]
    ]
    others = [name for name in others if name != "full"]
    widths = (1.2, 1.2, 0.8) if others else (1, 1)
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    for axis, measure in zip(axes, TITLES, strict=False):
        _curves(axis, result, measure)
    if others:
        _differences(axes[-1], result, others)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=len(labels), fontsize=10, frameon=False, handlelength=4.2,
        loc="outside lower center",
    )  # fmt: skip
    seeds = len(result["seeds"])
    shown = "mean and 95 % interval" if seeds > 1 else "no interval"
    figure.suptitle(
        f"{result['recipe']} on the digits model, {result['budget_s']:g} CPU seconds of training "
        f"each; {seeds} seed{'s' * (seeds > 1)}, {shown}",
        fontsize=12,
        color=INK,
    )
    figure.savefig(path, dpi=120)


def _frame(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=11, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.set_axisbelow(True)


def _curves(axis: Any, result: dict[str, Any], measure: str) -> None:
    """Draws a measure's mean curves; `full` is on top of all."""
    grid = result["grid_s"]
    for name, arm in result["arms"].items():
        colour, dashes = STYLES[name]
        found, whole = arm["curve"][measure], name == "full"
        order = 4 if whole else 3
        if found["low"][0] is not None:
            axis.fill_between(
                grid, found["low"], found["high"], color=colour, alpha=0.1, lw=0, zorder=2
            )
        width = 2.4 if whole else 1.9
        axis.plot(grid, found["mean"], color=colour, ls=dashes, lw=width, label=name, zorder=order)
    axis.grid(color=FAINT, lw=0.7)
    axis.set_xlim(0, grid[-1])
    axis.set_xlabel("CPU seconds of training", fontsize=9.5, color=INK)
    _frame(axis, TITLES[measure])


def _differences(axis: Any, result: dict[str, Any], names: list[str]) -> None:
    """Draws the paired differences of the final reward to `full`, one row per arm."""
    axis.axvline(0.0, color="#000000", lw=1.2)
    for y, name in enumerate(reversed(names)):
        found, colour = result["arms"][name]["final"]["reward"]["against_full"], STYLES[name][0]
        if found["ci95"] is not None:
            axis.plot(found["ci95"], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        axis.plot(found["by_seed"], [y - 0.2] * len(found["by_seed"]), "|", color="#999999", ms=6)
        axis.plot(found["mean"], y, "o", color=colour, ms=7)
        axis.text(
            found["mean"], y + 0.16, f"{found['mean']:+.2f}", fontsize=9, ha="center", color=INK
        )
    axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=10)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.margins(x=0.12)
    axis.grid(axis="x", color=FAINT, lw=0.7)
    axis.set_xlabel("worse  |  better;  ticks: seeds", fontsize=9.5, color=INK)
    _frame(axis, f"Reward at {result['budget_s']:g} s, minus full's")
    axis.tick_params(axis="y", length=0)
