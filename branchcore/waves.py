"""The model calls of a plan, level by level, with every index they need already on the device.

Letters: M rows of the plan, N nodes of a wave.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.forest import upload
from branchcore.packing import balanced_chunks
from branchcore.plan import Ints, Plan


class Chunk(NamedTuple):
    """One model call: some nodes of a wave, all on the tape or none."""

    nodes: Ints
    taped: bool
    rows: Tensor
    local: Tensor
    kept: Tensor
    kept_slots: Tensor


class Wave(NamedTuple):
    """One depth level with every index its step needs, already on the device."""

    lo: int
    hi: int
    kept: Tensor
    kept_slots: Tensor
    chunks: list[Chunk]


def waves_of(
    plan: Plan,
    slot: Ints,
    evaluated: NDArray[np.bool_],
    on_tape: NDArray[np.bool_],
    max_batch: int | None,
    device: torch.device | str,
) -> list[Wave]:
    """Returns the waves of a plan, their calls balanced, taped nodes apart from the others.

    Args:
        plan: the trees.
        slot: (M,) of the states that are kept, -1 elsewhere.
        evaluated: (M,) nodes that have a velocity.
        on_tape: (M,) nodes whose calls keep their graph.
        max_batch: rows of a call at most; None = a whole wave.
        device: where indices go.
    """
    arrays: list[Ints] = []
    shapes: list[tuple[int, int, list[tuple[Ints, bool]]]] = []
    for lo, hi in plan.levels():
        kept = np.flatnonzero(slot[lo:hi] >= 0)
        arrays += [kept, slot[lo + kept]]
        calls: list[tuple[Ints, bool]] = []
        nodes = lo + np.flatnonzero(evaluated[lo:hi])
        for taped in (False, True):
            part = nodes[on_tape[nodes] == taped]
            for first, last in balanced_chunks(len(part), max_batch):
                chunk = part[first:last]
                calls.append((chunk, taped))
                inner = np.flatnonzero(slot[chunk] >= 0)
                arrays += [chunk, chunk - lo, inner, slot[chunk[inner]]]
        shapes.append((lo, hi, calls))
    take = iter(upload(arrays, device)).__next__
    return [
        Wave(
            lo, hi, take(), take(), [Chunk(n, t, take(), take(), take(), take()) for n, t in calls]
        )
        for lo, hi, calls in shapes
    ]
