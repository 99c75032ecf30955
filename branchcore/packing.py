"""What shares a model call: dense packs by tokens, even chunks, whole groups, whole taped parts.

Letters: M rows of the plan, N items or parents, E edges, P packs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from branchcore import _dispatch, reference
from branchcore.plan import Ints, Plan

WINDOW = 64
"""Candidates of a pack: enough for its density, few enough that a call keeps to few steps."""


class Packs(NamedTuple):
    """Items in packs: those of pack p are order[start[p]:start[p + 1]], as they joined."""

    order: Ints
    """(N,) all items, pack after pack."""
    start: Ints
    """(P + 1,) where each pack begins, and N."""

    def items(self) -> list[Ints]:
        """Returns the items of every pack."""
        return [self.order[lo:hi] for lo, hi in itertools.pairwise(self.start)]

    def density(self, lengths: Ints, capacity: int) -> float:
        """Returns the filled share of all packs; 1 without packs."""
        packs = len(self.start) - 1
        return float(np.sum(lengths)) / (capacity * packs) if packs else 1.0


def pack(lengths: Ints, capacity: int, window: int) -> Packs:
    """Packs items of different lengths densely, each pack beginning with the oldest that is left.

    The longest of the `window` oldest that still fits joins the open pack, the oldest of equals.
    These candidates are looked up anew when the oldest leaves, so that at most window - 1 younger
    items ever go before an item once it is the oldest. window = 1 keeps the order (next-fit).

    >>> from branchcore import packing
    >>> packs = packing.pack([5, 9, 3, 7, 2], capacity=10, window=3)
    >>> packs.order.tolist(), packs.start.tolist()
    ([0, 2, 1, 3, 4], [0, 2, 3, 5])

    Args:
        lengths: (N,) integers >= 0, oldest first; e.g. tokens.
        capacity: of a pack, at least every length.
        window: candidates, at least 1.

    Returns:
        Packs on the host; compiled and reference give the same.

    Raises:
        ValueError: an item is longer than a pack, or an argument is out of its range.
        TypeError: lengths are no integers.

    Source: Dense Prompt Packing of DPPO; see branchcore/reference/pack.py.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.dtype.kind not in "iu":
        raise TypeError(f"pack: lengths must be integers, got {lengths.dtype}")
    if lengths.ndim != 1:
        raise ValueError(f"pack: lengths must be (N,), got {lengths.shape}")
    for name, value in (("capacity", capacity), ("window", window)):
        if value < 1:
            raise ValueError(f"pack: {name} must be at least 1, got {value}")
    wrong = np.flatnonzero((lengths < 0) | (lengths > capacity))
    if len(wrong):
        raise ValueError(
            f"pack: lengths must be in [0, capacity={capacity}], got {lengths[wrong[0]]} at "
            f"{wrong[0]}; try a capacity of {lengths.max()}"
        )
    lengths = lengths.astype(np.int64)
    host = _dispatch.host()
    if host is None:
        packs = reference.pack(lengths.tolist(), capacity, window)
        flat = list(itertools.chain.from_iterable(packs))
        sizes = [len(items) for items in packs]
        return Packs(np.array(flat, dtype=np.int64), np.append(0, np.cumsum(sizes, dtype=np.int64)))
    order, start = np.empty(len(lengths), np.int64), np.empty(len(lengths) + 1, np.int64)
    given, out = torch.from_numpy(lengths), (torch.from_numpy(order), torch.from_numpy(start))
    count = host.pack(given, capacity, window, *out)
    return Packs(order, start[: count + 1])


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


def runs(sizes: Sequence[int], most: int | None) -> list[tuple[int, int]]:
    """Returns ranges of neighbours that together have at most `most` items, as long as they can be.

    >>> from branchcore.packing import runs
    >>> runs([1, 2, 4, 8], most=8)
    [(0, 3), (3, 4)]

    Args:
        sizes: of every neighbour; one that is too large stays alone.
        most: items of a range; None = one range.
    """
    ranges: list[tuple[int, int]] = []
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and most is not None and total + size > most:
            ranges.append((first, i))
            first, total = i, 0
        total += size
    return [*ranges, (first, len(sizes))] if len(sizes) else ranges


