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
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.recipe import Recipe, Sigmas

BACKWARD = 2.0


class Tape(NamedTuple):
    """Which trained parents of an iteration need no training forward of their own."""

    covered: int
    """Parents of the first update whose rollout forward keeps its graph."""
    parents: int
    """All trained parents, once per update that has an edge of theirs."""


def tape_of(recipe: Recipe, plan: Plan) -> Tape:
    """Returns what an unlimited tape covers: nothing where another policy samples."""
    first = np.unique(plan.action[plan.trained(0)])
    covered = 0 if recipe.sampler_decay is not None else int(plan.evaluated[first].sum())
    return Tape(covered, plan.counts().trained_parents)


def asks_reference(recipe: Recipe) -> bool:
    """Tells whether every trained pass needs a forward of the reference policy."""
    return recipe.objective.kl > 0.0 or recipe.objective.anchor == "reference"


def other_forwards(recipe: Recipe, plan: Plan, trained: int) -> int:
    """Returns forwards without a gradient beside the rollout's own.

    They are the reference policy's, one per trained pass where there is a KL or a preference, and
    the old policy's at re-noised states of whom a later update asks.

    Args:
        recipe: its objective says which.
        plan: the trees.
        trained: passes with a gradient, parents or edges.
    """
    objective = recipe.objective
    asked = plan.train & plan.matching & ((plan.update > 0) | (recipe.sampler_decay is not None))
    old = int(asked.sum()) if objective.anchor == "policy" else 0
    return old + (trained if asks_reference(recipe) else 0)


class Work(NamedTuple):
    """One iteration's model passes, and what they come to in forwards."""

    counts: Counts
    others: int
    units: float


def shared_work(recipe: Recipe, plan: Plan) -> Work:
    """Returns the work of the engine with an unlimited tape."""
    counts, tape = plan.counts(), tape_of(recipe, plan)
    others = other_forwards(recipe, plan, tape.parents)
    training = BACKWARD * tape.parents + (tape.parents - tape.covered)
    return Work(counts, others, counts.forwards + others + training)


def chain_work(recipe: Recipe, plan: Plan) -> Work:
    """Returns the work of chains that share nothing, a forward and backward per trained edge."""
    chains = unshare(plan).plan
    counts = chains.counts()
    others = other_forwards(recipe, chains, counts.trained_edges)
    return Work(counts, others, counts.forwards + others + (1 + BACKWARD) * counts.trained_edges)


def _line(name: str, work: Work, unit: float) -> str:
    forwards, edges, parents, leaves = work.counts
    columns = (forwards, edges, parents, leaves, work.others)
    numbers = "".join(f"{value:>8}" for value in columns)
    return f"{name:<28}{numbers}{work.units:>9.0f}{work.units / unit:>8.2f}"


def plan_report(
    recipe: Recipe,
    sigmas: Sigmas,
    pruning: PruningConfig | None = None,
    *,
    seed: int = 0,
    iteration: int = 0,
    uid: int = 0,
) -> str:
    """Returns tree and counts of one prompt's plan, beside Flow-GRPO and DanceGRPO.

    Args:
        recipe: the method.
        sigmas: (T + 1,) schedule that the compared methods run on.
        pruning: of the run; its forecast is the last line.
        seed: of the run.
        iteration: of the run.
        uid: of the prompt.
    """
    where = {"seed": seed, "iteration": iteration}
    plan = recipe.plan([uid], **where)
    tape, work = tape_of(recipe, plan), shared_work(recipe, plan)
    lines = [
        draw(plan),
        "",
        f"{'per prompt':<28}{'F':>8}{'E':>8}{'P':>8}{'D':>8}{'other':>8}{'work':>9}{'ratio':>8}",
        _line(recipe.name, work, work.units),
        _line("  as independent chains", chain_work(recipe, plan), work.units),
    ]
    leaves, steps = work.counts.decodes, len(sigmas) - 2
    peers = {"flow_grpo": {}, "dance_grpo": {"fraction": max(0.6, 1.0 / steps)}}
    for name, options in peers.items():
        peer = recipes.build(name, sigmas, group=leaves, **options)
        other = peer.plan([uid], **where)
        lines += [
            _line(f"{name}, {leaves} leaves", shared_work(peer, other), work.units),
            _line("  as independent chains", chain_work(peer, other), work.units),
        ]
    later = tape.parents - tape.covered
    rest = f"; {later} need a training forward of their own" if later else ""
    return "\n".join(
        [
            *lines,
            "",
            "F forwards of the rollout, E trained edges, P trained parents, D decoded leaves,",
            "other = forwards of the reference (KL, preferences) and of old policies; work = F +",
            f"other + {BACKWARD:g} per backward + 1 per training forward; ratio: to this plan's.",
            "Chains share nothing, pay one forward and backward per edge, and have no tape.",
            f"The tape covers {tape.covered} of {tape.parents} trained parents in "
            f"{recipe.updates} update(s){rest}.",
            *([] if pruning is None else _forecast(pruning, recipe, plan)),
        ]
    )


def _forecast(pruning: PruningConfig, recipe: Recipe, plan: Plan) -> list[str]:
    """Returns what an unbiased rule leaves on average."""
    if not pruning.unbiased:
        return []
    tape = tape_of(recipe, plan)
    guess = pruning.rule == "threshold"
    kept = pruning.share * tape.parents
    # coins that fall after the rewards are too late for the tape
    again = kept - (0.0 if pruning.late else pruning.share * tape.covered)
    others = other_forwards(recipe, plan, round(kept))
    units = plan.counts().forwards + others + BACKWARD * kept + again
    return [
        f"Pruning ({pruning.rule}, rate {pruning.rate:g}) keeps {kept:.1f} of {tape.parents} "
        f"trained parents on average{', if advantages are normal' * guess}: work {units:.0f}."
    ]
