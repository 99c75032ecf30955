"""Grows the plan of one prompt, step by step; every call takes and returns arrays of node ids.

A recipe writes its tree as literally as its paper says; sharing equal nodes and dropping dead ones
is `plan()`'s business, not the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from branchcore.passes import prune_dead, share
from branchcore.plan import Columns, Ints, Plan, column_names, from_columns
from branchcore.steps import Row, Step


class Tree:
    """Builder of one prompt's plan: roots, then edges, then leaves.

    >>> import branchcore as bc
    >>> t = bc.Tree()
    >>> x = t.grow(t.roots(1), 0.5, bc.steps.dance_sde(0.3), children=4, train=True)
    >>> leaves = t.leaf(t.grow(x, 0.0, bc.steps.euler))
    >>> plan = t.plan()
    >>> print(bc.draw(plan))
    9 nodes, 5 forwards, 4 trained edges of 1 parents, 4 leaves
    o 1
    `- 4 of ~* 0.5
       `- - 0 leaf
    """

    def __init__(self) -> None:
        self._blocks: list[Columns] = []
        self._parent = np.zeros(0, dtype=np.int64)
        self._sigma = np.zeros(0)
        self._follows = np.zeros(0, dtype=bool)
        self._leaf: dict[int, int] = {}
        self._streams = 0

    def roots(self, num_roots: int, *, same_noise: bool = False) -> Ints:
        """Adds root nodes of pure noise at sigma = 1.

        Args:
            num_roots: how many.
            same_noise: all from one noise stream; `share` then merges what stays equal.

        Returns:
            (num_roots,) node ids.
        """
        if num_roots < 1:
            raise ValueError(f"roots: num_roots must be at least 1, got {num_roots}")
        own = self._new_streams(1).repeat(num_roots) if same_noise else self._new_streams(num_roots)
        return self._add(np.full(num_roots, -1), 1.0, [(0.0, 0.0, 0.0, 1.0)], own)

    def given(self, num_roots: int, sigma: float) -> Ints:
        """Adds root nodes whose states the caller hands to `rollout(given=...)`.

        Args:
            num_roots: how many; the j-th takes given[prompt, j], counted over all calls.
            sigma: their noise level.
        """
        rows = np.arange(num_roots) + sum(
            int((b["parent"] < 0).sum()) for b in self._blocks if not b["row"].any()
        )
        return self._add(np.full(num_roots, -1), sigma, [(0.0, 0.0, 0.0, 0.0)], rows)

    def grow(
        self,
        x: ArrayLike,
        sigma: float | ArrayLike,
        step: Step,
        *,
        children: int = 1,
        same_noise: bool = False,
        correlate: float | None = None,
        amplify: float | None = None,
        train: bool | ArrayLike = False,
        label: int = 0,
        update: int | ArrayLike = 0,
    ) -> Ints:
        """Adds edges from every node of x to new nodes at `sigma`.

        Args:
            x: (n,) node ids, their noise levels may differ.
            sigma: noise level of the children, one or one per node of x.
            step: the solver; its row decides whether the edge is stochastic.
            children: per node.
            same_noise: all nodes of x draw the same noise, child by child.
            correlate: s of the normalised sibling mixture (s own + shared) / sqrt(1 + s^2);
                siblings then have correlation 1 / (1 + s^2). Source: BranchGRPO sec. 2.1.
            amplify: c; noise c * own while the row keeps its s, as BranchGRPO's released code
                samples (its log-prob is that of c = 1).
            train: one flag or one per child, (n * children,).
            label: recipe's integer on these edges.
            update: optimizer update that uses them, one or one per child.

        Returns:
            (n * children,) ids, siblings contiguous.
        """
        x = np.atleast_1d(np.asarray(x, dtype=np.int64))
        if children < 1:
            raise ValueError(f"grow: children must be at least 1, got {children}")
        if correlate is not None and amplify is not None:
            raise ValueError("grow: correlate and amplify must not be given together")
        levels = np.broadcast_to(np.asarray(sigma, dtype=np.float64), x.shape)
        rows = self._rows(x, levels, step).repeat(children, 0)
        parent, row = x.repeat(children), rows[:, :4]
        noisy = row[:, 3] > 0.0
        own, shared = np.full(len(parent), -1), np.full(len(parent), -1)
        if same_noise:
            own = np.where(noisy, np.tile(self._new_streams(children), len(x)), -1)
        else:
            own[noisy] = self._new_streams(int(noisy.sum()))
        mix = np.where(noisy[:, None], (1.0 if amplify is None else float(amplify), 0.0), 0.0)
        if correlate is not None:
            if not correlate >= 0.0:
                raise ValueError(f"grow: correlate must be >= 0, got {correlate}")
            shared = np.where(noisy, self._new_streams(len(x)).repeat(children), -1)
            scale = 1.0 / math.sqrt(1.0 + correlate**2)
            mix = np.where(noisy[:, None], (correlate * scale, scale), 0.0)
        return self._add(
            parent,
            levels.repeat(children),
            row,
            own,
            older=rows[:, 4],
            shared=shared,
            mix=mix,
            train=train,
            label=label,
            update=update,
        )

    def chain(
        self,
        x: ArrayLike,
        sigmas: Sequence[float],
        step: Step,
        *,
        train: bool | ArrayLike = False,
        update: int | ArrayLike = 0,
    ) -> Ints:
        """Grows x along a list of sigmas, one child a step; an empty list returns x."""
        x = np.atleast_1d(np.asarray(x, dtype=np.int64))
        for sigma in sigmas:
            x = self.grow(x, sigma, step, train=train, update=update)
        return x

    def leaf(self, x: ArrayLike, label: int = 0) -> Ints:
        """Marks nodes as decoded and scored; returns them."""
        x = np.atleast_1d(np.asarray(x, dtype=np.int64))
        self._leaf.update(dict.fromkeys(x.tolist(), label))
        return x

    def deal_updates(self, num_updates: int, rng: np.random.Generator) -> None:
        """Deals all trained edges out at random, equally, to optimizer updates.

        Source: BranchGRPO's released loop, which steps every 12 edges of a shuffled list.
        """
        train = np.concatenate([block["train"] for block in self._blocks])
        update = np.zeros(len(train), dtype=np.int64)
        count = int(train.sum())
        if not 1 <= num_updates <= count:
            raise ValueError(
                f"deal_updates: num_updates must be in 1..{count}, the trained edges of a tree, "
                f"got {num_updates}"
            )
        update[train] = rng.permutation(np.arange(count) * num_updates // count)
        bounds = np.cumsum([len(block["train"]) for block in self._blocks])[:-1]
        for block, part in zip(self._blocks, np.split(update, bounds), strict=True):
            block["update"] = part

    def plan(self, *, merge: bool = True, noisy_leaves: bool = False) -> Plan:
        """Returns the validated plan: sorted, dead nodes dropped, equal nodes merged.

        Args:
            merge: merge nodes that are equal by construction (`passes.share`).
            noisy_leaves: allow leaves at sigma > 0.

        Raises:
            ValueError: the tree cannot run; the message names the first bad row.
        """
        if not self._blocks:
            raise ValueError("plan: the tree must have nodes, got none; try Tree.roots")
        columns = {n: np.concatenate([b[n] for b in self._blocks]) for n in column_names()}
        leaves = np.fromiter(self._leaf, dtype=np.int64, count=len(self._leaf))
        if not len(leaves):
            raise ValueError("plan: the tree must have leaves, got none; try Tree.leaf")
        columns["leaf"][leaves] = True
        columns["label"][leaves] = list(self._leaf.values())
        plan = prune_dead(from_columns(columns).plan)
        return (share(plan) if merge else plan).validate(noisy_leaves=noisy_leaves)

    def _rows(self, x: Ints, sigma: NDArray[np.float64], step: Step) -> NDArray[np.float64]:
        """Returns (n, 5) rows of the edges from x; equal steps are computed once."""
        known: dict[tuple[float, ...], Row] = {}
        rows: list[Row] = []
        for node, level in zip(x.tolist(), sigma.tolist(), strict=True):
            path = self._path(node)
            key = (level, *path)
            if key not in known:
                known[key] = step(path[1:], path[0], level)
            rows.append(known[key])
        return np.reshape([(*row, 0.0)[:5] for row in rows], (-1, 5))

    def _path(self, node: int) -> list[float]:
        """Returns the noise levels of a node and up to two above, as far as one velocity's path."""
        levels: list[float] = []
        while node >= 0 and len(levels) < 3:
            levels.append(float(self._sigma[node]))
            node = int(self._parent[node]) if self._follows[node] else -1
        return levels

    def _new_streams(self, count: int) -> Ints:
        self._streams += count
        return np.arange(self._streams - count, self._streams)

    def _add(
        self,
        parent: Ints,
        sigma: float | ArrayLike,
        row: ArrayLike,
        own: Ints,
        *,
        older: ArrayLike = 0.0,
        shared: ArrayLike = -1,
        mix: ArrayLike | None = None,
        train: bool | ArrayLike = False,
        label: int = 0,
        update: int | ArrayLike = 0,
    ) -> Ints:
        n, first = len(parent), len(self._parent)
        row = np.broadcast_to(np.asarray(row, dtype=np.float64), (n, 4))
        if mix is None:
            mix = np.stack([np.where(row[:, 3] > 0, 1.0, 0.0), np.zeros(n)], axis=1)
        fill = np.broadcast_to
        levels = fill(np.asarray(sigma, dtype=np.float64), (n,))
        self._blocks.append(
            {
                "parent": parent,
                "sigma": levels,
                "row": row,
                "older": fill(np.asarray(older), (n,)),
                "stream": np.stack([own, fill(np.asarray(shared), (n,))], axis=1),
                "mix": np.asarray(mix),
                "leaf": np.zeros(n, dtype=bool),
                "train": fill(np.asarray(train, dtype=bool), (n,)),
                "prompt": np.zeros(n, dtype=np.int64),
                "label": np.full(n, label),
                "update": fill(np.asarray(update), (n,)),
            }
        )
        self._parent = np.append(self._parent, parent)
        self._sigma = np.append(self._sigma, levels)
        self._follows = np.append(self._follows, row[:, 1] != 0.0)
        return np.arange(first, first + n)
