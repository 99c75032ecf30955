"""Statistics of learning curves: means and Student intervals over seeds, paired differences.

Letters: n evaluations of a run, S seeds, G points of the common grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from learning_words import BASE
from numpy.typing import NDArray
from scipy.stats import t as student

from branchcore.plots import read_metrics
from branchcore.recipes.recipe import Recipe
from branchcore.unbiased import trained_units

Floats = NDArray[np.float64]
MEASURES = ("reward", "both_right", "diversity", "nearest_real", "judge_accuracy")
CURVES = ("reward", "both_right")
POINTS = 21
DIGITS = 5


class Curve(NamedTuple):
    """One run up to its first evaluation at or past the budget."""

    cpu_s: Floats
    """(n,) of training when it was evaluated, from 0."""
    iteration: NDArray[np.int64]
    """(n,) iterations when it was evaluated, from 0."""
    values: dict[str, Floats]
    """(n,) held-out measures by name."""
    kept: float
    """Mean share of the planned parents that had a backward."""

    def at(self, measure: str, cpu_s: Floats) -> Floats:
        """Returns a measure at some CPU seconds, on straight lines between evaluations."""
        return np.interp(cpu_s, self.cpu_s, self.values[measure])


def reaches(folder: Path, budget: float) -> bool:
    """Tells whether a run has an evaluation at or past the budget."""
    log = folder / "metrics.jsonl"
    rows = read_metrics(log) if log.exists() else []
    return any("eval/reward" in row and row.get("cpu_s", 0.0) >= budget for row in rows)


def planned_parents(recipe: Recipe, prompts: int) -> int:
    """Returns the trained parents of an iteration before any pruning."""
    plan = recipe.plan(range(prompts), seed=0, iteration=0)
    return int(trained_units(plan).cost.sum())


def curve(folder: Path, planned: int, budget: float) -> Curve:
    """Reads a run.

    Args:
        folder: of the run.
        planned: parents of an iteration.
        budget: CPU seconds.

    Raises:
        ValueError: the run ends before the budget.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    seen = [row for row in rows if "eval/reward" in row]
    cpu_s = np.array([row.get("cpu_s", 0.0) for row in seen])
    if cpu_s[-1] < budget:
        raise ValueError(
            f"curve: {folder} must have an evaluation at {budget:g} CPU seconds or later, got "
            f"{cpu_s[-1]:g} at last"
        )
    count = int(np.argmax(cpu_s >= budget)) + 1
    seen = seen[:count]
    last = seen[-1]["iteration"]
    kept = [row["parents"] for row in rows if 0 < row["iteration"] <= last]
    return Curve(
        cpu_s=cpu_s[:count],
        iteration=np.array([row["iteration"] for row in seen]),
        values={name: np.array([row[f"eval/{name}"] for row in seen]) for name in MEASURES},
        kept=float(np.mean(kept)) / planned,
    )


def interval(values: Sequence[float] | Floats) -> dict[str, Any]:
    """Returns mean, 95 % interval by Student's t and the values; of one value no interval."""
    x = np.asarray(values, dtype=np.float64)
    mean, ci = float(x.mean()), None
    if len(x) > 1:
        half = float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
        ci = [round(mean - half, DIGITS), round(mean + half, DIGITS)]
    return {"mean": round(mean, DIGITS), "ci95": ci, "by_seed": [round(v, DIGITS) for v in x]}


def band(values_SG: Floats) -> dict[str, Any]:
    """Returns the mean curve of some seeds and its interval at every point."""
    points = [interval(column) for column in values_SG.T]
    ends = [point["ci95"] or [None, None] for point in points]
    low, high = ([end[side] for end in ends] for side in (0, 1))
    return {"mean": [point["mean"] for point in points], "low": low, "high": high}


def common_iteration(curves: Sequence[Curve]) -> int:
    """Returns the last iteration at which every run was evaluated; 0 if none."""
    return int(max(set.intersection(*(set(c.iteration.tolist()) for c in curves))))


def summary(
    folders: Mapping[str, Mapping[int, Path]], planned: Mapping[str, int], budget: float
) -> dict[str, Any]:
    """Compares finished runs.

    Args:
        folders: of the runs, by arm and seed; all arms have the same seeds.
        planned: parents of an iteration before pruning, by arm.
        budget: CPU seconds.

    Returns:
        JSON-serialisable: `final` measures at the budget, `same_iteration` measures after the last
        iteration that all runs were evaluated at, both with differences to the arm `full` of the
        same seed (None without it), and curves on a common grid.

    Raises:
        ValueError: a run ends before the budget, or arms have different seeds.
    """
    seeds = list(next(iter(folders.values())))
    for arm, found in folders.items():
        if list(found) != seeds:
            raise ValueError(f"summary: {arm} must have seeds {seeds}, got {list(found)}")
    curves = {
        arm: [curve(folder, planned[arm], budget) for folder in found.values()]
        for arm, found in folders.items()
    }
    every = [c for found in curves.values() for c in found]
    grid, same = np.linspace(0.0, budget, POINTS), common_iteration(every)
    base = {name: interval([c.values[name][0] for c in every])["mean"] for name in MEASURES}
    arms = {arm: _arm(found, curves.get(BASE), grid, same) for arm, found in curves.items()}
    return {
        "budget_s": budget,
        "seeds": seeds,
        "grid_s": [round(float(x), 3) for x in grid],
        "same_iteration": same,
        "base_model": base,
        "arms": arms,
    }


def _arm(
    curves: Sequence[Curve], others: Sequence[Curve] | None, grid: Floats, same: int
) -> dict[str, Any]:
    def final(c: Curve, name: str) -> float:
        return float(c.at(name, grid[-1:])[0])

    def after(c: Curve, name: str) -> float:
        return float(c.values[name][c.iteration == same][0])

    def against(value: Any, name: str) -> dict[str, Any] | None:
        if others is None:
            return None
        pairs = zip(curves, others, strict=True)
        return interval([value(mine, name) - value(theirs, name) for mine, theirs in pairs])

    return {
        "iterations": interval([np.interp(grid[-1], c.cpu_s, c.iteration) for c in curves]),
        "kept_share": interval([c.kept for c in curves]),
        "cpu_s_per_iteration": interval([c.cpu_s[-1] / c.iteration[-1] for c in curves]),
        **{
            title: {
                name: {
                    **interval([value(c, name) for c in curves]),
                    "against_full": against(value, name),
                }
                for name in MEASURES
            }
            for title, value in (("final", final), ("after_same_iteration", after))
        },
        "curve": {name: band(np.stack([c.at(name, grid) for c in curves])) for name in CURVES},
    }
