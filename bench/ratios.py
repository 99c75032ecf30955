"""From timed rounds to the numbers of the tables: plans, their work, how much faster is what."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from measure import Costs, median_ci, paired_ratio
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

Headline = Literal["cpu", "wall"]


class Sample:
    """Seconds of one iteration: its stages, scaled to all prompts."""

    def __init__(self, clock: Clock, scale: float) -> None:
        # the optimizer steps once, however many prompts there are
        factors = {stage: 1.0 if stage == "optimizer" else scale for stage in STAGES}
        taken = clock.cpu if clock_of(clock.device) == "cpu" else clock.wall
        self.split = {stage: factors[stage] * taken[stage] for stage in STAGES}
        self.cpu = sum(factors[stage] * clock.cpu[stage] for stage in STAGES)
        self.wall = sum(factors[stage] * clock.wall[stage] for stage in STAGES)


def clock_of(device: torch.device) -> Headline:
    """Returns the clock of the headline: CPU seconds on a CPU, whose wall time neighbours move."""
    return "wall" if device.type == "cuda" else "cpu"


def summary(samples: list[Sample], work: Work, clock: Headline = "cpu") -> dict[str, Any]:
    """Returns what the result file says of one plan; the interval is of the clock's seconds."""
    cpu, wall = ([getattr(sample, name) for sample in samples] for name in ("cpu", "wall"))
    return {
        "median_s": float(np.median(wall)),
        "cpu_s": float(np.median(cpu)),
        "ci95": median_ci(cpu if clock == "cpu" else wall),
        **work._asdict(),
        "split": {s: float(np.median([sample.split[s] for sample in samples])) for s in STAGES},
        "rounds_cpu_s": cpu,
        "rounds_wall_s": wall,
    }


def ratios(
    plans: dict[str, Any], costs: Costs, clock: Headline = "cpu", tape: int | None = None
) -> dict[str, Any]:
    """Returns "A/B": times B's time over A's, and what forwards and backwards alone predict.

    Args:
        plans: what `summary` says of each.
        costs: of model calls.
        clock: whose interval is given.
        tape: states whose graph was kept at most; None = all. The others cost a pair each.
    """
    units = {name: _units(name, plans[name], costs, tape) for name in plans}
    # what is required was set for the default benchmark on a CPU
    targets = targets_of(plans) if clock == "cpu" else {}
    found = {}
    for name in PAIRS:
        a, b = name.split("/")
        if a in plans and b in plans:
            cpu, cpu_ci95 = paired_ratio(plans[b]["rounds_cpu_s"], plans[a]["rounds_cpu_s"])
            wall, wall_ci95 = paired_ratio(plans[b]["rounds_wall_s"], plans[a]["rounds_wall_s"])
            found[name] = {
                "cpu": cpu,
                "wall": wall,
                "ci95": cpu_ci95 if clock == "cpu" else wall_ci95,
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


def _units(name: str, plan: dict[str, Any], costs: Costs, tape: int | None) -> float:
    forward, pair = (1.0, costs.pair) if PLANS[name].trains == "tape" else costs[1:]
    again = 0 if tape is None else max(plan["P"] - tape, 0)
    trained = {
        "edges": pair * plan["E"],
        "parents": pair * plan["P"],
        "tape": (pair - 1.0) * plan["P"] + again,
    }
    return forward * plan["F"] + trained[PLANS[name].trains]
