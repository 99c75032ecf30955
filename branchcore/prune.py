"""Edge weights that select what the backward pays for, and the packing of what is left.

A pruner returns (M,) float64 weights: 0 = dropped, 1 = kept. Pruning comes after credit: it never
changes rewards, statistics, advantages of kept edges, the rollout or the noise. The selectors here
drop gradient terms and are biased; the objective's normaliser stays the number of planned edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from branchcore.credit import Floats
from branchcore.plan import Ints, Plan


def keep_all(plan: Plan) -> Floats:
    """Returns weight 1 for every edge."""
    return np.ones(len(plan))


def last_split(plan: Plan) -> Ints:
    """Returns (M,) depth of the deepest split in each row's tree, -1 if none."""
    deepest = np.full(len(plan), -1)
    split = plan.num_children > 1
    np.maximum.at(deepest, plan.tree[split], plan.depth[split])
    return deepest[plan.tree]


def _chain_head(plan: Plan) -> Ints:
    """(M,) the child of the last split at or above every node, -1 above it and without a split."""
    split = last_split(plan)
    head = np.where((split >= 0) & (plan.depth == split + 1), np.arange(len(plan)), -1)
    for lo, hi in plan.levels()[1:]:
        above = head[plan.parent[lo:hi]]
        head[lo:hi] = np.where(above >= 0, above, head[lo:hi])
    return head


def parent_top1(plan: Plan, value_M: Floats) -> Floats:
    """Keeps, below the last split, only the better child's chain; both split edges stay.

    Args:
        plan: the trees.
        value_M: (M,) scalar value of every node; ties keep the first sibling.

    Source: BranchGRPO sec. 3 (width pruning, Parent-Top1). Biased.
    """
    head = _chain_head(plan)
    children = np.flatnonzero(head == np.arange(len(plan)))
    order = children[np.lexsort((children, -value_M[children], plan.parent[children]))]
    winner = np.zeros(len(plan), dtype=bool)
    winner[order[np.unique(plan.parent[order], return_index=True)[1]]] = True
    below = (head >= 0) & (head != np.arange(len(plan)))
    return np.where(below & ~winner[np.maximum(head, 0)], 0.0, 1.0)


def extremes(plan: Plan, value_M: Floats, *, share: float = 0.5, pool: str = "tree") -> Floats:
    """Keeps, below the last split, the chains with the best and the worst values.

    Args:
        plan: the trees.
        value_M: (M,) scalar value of every node.
        share: part of the chains that stays, half of it best, half worst; in (0, 1].
        pool: "tree" ranks within each tree; "call" over all prompts, as the released code does
            (a prompt can then lose everything).

    Source: BranchGRPO sec. 3 (width pruning, extremes), `width_pruning_mode=2`. Biased.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"extremes: share must be in (0, 1], got {share}")
    if pool not in ("tree", "call"):
        raise ValueError(f"extremes: pool must be 'tree' or 'call', got {pool!r}")
    head = _chain_head(plan)
    heads = np.flatnonzero(head == np.arange(len(plan)))
    group = plan.tree[heads] if pool == "tree" else np.zeros(len(heads), dtype=np.int64)
    kept = np.zeros(len(plan), dtype=bool)
    for g in np.unique(group):
        ranked = heads[group == g][np.argsort(-value_M[heads[group == g]], kind="stable")]
        keep = min(len(ranked), max(2, int(len(ranked) * share)))
        kept[ranked[: keep // 2]] = True
        kept[ranked[len(ranked) - (keep - keep // 2) :]] = True
    below = (head >= 0) & (head != np.arange(len(plan)))
    return np.where(below & ~kept[np.maximum(head, 0)], 0.0, 1.0)


def first_steps(plan: Plan, *, share: float = 0.5) -> Floats:
    """Keeps, below the last split, the first steps of every chain.

    This is what BranchGRPO's released code does under the name of width pruning, mode 1: a chain's
    edges have equal advantages, so its stable sort keeps the first half. Biased.

    Args:
        plan: the trees.
        share: part of a chain's trained steps that stays, at least one step; in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"first_steps: share must be in (0, 1], got {share}")
    split = last_split(plan)
    past = np.where(split >= 0, plan.depth - split - 1, 0)
    longest = np.zeros(len(plan), dtype=np.int64)
    np.maximum.at(longest, plan.tree, np.where(plan.train, past, 0))
    kept = np.maximum(1, (longest * share).astype(np.int64))[plan.tree]
    return np.where(past > kept, 0.0, 1.0)


def depth_window(plan: Plan, depths: Ints) -> Floats:
    """Drops the edges whose child depth is in `depths`.

    Source: BranchGRPO sec. 3 (depth pruning). Biased.
    """
    return np.where(np.isin(plan.depth, np.asarray(depths)), 0.0, 1.0)


