"""Curves of a run from its metrics.jsonl, as one PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PANELS = (
    ("reward on training noise", ("reward/",), False),
    ("held-out: right", ("eval/both_right", "eval/stroke_right", "eval/slant_right"), True),
    ("held-out: guards", ("eval/judge_accuracy", "eval/diversity", "eval/nearest_real"), True),
    ("ratio and clip", ("ratio_dev_max", "clip_share", "zero_std_share"), False),
    ("gradient norm and KL", ("grad_norm", "kl"), False),
    ("CPU seconds", ("cpu_s",), False),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(metrics: Path, out: Path) -> Path:
    """Draws reward, held-out measures, ratio, gradient and time over iterations.

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
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (title, wanted, dots) in zip(axes.flat, _PANELS, strict=True):
        for name in _names(rows, wanted):
            points = [(r["iteration"], r[name]) for r in rows if name in r]
            axis.plot(*zip(*points, strict=True), ".-" if dots else "-", label=_label(name), lw=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration", fontsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    return out


def _names(rows: Sequence[dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    known = dict.fromkeys(name for row in rows for name in row)
    return [
        n for n in known if n in wanted or any(w[-1] == "/" and n.startswith(w) for w in wanted)
    ]


def _label(name: str) -> str:
    return name.split("/")[-1].replace("_", " ")
