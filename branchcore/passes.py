"""Rewrites of a plan: sort, concat, drop dead nodes, merge equal nodes, take sharing apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.plan import Ints, Plan, Rewritten, column_names, columns_of, from_columns


def concat(plans: Sequence[Plan]) -> Plan:
    """Returns one plan of all the plans' prompts, in order."""
    if not plans:
        raise ValueError("concat: plans must hold at least one plan, got 0")
    parts = [columns_of(p) for p in plans]
    rows = np.cumsum([0] + [len(p) for p in plans])
    prompts = np.cumsum([0] + [p.num_prompts for p in plans])
    for part, row, prompt in zip(parts, rows, prompts, strict=False):
        part["parent"] = np.where(part["parent"] >= 0, part["parent"] + row, -1)
        part["prompt"] = part["prompt"] + prompt
    return from_columns(
        {name: np.concatenate([p[name] for p in parts]) for name in column_names()}
    ).plan


def prune_dead(plan: Plan) -> Plan:
    """Drops nodes with neither a leaf nor a matching edge below, and trains no unscored edge.

    A stochastic edge that no leaf depends on cannot be trained: its noise never reaches a reward.
    An edge with b = 0 is about its own node, so it lives without a leaf below it.
    """
    matching = plan.train & plan.matching
    alive = plan.leaf | matching
    for lo, hi in plan.levels()[:0:-1]:
        alive[plan.parent[lo:hi][alive[lo:hi]]] = True
    return plan.take(np.flatnonzero(alive), train=plan.train & ((plan.leaves_below > 0) | matching))


def share(plan: Plan) -> Plan:
    """Merges nodes that are equal by construction: same parent, row and noise, bit for bit.

    A sigma that differs in its last bit only loses sharing; it never joins what differs.
    """
    columns = columns_of(plan)
    key_columns = ("sigma", "row", "older", "stream", "mix", "prompt", "label", "update")
    keys = [np.ascontiguousarray(columns[n]).reshape(len(plan), -1) for n in key_columns]
    raw = np.concatenate([k.view(np.uint8).reshape(len(plan), -1) for k in keys], axis=1)
    merged, kept = np.arange(len(plan)), np.zeros(len(plan), dtype=bool)
    leaf, train = plan.leaf.copy(), plan.train.copy()
    for lo, hi in plan.levels():
        above = np.where(plan.parent[lo:hi] >= 0, merged[plan.parent[lo:hi]], -1)
        parent = above[:, None].view(np.uint8)
        key = np.ascontiguousarray(np.concatenate([parent, raw[lo:hi]], axis=1))
        _, first, group = np.unique(
            key.view(f"V{key.shape[1]}").reshape(-1), return_index=True, return_inverse=True
        )
        merged[lo:hi] = lo + first[group]
        kept[lo + first] = True
        np.logical_or.at(leaf, merged[lo:hi], plan.leaf[lo:hi])
        np.logical_or.at(train, merged[lo:hi], plan.train[lo:hi])
    parent = np.where(plan.parent >= 0, merged[plan.parent], -1)
    return plan.take(np.flatnonzero(kept), leaf=leaf, train=train, parent=parent)


def unshare(plan: Plan) -> Rewritten:
    """Takes a plan apart into independent chains on the same noise: the naive work.

    Every node that no sampling step leaves becomes the end of a chain of its own; a trained edge is
    repeated in each chain through it, re-noised states stay with their image. Credit by tree
    belongs to the shared plan: take it there and carry it over by `origin`, since every chain here
    is a tree of its own.
    """
    goes_on = np.zeros(len(plan), dtype=bool)
    goes_on[plan.parent[(plan.parent >= 0) & ~plan.matching]] = True
    rows = np.flatnonzero(~goes_on & ~plan.matching)
    chain = np.arange(len(rows))
    origins, chains = [], []
    while len(rows):
        origins.append(rows)
        chains.append(chain)
        up = plan.parent[rows].astype(np.int64)
        rows, chain = up[up >= 0], chain[up >= 0]
    origin, owner = np.concatenate(origins), np.concatenate(chains)
    renoised = [
        _with_their_image(plan, edge, origin, owner) for edge in plan.matching.nonzero()[0].tolist()
    ]
    origin = np.concatenate([origin, *(o for o, _ in renoised)])
    owner = np.concatenate([owner, *(c for _, c in renoised)])
    order = np.argsort(plan.depth[origin], kind="stable")
    origin, owner = origin[order], owner[order]
    position = {(int(o), int(c)): i for i, (o, c) in enumerate(zip(origin, owner, strict=True))}
    up = plan.parent[origin]
    columns = {name: column[origin] for name, column in columns_of(plan).items()}
    columns["parent"] = np.array(
        [position[(int(u), int(c))] if u >= 0 else -1 for u, c in zip(up, owner, strict=True)]
    )
    result = from_columns(columns)
    return Rewritten(result.plan, origin[result.origin])


def _with_their_image(plan: Plan, edge: int, origin: Ints, owner: Ints) -> tuple[Ints, Ints]:
    """Returns a re-noised state once per chain that has its image, and those chains."""
    chains = owner[origin == plan.parent[edge]]
    return np.full(len(chains), edge), chains
