"""Curves of a run from its metrics.jsonl, as one PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def panels(rows: Rows) -> dict[str, list[str]]:
    """Groups the metrics of a run into panels of one scale: title -> metric names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    rewards = [n for n in names if n.startswith("reward/")]
    held_out = ["eval/reward", *(n.replace("reward/", "eval/", 1) for n in rewards)]
    shares = [n for n in names if n.startswith("eval/") and n.endswith("_right")]
    groups = {
        "reward, training noise": ["reward", *rewards],
        "reward, held-out noise": held_out,
        "held-out: share right": shares,
    }
    for name in names:
        if name.startswith("eval/") and name not in held_out + shares:
            groups[f"held-out: {_label(name)}"] = [name]
    groups |= {
        "clip and zero-std groups": ["clip_share", "zero_std_share"],
        "ratio deviation": ["ratio_dev_max", "ratio_dev_mean"],
        "gradient norm": ["grad_norm"],
        "KL term": ["kl"],
    }
    present = {t: [n for n in wanted if n in names] for t, wanted in groups.items()}
    return {title: wanted for title, wanted in present.items() if wanted}


def curves(metrics: Path, out: Path) -> Path:
    """Draws reward, held-out measures, ratio, gradient and KL over iterations.

    Args:
        metrics: metrics.jsonl of a run.
        out: PNG to write.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "curves: matplotlib must be installed, got none; try pip install 'branchcore[demo]'"
        ) from error
    rows = read_metrics(metrics)
    groups = panels(rows)
    across = math.ceil(math.sqrt(len(groups)))
    down = math.ceil(len(groups) / across)
    figure = Figure(figsize=(3.6 * across, 2.7 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for (title, names), axis in zip(groups.items(), axes, strict=False):
        for name in names:
            points = [(r["iteration"], r[name]) for r in rows if name in r]
            style = ".-" if name.startswith("eval/") else "-"
            axis.plot(*zip(*points, strict=True), style, label=_label(name), lw=1.2)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    for axis in list(axes):
        axis.set_visible(False)
    seconds = max((r["cpu_s"] for r in rows if "cpu_s" in r), default=0.0)
    figure.suptitle(f"{rows[-1]['iteration']} iterations, {seconds:.0f} CPU seconds", fontsize=11)
    figure.savefig(out, dpi=110)
    return out


def _label(name: str) -> str:
    return name.split("/")[-1].replace("_", " ")
