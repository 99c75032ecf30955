"""What a recipe costs, as text: its tree, its counts beside independent chains and known methods.

Work is counted in model forwards: a backward is two (full fine-tuning without checkpointing), and
a taped parent's training forward is the rollout's own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from branchcore import recipes
from branchcore.drawing import draw
from branchcore.passes import unshare
from branchcore.plan import Counts, Plan
from branchcore.recipes.recipe import Recipe, Sigmas

BACKWARD = 2.0


class Tape(NamedTuple):
    """Which trained parents of an iteration need no training forward of their own."""

    covered: int
    """Parents of the first update whose rollout forward keeps its graph."""
    parents: int
    """All trained parents, once per update that has an edge of theirs."""


def tape_of(plan: Plan) -> Tape:
    """Returns what an unlimited tape covers."""
    first = np.unique(plan.action[plan.trained(0)])
    return Tape(int(plan.evaluated[first].sum()), plan.counts().trained_parents)


def shared_work(plan: Plan) -> float:
    """Returns forwards of one iteration in the engine, with an unlimited tape."""
    tape = tape_of(plan)
    return plan.counts().forwards + BACKWARD * tape.parents + (tape.parents - tape.covered)


def chain_work(counts: Counts) -> float:
    """Returns forwards of one iteration with one forward and backward per trained edge."""
    return counts.forwards + (1.0 + BACKWARD) * counts.trained_edges


def _line(name: str, counts: Counts, work: float, unit: float) -> str:
    forwards, edges, parents, leaves = counts
    return (
        f"{name:<38}{forwards:>8}{edges:>8}{parents:>8}{leaves:>8}{work:>10.0f}{work / unit:>9.2f}"
    )


def plan_report(
    recipe: Recipe, sigmas: Sigmas, *, seed: int = 0, iteration: int = 0, uid: int = 0
) -> str:
    """Returns tree and counts of one prompt's plan, beside Flow-GRPO and DanceGRPO.

    Args:
        recipe: the method.
        sigmas: (T + 1,) schedule that the compared methods run on.
        seed: of the run.
        iteration: of the run.
        uid: of the prompt.
    """
    plan = recipe.plan([uid], seed=seed, iteration=iteration)
    counts, tape, work = plan.counts(), tape_of(plan), shared_work(plan)
    chains = unshare(plan).plan.counts()
    lines = [
        draw(plan),
        "",
        f"{'per prompt':<38}{'F':>8}{'E':>8}{'P':>8}{'D':>8}{'work':>10}{'ratio':>9}",
        _line(recipe.name, counts, work, work),
        _line("  as independent chains", chains, chain_work(chains), work),
    ]
    for name in ("flow_grpo", "dance_grpo"):
        if counts.decodes < 2:
            continue
        other = recipes.build(name, sigmas, group=counts.decodes)
        peer = other.plan([uid], seed=seed, iteration=iteration)
        single = unshare(peer).plan.counts()
        lines += [
            _line(f"{name}, {counts.decodes} leaves", peer.counts(), shared_work(peer), work),
            _line("  as independent chains", single, chain_work(single), work),
        ]
    later = tape.parents - tape.covered
    rest = f"; {later} need a training forward of their own" if later else ""
    return "\n".join(
        [
            *lines,
            "",
            "F forwards, E trained edges, P trained parents, D decoded leaves; work = F + "
            f"{BACKWARD:g} per backward + 1 per",
            "training forward (chains: one of each per edge); ratio = times the work of this plan.",
            f"The tape covers {tape.covered} of {tape.parents} trained parents in "
            f"{recipe.updates} update(s){rest}.",
        ]
    )