class TokenBudget(NamedTuple):
    """How long the rows of a plan are for the model, and what one call may hold."""

    tokens_M: Ints
    """(M,) tokens of every row, at least 1."""
    most: int
    """Tokens of a call at most."""
    mixed: bool
    """Whether rows of different length may share a call; else each length has its own."""


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
    budget: TokenBudget | None = None,
) -> list[MicroBatch]:
    """Packs the parents of kept edges, of all trees and steps: taped parts whole, the rest filled.

    Parents of equal length fill their calls evenly; different ones that may share a call are packed
    densely by `pack`.

    Args:
        plan: the trees.
        edges: (E,) kept trained edges, ascending.
        max_batch: parents per micro-batch at most, for those on no tape.
        parts: node sets whose velocities are on the tape, one micro-batch each.
        together_M: (M,) group of every edge; a group's edges stay in one micro-batch. Only for
            edges that are about their own node, which are on no tape.
        budget: tokens of a micro-batch at most, for parents on no tape; None = any.

    Raises:
        ValueError: max_batch is below 1 or the size of a group, or the budget below its tokens; or
            a group has rows that may not share a call.
    """
    owner = plan.action[edges]
    left = np.unique(owner)
    chosen: list[tuple[Ints, int, Ints]] = []
    for part, nodes in enumerate(parts):
        local = np.flatnonzero(np.isin(nodes, left))
        if len(local):
            chosen.append((nodes[local], part, local))
            left = np.setdiff1d(left, nodes)
    for nodes, most in _within(budget, left, together_M, max_batch):
        chunks = (
            [nodes[lo:hi] for lo, hi in balanced_chunks(len(nodes), most)]
            if together_M is None
            else _whole_groups(nodes, together_M[nodes], most)
        )
        chosen += [(chunk, -1, np.zeros(0, dtype=np.int64)) for chunk in chunks]
    batches: list[MicroBatch] = []
    for nodes, part, local in chosen:
        mine = edges[np.isin(owner, nodes)]
        start = np.searchsorted(plan.action[mine], np.append(nodes, len(plan)))
        batches.append(MicroBatch(nodes, mine, start, part, local))
    return batches


def _within(
    budget: TokenBudget | None, nodes: Ints, together_M: Ints | None, max_batch: int | None
) -> list[tuple[Ints, int | None]]:
    """Returns nodes that may share calls, each set with how many of them one call takes."""
    if budget is None or not len(nodes):
        return [(nodes, max_batch)]
    tokens = budget.tokens_M[nodes]
    group = np.arange(len(nodes)) if together_M is None else together_M[nodes]
    group = np.unique(group, return_inverse=True)[1].reshape(-1)
    length = np.zeros(int(group.max()) + 1, dtype=np.int64)
    np.add.at(length, group, tokens)
    if length.max() > budget.most:
        what = "a row" if together_M is None else "a whole group"
        raise ValueError(
            f"pack_parents: max_tokens must hold {what} of {length.max()}, got {budget.most}"
        )
    kinds = np.unique(tokens)
    if budget.mixed and len(kinds) > 1:
        packs = pack(length, budget.most, WINDOW).items()
        return [(nodes[np.isin(group, items)], max_batch) for items in packs]
    if len(np.unique(np.stack([group, tokens]), axis=1).T) > len(length):
        raise ValueError(
            "pack_parents: rows of one group must have one length to share a call, got several"
        )
    limits = [budget.most // int(kind) for kind in kinds]
    limits = [most if max_batch is None else min(most, max_batch) for most in limits]
    return [(nodes[tokens == kind], most) for kind, most in zip(kinds, limits, strict=True)]


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
