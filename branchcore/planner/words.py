"""Says what a plan is, in one paragraph and a small table."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from branchcore.models.commands.flow_task import PLANNED
from branchcore.packing import balanced_chunks
from branchcore.planner.forecast import Forecast, tape_rows
from branchcore.planner.solve import Planned, memory_of
from branchcore.planner.speed import STAGES
from branchcore.planner.times import rounds_of

WIDTH = 108
"""Columns of the text at most."""
_WORK = {
    "rollout": "model calls without and with a graph, noise, steps",
    "decode": "latents to images",
    "reward": "scores",
    "update": "forwards that are on no tape, backwards",
    "reduction": "communication",
    "rest": "credit, optimizer, averages, log",
}
_PEAKS = {
    "rollout": "rollout",
    "decode": "decoding",
    "update": "gradient",
    "rest": "optimizer step",
}


def number(count: float, what: str) -> str:
    """Returns a count with its noun."""
    return f"{count:,.0f} {what}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Returns bytes in the unit that suits."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds(count: float) -> str:
    """Returns seconds with as many digits as mean something."""
    if count >= 120:
        return f"{count / 60:.1f} min"
    return f"{count:.1f} s" if count >= 10 else f"{count:.2g} s" if count >= 1 else f"{count:.3f} s"


def paragraph(planned: Planned) -> str:
    """Says what one iteration does."""
    config, local, counts = planned.config, planned.local, planned.counts
    total, gpus = config.prompts_per_iteration, planned.request.gpus
    leaves = counts.decodes / local.prompts_per_iteration
    rounds, taped = rounds_of(planned.need), tape_rows(planned.need)
    calls = micro_batches(planned)
    place = "" if gpus == 1 else f", {local.prompts_per_iteration} on each of {gpus} GPUs at most"
    idle = gpus - total if gpus > total else 0
    updates = planned.recipe.updates
    memory = planned.memory
    parts = [
        f"One iteration of {planned.recipe.name} takes {number(total, 'prompt')}{place} and grows "
        f"{leaves:.0f} images from each.",
        f"{number(idle, 'GPU')} of {gpus} would have no prompt." if idle else "",
        f"It does so in {number(len(rounds), 'round')} of up to {number(max(rounds), 'prompt')}, "
        f"with at most {number(local.max_batch or 0, 'row')} in a call of the model: "
        f"{number(counts.forwards, 'row')} of rollout for {number(counts.decodes, 'image')} to "
        f"decode and score.",
        f"{number(counts.trained_parents, 'parent')} with {number(counts.trained_edges, 'edge')} "
        f"are trained; {taped} of a round's {memory.trained} keep their graph from the rollout, "
        + ("so none is computed twice." if taped == memory.trained else "the others run again."),
        f"Gradients of {number(calls, 'micro-batch').replace('batchs', 'batches')} add up before "
        f"{'the' if updates == 1 else 'each of ' + str(updates)} optimizer "
        f"step{'' if updates == 1 else 's'}.",
        f"{planned.spread.words()}.",
    ]
    return " ".join(part for part in parts if part)


def micro_batches(planned: Planned) -> int:
    """Returns the backwards whose gradients add up for one optimizer step."""
    need, count = planned.need, 0
    rows = need.config.max_batch
    for prompts in rounds_of(need):
        plan = need.plan(prompts)
        nodes = need.taped(plan)[: need.config.tape]
        left = need.left(plan, 0, nodes)
        count += len(balanced_chunks(len(left), rows))
        for lo, hi in plan.levels():
            on_tape = int(((nodes >= lo) & (nodes < hi)).sum())
            count += len(balanced_chunks(on_tape, rows))
    return count


def table(planned: Planned, found: Forecast) -> str:
    """Returns time and memory of every stage."""
    lines = [f"{'stage':<11}{'time':>10}{'share':>8}{'memory':>12}  what"]
    for stage in STAGES:
        took = found.seconds[stage]
        if stage == "reduction" and planned.request.gpus == 1:
            continue
        peak = found.phases.get(_PEAKS.get(stage, ""), None)
        memory = "" if peak is None else size(peak)
        unknown = stage == "reward" and planned.subject.reward is None
        time = "not known" if unknown else seconds(took)
        share = "" if unknown else f"{took / found.total:.0%}"
        lines.append(f"{stage:<11}{time:>10}{share:>8}{memory:>12}  {_WORK[stage]}")
    lines.append(f"{'iteration':<11}{seconds(found.total):>10}{'':>8}{size(found.peak):>12}")
    return "\n".join(lines)


def settings(planned: Planned) -> str:
    """Returns what `train` has to be given so that it does this."""
    chosen = [
        f"--set {name}={getattr(planned.config, name)}"
        for name in PLANNED
        if name not in planned.request.fields
    ]
    way, given = planned.spread.config, planned.request.parallel
    chosen += [f"--parallel {way.kind}"] if way.kind != "auto" and "kind" not in given else []
    flags = ("reshard", "offload")
    chosen += [f"--{name}" for name in flags if getattr(way, name) and name not in given]
    return " ".join(chosen) or "nothing was left open"


def report(planned: Planned, found: Forecast) -> str:
    """Returns the whole of it."""
    budget, limit = memory_of(planned.request), planned.memory.limit
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    none, _, rest = limit.partition("none: ")
    limit = f"{rest.capitalize()}" if not none and rest else f"What more would change: {limit}"
    return "\n".join(
        [
            textwrap.fill(paragraph(planned), width),
            "",
            table(planned, found),
            "",
            textwrap.fill(
                f"Memory: {size(found.peak)} of {size(budget)}, a tenth of which stays free. "
                f"{limit}.",
                width,
            ),
            textwrap.fill(found.source, width),
            f"Chosen, for train: {settings(planned)}",
        ]
    )


def comparison(rows: Sequence[tuple[Planned, Forecast]]) -> str:
    """Returns recipes beside each other."""
    lines = [f"{'recipe':<20}{'images':>8}{'rows':>8}{'trained':>9}{'time':>10}{'memory':>12}"]
    for planned, found in rows:
        counts = planned.counts
        lines.append(
            f"{planned.recipe.name:<20}{counts.decodes:>8}{counts.forwards:>8}"
            f"{counts.trained_parents:>9}{seconds(found.total):>10}{size(found.peak):>12}"
        )
    return "\n".join([*lines, "images, rows, trained parents: of one GPU's iteration"])
