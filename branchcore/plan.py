"""The one table that every method becomes: a node and the edge into it are one row.

Letters: M nodes = edges, N evaluated nodes, E trained edges, L leaves. Rows are sorted by parent,
which makes every depth level, every wave and every set of siblings a slice. `tree.Tree` builds a
plan, `passes` rewrites one, `rollout` runs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore._plan_checks import check_plan

Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]
_DTYPES = {
    "parent": np.int32,
    "sigma": np.float64,
    "row": np.float64,
    "older": np.float64,
    "stream": np.int32,
    "mix": np.float64,
    "leaf": np.bool_,
    "train": np.bool_,
    "prompt": np.int32,
    "label": np.int32,
    "update": np.int32,
}


class Counts(NamedTuple):
    """Work of a plan, over all its prompts (F, E, P, D)."""

    forwards: int
    trained_edges: int
    trained_parents: int
    decodes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """All trees of a call as M rows; row i is node i and the edge into it."""

    parent: NDArray[np.int32]
    """(M,) node the edge comes from, -1 = root; sorted, and parent[i] < i."""
    sigma: NDArray[np.float64]
    """(M,) noise level of the node, in [0, 1]."""
    row: NDArray[np.float64]
    """(M, 4) coefficients (a, b, c, s) of `y = a x + b v + c h + s eps`; see `steps`."""
    older: NDArray[np.float64]
    """(M,) coefficient d of third-order solvers: of the x0 prediction one level above h."""
    stream: NDArray[np.int32]
    """(M, 2) noise streams within the prompt: own, shared with siblings; -1 = none."""
    mix: NDArray[np.float64]
    """(M, 2) weights: eps = mix0 * normal(own) + mix1 * normal(shared)."""
    leaf: NDArray[np.bool_]
    """(M,) decoded and scored; may still have children."""
    train: NDArray[np.bool_]
    """(M,) the edge is a trained term of the objective."""
    prompt: NDArray[np.int32]
    """(M,) index into the call's prompts."""
    label: NDArray[np.int32]
    """(M,) free integer of the recipe, on leaves and trained edges; a column for grouping."""
    update: NDArray[np.int32]
    """(M,) which optimizer update of the iteration uses the trained edge."""

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def level_start(self) -> Ints:
        """(W + 1,) first row of every depth level; level w is level_start[w]:level_start[w + 1]."""
        starts = [0, int(np.searchsorted(self.parent, 0))]
        while starts[-1] < len(self):
            starts.append(int(np.searchsorted(self.parent, starts[-1])))
        return np.asarray(starts if len(self) else [0], dtype=np.int64)

    @cached_property
    def depth(self) -> Ints:
        """(M,) number of edges from the root."""
        return np.repeat(np.arange(len(self.level_start) - 1), np.diff(self.level_start))

    @cached_property
    def child_start(self) -> Ints:
        """(M + 1,) children of node i are rows child_start[i]:child_start[i + 1]."""
        return np.searchsorted(self.parent, np.arange(len(self) + 1)).astype(np.int64)

    @cached_property
    def num_children(self) -> Ints:
        """(M,) children of every node."""
        return np.diff(self.child_start)

    @cached_property
    def tree(self) -> Ints:
        """(M,) the root above every node."""
        root = np.arange(len(self))
        for lo, hi in self.levels()[1:]:
            root[lo:hi] = root[self.parent[lo:hi]]
        return root

    @cached_property
    def history(self) -> NDArray[np.bool_]:
        """(M,) the edge reads the x0 prediction of its parent's parent (c or d != 0)."""
        return (self.row[:, 2] != 0.0) | (self.older != 0.0)

    @cached_property
    def stochastic(self) -> NDArray[np.bool_]:
        """(M,) edges (not roots) that draw noise."""
        return (self.row[:, 3] > 0.0) & (self.parent >= 0)

    @cached_property
    def evaluated(self) -> NDArray[np.bool_]:
        """(M,) nodes whose velocity somebody reads: one model evaluation each."""
        needed = np.zeros(len(self), dtype=bool)
        inner = self.parent >= 0
        needed[self.parent[inner & (self.row[:, 1] != 0.0)]] = True
        needed[self.parent[self.parent[inner & self.history]]] = True
        needed[self.parent[self.parent[self.parent[inner & (self.older != 0.0)]]]] = True
        return needed

    @cached_property
    def matching(self) -> NDArray[np.bool_]:
        """(M,) edges that do not read the velocity (b = 0), re-noised states: not roots."""
        return (self.row[:, 1] == 0.0) & (self.parent >= 0)

    @cached_property
    def action(self) -> Ints:
        """(M,) node whose velocity a trained edge is about: its parent, or itself where b = 0."""
        own = self.matching | (self.parent < 0)
        return np.where(own, np.arange(len(self)), self.parent)

    @cached_property
    def leaves_below(self) -> Ints:
        """(M,) leaves at or below every node."""
        count = self.leaf.astype(np.int64)
        for lo, hi in self.levels()[:0:-1]:
            np.add.at(count, self.parent[lo:hi], count[lo:hi])
        return count

    @property
    def num_prompts(self) -> int:
        """Prompts of the call."""
        return int(self.prompt.max()) + 1 if len(self) else 0

    @property
    def num_updates(self) -> int:
        """Optimizer updates of one iteration."""
        return int(self.update[self.train].max()) + 1 if self.train.any() else 1

    def levels(self) -> list[tuple[int, int]]:
        """Returns the row range of every depth, root level first."""
        starts = self.level_start.tolist()
        return list(itertools.pairwise(starts))

    def trained(self, update: int | None = None) -> Ints:
        """Returns the trained edges, all or those of one optimizer update."""
        return np.flatnonzero(
            self.train if update is None else self.train & (self.update == update)
        )

    def counts(self) -> Counts:
        """Returns the work of the plan; a parent counts once per update with an edge of it."""
        edges = self.trained()
        pairs = np.stack([self.action[edges], self.update[edges]])
        return Counts(
            forwards=int(self.evaluated.sum()),
            trained_edges=len(edges),
            trained_parents=np.unique(pairs, axis=1).shape[1],
            decodes=int(self.leaf.sum()),
        )

    def group(self, columns: Sequence[str]) -> Ints:
        """Returns (M,) group numbers of rows that agree in all named columns.

        Args:
            columns: fields or derived integer columns, e.g. ("prompt",) or ("tree", "depth").

        Raises:
            ValueError: an unknown column.
        """
        known = ("prompt", "tree", "depth", "parent", "label", "update")
        for name in columns:
            if name not in known:
                raise ValueError(f"group: columns must be from {known}, got {name!r}")
        keys = np.stack([np.asarray(getattr(self, name)) for name in columns], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)

    def select(self, prompts: Sequence[int]) -> Plan:
        """Returns the plan of some prompts, renumbered 0..len(prompts) - 1 in the given order."""
        chosen = np.asarray(prompts, dtype=np.int64)
        distinct = len(np.unique(chosen)) == len(chosen) > 0
        if not distinct or chosen.min() < 0 or chosen.max() >= self.num_prompts:
            raise ValueError(
                f"select: prompts must be distinct in 0..{self.num_prompts - 1}, got {prompts}"
            )
        rank = np.full(self.num_prompts, -1)
        rank[chosen] = np.arange(len(chosen))
        return self.take(np.flatnonzero(rank[self.prompt] >= 0), prompt=rank[self.prompt])

    def take(self, rows: Ints, **replaced: NDArray[Any]) -> Plan:
        """Returns the plan of some rows (closed under parents), sorted; columns may be replaced."""
        columns = columns_of(self) | replaced
        where = np.full(len(self) + 1, -1)
        where[rows] = np.arange(len(rows))
        chosen = {name: column[rows] for name, column in columns.items()}
        chosen["parent"] = where[chosen["parent"]]
        return from_columns(chosen).plan

    def validate(self, *, noisy_leaves: bool = False) -> Plan:
        """Checks every invariant and returns the plan; the error names the first bad row.

        Args:
            noisy_leaves: allow leaves at sigma > 0.

        Raises:
            ValueError: the plan cannot run.
        """
        check_plan(self, noisy_leaves)
        return self