def slide(
    depths: Ints, iteration: int, *, interval: int, stop: int, towards_leaves: bool = False
) -> Ints:
    """Returns the depth window of an iteration: moved by one depth every `interval` iterations.

    Args:
        depths: child depths pruned at first.
        iteration: from 0; the window first moves at iteration interval - 1, since the released
            code counts from 1.
        interval: iterations per move; 30 in BranchGRPO.
        stop: the shallowest depth of the window never passes it (towards the root, the released
            code), or the deepest (towards the leaves, the paper).
        towards_leaves: direction of the paper.
    """
    if interval < 1:
        raise ValueError(f"slide: interval must be at least 1, got {interval}")
    depths = np.asarray(depths, dtype=np.int64)
    room = stop - int(depths.max()) if towards_leaves else int(depths.min()) - stop
    shift = min((iteration + 1) // interval, max(0, room))
    return depths + (shift if towards_leaves else -shift)


def balanced_chunks(count: int, max_batch: int | None) -> list[tuple[int, int]]:
    """Returns ranges over `count` items in the fewest chunks of at most max_batch, evenly filled.

    24 items at 16 make 12 + 12, not 16 + 8.

    Raises:
        ValueError: max_batch below 1.
    """
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"balanced_chunks: max_batch must be at least 1, got {max_batch}")
    if count == 0:
        return []
    chunks = 1 if max_batch is None else -(-count // max_batch)
    bounds = [count * i // chunks for i in range(chunks + 1)]
    return list(itertools.pairwise(bounds))


class MicroBatch(NamedTuple):
    """Parents of one forward and backward, of any steps and trees, with all their kept edges."""

    nodes: Ints
    """(N,) parents, ascending rows of the plan."""
    edges: Ints
    """(E,) their kept edges, grouped by parent."""
    child_start: Ints
    """(N + 1,) edges of parent n are edges[child_start[n]:child_start[n + 1]]."""
    part: int
    """Which taped part holds the parents' velocities, -1 = none."""
    local: Ints
    """(N,) rows in that part; empty without one."""


def pack_parents(
    plan: Plan,
    edges: Ints,
    max_batch: int | None,
    parts: Sequence[Ints] = (),
    together_M: Ints | None = None,
) -> list[MicroBatch]:
    """Packs the parents of kept edges: taped parts whole, the rest evenly filled.

    Args:
        plan: the trees.
        edges: (E,) kept trained edges, ascending.
        max_batch: parents per micro-batch at most, for those on no tape.
        parts: node sets whose velocities are on the tape, one micro-batch each.
        together_M: (M,) group of every edge; a group's edges stay in one micro-batch. Only for
            edges that are about their own node, which are on no tape.

    Raises:
        ValueError: max_batch is below 1 or the size of a group.
    """
    owner = plan.action[edges]
    left = np.unique(owner)
    chosen: list[tuple[Ints, int, Ints]] = []
    for part, nodes in enumerate(parts):
        local = np.flatnonzero(np.isin(nodes, left))
        if len(local):
            chosen.append((nodes[local], part, local))
            left = np.setdiff1d(left, nodes)
    chunks = (
        [left[lo:hi] for lo, hi in balanced_chunks(len(left), max_batch)]
        if together_M is None
        else _whole_groups(left, together_M[left], max_batch)
    )
    chosen += [(chunk, -1, np.zeros(0, dtype=np.int64)) for chunk in chunks]
    batches: list[MicroBatch] = []
    for nodes, part, local in chosen:
        mine = edges[np.isin(owner, nodes)]
        start = np.searchsorted(plan.action[mine], np.append(nodes, len(plan)))
        batches.append(MicroBatch(nodes, mine, start, part, local))
    return batches


def check_groups(plan: Plan, together: Sequence[str], max_batch: int | None) -> None:
    """Raises ValueError unless max_batch holds every group of edges that must stay whole."""
    if together and max_batch is not None:
        largest = int(np.bincount(plan.group(together)[plan.trained()]).max(initial=0))
        if largest > max_batch:
            raise ValueError(
                f"collect: max_batch must hold a whole group of {largest}, got {max_batch}; the "
                f"objective couples all edges of equal {' and '.join(together)}"
            )


def _whole_groups(nodes: Ints, group: Ints, max_batch: int | None) -> list[Ints]:
    """Fills chunks of at most max_batch with whole groups, in order."""
    chunks: list[Ints] = []
    open_chunk: list[Ints] = []
    for g in np.unique(group):
        mine = nodes[group == g]
        if max_batch is not None and len(mine) > max_batch:
            raise ValueError(
                f"pack_parents: max_batch must hold a whole group of {len(mine)}, got {max_batch}"
            )
        if max_batch is not None and sum(map(len, open_chunk)) + len(mine) > max_batch:
            chunks.append(np.sort(np.concatenate(open_chunk)))
            open_chunk = []
        open_chunk.append(mine)
    return [*chunks, np.sort(np.concatenate(open_chunk))] if open_chunk else chunks
