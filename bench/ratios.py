"""From timed rounds to the numbers of the tables: plans, their work, how much faster is what."""

from __future__ import annotations

from typing import Any

import numpy as np
from measure import median_ci, paired_ratio
from plans import BASES, PLANS
from plans.task import STAGES, Clock
from work import Work

OTHER_LEAVES = ("tempflow", "g2rpo")
"""Score leaves at every step of a trunk: no iteration of theirs is at equal leaves."""
EQUAL_LEAVES = tuple(name for name in BASES if name not in OTHER_LEAVES)
PAIRS = (
    *(f"exact:{name}/{name}" for name in BASES),
    *(f"engine/{name}" for name in EQUAL_LEAVES),
    "engine/steel:dance",
    "engine/steel:branch",
    "exact:dance/steel:dance",
    "exact:branch/steel:branch",
)
TARGETS = {
    **{f"exact:{name}/{name}": 2.5 for name in ("dance", "flow", "branch")},
    **{f"exact:{name}/{name}": 3.0 for name in ("mix", "flash", "tempflow")},
    **{f"exact:{name}/{name}": 2.0 for name in ("g2rpo", "tree")},
    "engine/steel:dance": 4.0,
}
FASTEST_TARGET = 4.0
"""Of engine/x, x the released plan at equal leaves that is fastest."""


class Sample:
    """Seconds of one iteration: its stages, scaled to all prompts."""

    def __init__(self, clock: Clock, scale: float) -> None:
        # the optimizer steps once, however many prompts there are
        factors = {stage: 1.0 if stage == "optimizer" else scale for stage in STAGES}
        self.split = {stage: factors[stage] * clock.cpu[stage] for stage in STAGES}
        self.cpu = sum(self.split.values())
        self.wall = sum(factors[stage] * clock.wall[stage] for stage in STAGES)


def summary(samples: list[Sample], work: Work) -> dict[str, Any]:
    """Returns what the result file says of one plan's time and work."""
    cpu = [sample.cpu for sample in samples]
    return {
        "median_s": float(np.median([sample.wall for sample in samples])),
        "cpu_s": float(np.median(cpu)),
        "ci95": median_ci(cpu),
        **work._asdict(),
        "split": {s: float(np.median([sample.split[s] for sample in samples])) for s in STAGES},
        "rounds_cpu_s": cpu,
        "rounds_wall_s": [sample.wall for sample in samples],
    }


def ratios(plans: dict[str, Any], pair: float) -> dict[str, Any]:
    """Returns "A/B": times B's time over A's, and what forwards and backwards alone predict.

    Args:
        plans: what `summary` says of each.
        pair: forward + backward over forward.
    """
    units, targets = {n: _units(n, plans[n], pair) for n in plans}, targets_of(plans)
    found = {}
    for name in PAIRS:
        a, b = name.split("/")
        if a in plans and b in plans:
            cpu, ci95 = paired_ratio(plans[b]["rounds_cpu_s"], plans[a]["rounds_cpu_s"])
            wall, _ = paired_ratio(plans[b]["rounds_wall_s"], plans[a]["rounds_wall_s"])
            found[name] = {
                "cpu": cpu,
                "wall": wall,
                "ci95": ci95,
                "predicted": units[b] / units[a],
                "target": targets.get(name),
            }
    return found


def targets_of(plans: dict[str, Any]) -> dict[str, float]:
    """Returns the required ratios, engine / fastest release among them."""
    released = [name for name in EQUAL_LEAVES if name in plans]
    if not released:
        return TARGETS
    fastest = min(released, key=lambda name: plans[name]["cpu_s"])
    return TARGETS | {f"engine/{fastest}": FASTEST_TARGET}


def _units(name: str, plan: dict[str, Any], pair: float) -> float:
    trained = {
        "edges": pair * plan["E"],
        "parents": pair * plan["P"],
        "tape": (pair - 1.0) * plan["P"],
    }
    return plan["F"] + trained[PLANS[name].trains]
