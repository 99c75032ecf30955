"""The time model: seconds of every stage of an iteration, from calls and their speed.

Letters: N rows of a call, P prompts of a round.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from branchcore.models.sizing.memory_need import Need, rollout_calls
from branchcore.packing import balanced_chunks, runs
from branchcore.plan import Ints, Plan
from branchcore.planner.engine import Overhead
from branchcore.planner.speed import STAGES, Speed
from branchcore.pruning import Pruning


def taped_nodes(need: Need) -> int | None:
    """Returns the nodes of a round that the trainer keeps on the tape; None = all."""
    config = need.config
    return 0 if need.lags else Pruning(config.prune, need.recipe, config.seed).tape(config.tape)


def rounds_of(need: Need) -> list[int]:
    """Returns the prompts of every round."""
    config = need.config
    parts = balanced_chunks(config.prompts_per_iteration, config.prompts_per_round)
    return [hi - lo for lo, hi in parts]


def stage_seconds(
    need: Need, speed: Speed, engine: Overhead, *, reduction: float = 0.0
) -> dict[str, float]:
    """Returns the seconds of every stage of `STAGES` in one iteration of one process.

    Args:
        need: of the run; its settings are all chosen.
        speed: of the model.
        engine: what else the engine does.
        reduction: seconds of communication.
    """
    seconds = dict.fromkeys(STAGES, 0.0)
    planned = 0
    for prompts, times in Counter(rounds_of(need)).items():
        plan = need.plan(prompts)
        part, parents = _round_seconds(need, plan, speed)
        planned += times * parents
        for stage, took in part.items():
            seconds[stage] += times * took
    # what a recipe prunes by the rewards has no backward
    steps = need.recipe.updates + need.config.fast_steps
    seconds["update"] *= min(1.0, engine.backwards / planned) if planned else 1.0
    prune = need.config.prune
    if prune.late and prune.unbiased:  # dropped before the rollout they are not in the plan
        seconds["update"] *= prune.share
    seconds["reduction"] = reduction
    seconds["rest"] = steps * speed.optimizer
    return {stage: took + engine.seconds.get(stage, 0.0) for stage, took in seconds.items()}


def _round_seconds(need: Need, plan: Plan, speed: Speed) -> tuple[dict[str, float], int]:
    """Returns seconds of rollout, decode, reward and update, and the parents of all passes."""
    config, rows = need.config, need.config.max_batch or len(plan)
    nodes = need.taped(plan)[: taped_nodes(need)]
    waves = [call for level in rollout_calls(plan, rows, nodes) for call in level.calls]
    rollout = sum((speed.tape_call if taped else speed.call).at(n) for n, taped in waves)
    rollout += speed.call.sum(_sizes(_stored_only(need, plan), rows))
    parts = [n for n, taped in waves if taped]
    updates = [_sizes(len(need.left(plan, u, nodes)), rows) for u in range(plan.num_updates)]
    inner = [_sizes(len(need.left(plan, 0, nodes[:0])), rows)] * config.fast_steps
    alone = [n for sizes in (*updates, *inner) for n in sizes]
    update = speed.tape_call.sum(alone) + speed.backward.sum([*alone, *parts])
    if need.recipe.objective.compares:
        shared = [sum(parts[i:j]) for i, j in runs(parts, rows)]
        update += speed.call.sum([*alone, *shared])
    leaves = int(plan.leaf.sum())
    most = min(rows, need.decode_batch or rows)
    found = {
        "rollout": rollout,
        "decode": speed.decode.sum(_split(leaves, most)),
        "reward": speed.reward.at(leaves),
        "update": update,
    }
    return found, sum(alone) + sum(parts)


def _sizes(count: int, rows: int) -> list[int]:
    return [hi - lo for lo, hi in balanced_chunks(count, rows)]


def _split(count: int, most: int) -> list[int]:
    return [most] * (count // most) + ([count % most] if count % most else [])


def _stored_only(need: Need, plan: Plan) -> int:
    """Returns nodes whose velocity is evaluated only because an update will ask for it."""
    if not need.stored:
        return 0
    asked: Ints = np.unique(plan.action[plan.train])
    return int((~plan.evaluated[asked]).sum())
