"""Closed forms of each plan's work per iteration, from leaves, steps and windows alone.

Letters: N leaves per prompt (per step on a trunk), T steps, n_i nodes of a tree at step i.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from workload import (
    ENGINE_TAIL,
    FACTORS,
    FLASH_RATIO,
    STRIDES,
    TREE_START,
    TRUNKS,
    WINDOW,
    Workload,
    window_start,
)

from branchcore import Plan


class Work(NamedTuple):
    """Model rows of the rollout, trained edges, distinct trained states, decodes."""

    F: int
    E: int
    P: int
    D: int


def closed_form(name: str, load: Workload, plan: Plan, prompts: int) -> Work:
    """Returns the work of a plan by counting rules that do not look at the trees.

    `dance` draws its trained steps, so that only its shared root needs the draw itself: of the
    chains that train step 0, sharing leaves one state per prompt.
    """
    N, T = load.leaves, load.steps
    base = name.removeprefix("exact:").removeprefix("steel:")
    shared = name.startswith("exact:") or name == "engine"
    if base == "dance":
        return _dance(N, T, plan, prompts, shared)
    splits = dict(zip(load.splits, FACTORS[N], strict=True))
    if base in ("flow", "guard"):
        work = Work(N * T, N * (T - 1), N * (T - 1), N)
    elif base == "mix":
        work = _window(N, T, T, shared)
    elif base == "flash":
        work = _window(N, T, window_start(T) + WINDOW + flash_tail(T), shared)
    elif base == "tree":
        work = _tree(T, {TREE_START + j: k for j, k in enumerate(FACTORS[N])})
    elif base == "tempflow":
        work = _tempflow(TRUNKS[N], N // TRUNKS[N], T)
    elif base == "g2rpo":
        work = _g2rpo(N, T, shared)
    elif base == "branch":
        # released: the dead edges of depth T too
        work = _tree(T, splits, range(T if name == "branch" else T - 1))
    elif base == "branch_mix":
        work = _tree(T, splits, [i for i in range(T - 1) if i < 4 or i in splits])
    else:
        first = max(splits) + 1
        work = _tree(first + engine_tail(T - first), splits)
    return Work(*(prompts * count for count in work))


def flash_tail(steps: int) -> int:
    """Returns MixGRPO-Flash's steps after its window, one at least."""
    last = window_start(steps) + WINDOW - 1
    return max(int((steps - last) * FLASH_RATIO) - 1, 1)


def engine_tail(steps: int) -> int:
    """Returns the steps that branchcore's recipe takes for the steps left after the last split."""
    return min(steps, max(2, math.ceil(steps * ENGINE_TAIL - 1e-9)))


def _dance(N: int, T: int, plan: Plan, prompts: int, shared: bool) -> Work:
    drawn = int(N * prompts * int(0.6 * (T - 1)))
    first = np.bincount(plan.prompt[plan.train & (plan.depth == 1)], minlength=prompts)
    forwards = prompts * (1 + N * (T - 1) if shared else N * T)
    return Work(forwards, drawn, drawn - int(np.maximum(first - 1, 0).sum()), prompts * N)


def _window(N: int, T: int, steps: int, shared: bool) -> Work:
    """Chains of `steps` forwards each, equal up to the window's first step."""
    common = 1 + window_start(T)
    forwards = common + N * (steps - common) if shared else N * steps
    return Work(forwards, N * WINDOW, 1 + N * (WINDOW - 1), N)


def _tree(steps: int, factors: dict[int, int], trained: Collection[int] | None = None) -> Work:
    """A tree with factors[i] children at step i; trained = its splits."""
    nodes = [1]
    for i in range(steps):
        nodes.append(nodes[-1] * factors.get(i, 1))
    trained = factors if trained is None else trained
    edges, parents = sum(nodes[i + 1] for i in trained), sum(nodes[i] for i in trained)
    return Work(sum(nodes[:steps]), edges, parents, nodes[-1])


def _tempflow(trunks: int, children: int, T: int) -> Work:
    """Child i has T - 1 - i steps to go, and no trunk state is forwarded in vain."""
    states = trunks * (T - 1)
    forwards = states + trunks * children * T * (T - 1) // 2
    return Work(forwards, states * children, states, states * children)


def _g2rpo(N: int, T: int, shared: bool) -> Work:
    """Tails of stride g from step k have ceil((T - k - 1) / g) steps, the first two in common."""
    starts = range(T // 2)
    tails = sum(-(-(T - k - 1) // g) for k in starts for g in STRIDES)
    decodes = N * len(starts) * len(STRIDES)
    if shared:
        common = 2 * (len(STRIDES) - 1) * len(starts)
        return Work(len(starts) + N * (tails - common), N * len(starts), len(starts), decodes)
    # the anchor to its end, decoded; its first half again for every child
    return Work(T + N * (len(starts) + tails), N * len(starts), len(starts), decodes + 1)