class Rewritten(NamedTuple):
    """A plan and, for each of its rows, the row of the plan it was made from."""

    plan: Plan
    origin: Ints


def column_names() -> tuple[str, ...]:
    """Returns the names of a plan's columns."""
    return tuple(_DTYPES)


def columns_of(plan: Plan) -> Columns:
    """Returns the plan's arrays by name."""
    return {name: getattr(plan, name) for name in _DTYPES}


def from_columns(columns: Columns) -> Rewritten:
    """Sorts rows given in any order with parents before children (-1 = root) into a plan."""
    parent = np.asarray(columns["parent"], dtype=np.int64)
    order = _breadth_first(parent, np.asarray(columns["prompt"]))
    rank = np.empty(len(order) + 1, dtype=np.int64)
    rank[order], rank[-1] = np.arange(len(order)), -1
    moved = {name: np.asarray(columns[name])[order].astype(t) for name, t in _DTYPES.items()}
    moved["parent"] = rank[parent[order]].astype(np.int32)
    return Rewritten(Plan(**moved), order)  # pyright: ignore[reportArgumentType]


def _breadth_first(parent: Ints, prompt: NDArray[np.generic]) -> Ints:
    depth, left = np.full(len(parent), -1), np.arange(len(parent))
    rank = np.zeros(len(parent), dtype=np.int64)
    order: list[Ints] = []
    while len(left):
        above = parent[left]
        ready = (above < 0) if not order else (depth[above] == len(order) - 1) & (above >= 0)
        level = left[ready]
        first = prompt[level] if not order else rank[parent[level]]
        level = level[np.argsort(first, kind="stable")]
        depth[level], rank[level] = len(order), np.arange(len(level))
        order.append(level)
        left = left[~ready]
    return np.concatenate(order) if order else np.zeros(0, dtype=np.int64)
