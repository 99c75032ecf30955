"""Edge weights that select what the backward pays for.

A pruner returns (M,) float64 weights: 0 = dropped, 1 = kept. Pruning comes after credit: it never
changes rewards, statistics, advantages of kept edges, the rollout or the noise. The selectors here
drop gradient terms and are biased (`unbiased` has what is not); the objective's normaliser stays
the number of planned edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def _through(plan: Plan, leaves: Ints) -> Floats:
    """(M,) weight 1 on all edges above some leaves, and on the re-noised states of them."""
    alive = np.zeros(len(plan), dtype=bool)
    alive[leaves] = True
    for lo, hi in plan.levels()[:0:-1]:
        np.logical_or.at(alive, plan.parent[lo:hi], alive[lo:hi])
    for lo, hi in plan.levels()[1:]:
        alive[lo:hi] |= plan.matching[lo:hi] & alive[plan.parent[lo:hi]]
    return alive.astype(np.float64)


def _credited(plan: Plan) -> Ints:
    """(M,) the row whose value is a leaf's: the last stochastic edge that leads to it alone.

    Credits by depth or sibling judge stochastic edges only and leave 0 on a deterministic tail.
    """
    own = np.arange(len(plan))
    source = own.copy()
    for lo, hi in plan.levels()[1:]:
        up = plan.parent[lo:hi]
        tail = ~plan.stochastic[lo:hi] & (plan.leaves_below[up] == 1)
        source[lo:hi] = np.where(tail, source[up], source[lo:hi])
    return np.where(plan.stochastic[source], source, own)


def _select(plan: Plan, value_M: Floats, choose: Callable[[Floats], Ints]) -> Floats:
    """(M,) weights of the leaves that `choose` takes from the values of each prompt's."""
    leaves, source = np.flatnonzero(plan.leaf), _credited(plan)
    kept: list[Ints] = [np.zeros(0, dtype=np.int64)]
    for prompt in range(plan.num_prompts):
        mine = leaves[plan.prompt[leaves] == prompt]
        kept.append(mine[choose(value_M[source[mine]])])
    return _through(plan, np.concatenate(kept))


def _left(name: str, count: int, rate: float) -> int:
    """Returns floor(count (1 - rate)); 0.3 of 10 leaves 7, whatever 1 - 0.3 is in binary."""
    kept = int(count * (1.0 - rate) + 1e-9)
    if not 0.0 <= rate < 1.0 or kept < 1:
        raise ValueError(
            f"{name}: rate must be in [0, 1) and leave one of {count} leaves, got {rate}"
        )
    return kept


def best_of_n(plan: Plan, value_M: Floats, kept: int) -> Floats:
    """Keeps the edges above each prompt's best and worst leaves.

    Args:
        plan: chains or trees.
        value_M: (M,) scalar value of every node.
        kept: leaves per prompt, the worse half one more if odd; ties keep the order of leaves.

    Source: DanceGRPO `train_grpo_hunyuan.py`, best-of-n. Biased.
    """

    def choose(value: Floats) -> Ints:
        order = np.argsort(-value, kind="stable")
        top = order[: kept // 2]
        return np.concatenate([top, order[max(0, len(order) - (kept - kept // 2)) :]])

    return _select(plan, value_M, choose)


def cppo(plan: Plan, value_M: Floats, rate: float) -> Floats:
    """Keeps the edges above each prompt's floor(G (1 - rate)) leaves of the largest |value|.

    A prompt whose values are all 0 loses everything. Ties keep the order of leaves.

    Args:
        plan: chains or trees of G leaves per prompt.
        value_M: (M,) scalar value of every node.
        rate: share of the leaves that is dropped, in [0, 1).

    Raises:
        ValueError: nothing would be left of a prompt.

    Source: CPPO, arXiv 2503.22342, per prompt; its verl code ranks over the whole batch. Biased.
    """

    def choose(value: Floats) -> Ints:
        count = _left("cppo", len(value), rate) if value.any() else 0
        return np.sort(np.argsort(-np.abs(value), kind="stable")[:count])

    return _select(plan, value_M, choose)


def maximal_variance(plan: Plan, value_M: Floats, rate: float) -> Floats:
    """Keeps, per prompt, the floor(G (1 - rate)) leaves whose values have the largest variance.

    An optimum is always the i smallest and the others largest; ties take the smallest i.

    Args:
        plan: chains or trees of G leaves per prompt.
        value_M: (M,) scalar value of every node.
        rate: share of the leaves that is dropped, in [0, 1).

    Source: Pro-GRPO, arXiv 2512.15347, optimal variance filtering, on final rewards. Biased.
    """

    def choose(value: Floats) -> Ints:
        order, count = np.argsort(value, kind="stable"), _left("maximal_variance", len(value), rate)
        subsets = [np.r_[order[:i], order[len(order) - count + i :]] for i in range(count + 1)]
        variance = np.array([value[subset].var() for subset in subsets])
        # equal up to rounding is equal
        return subsets[int(np.argmax(variance >= variance.max() * (1.0 - 1e-12)))]

    return _select(plan, value_M, choose)


def zero_advantage(plan: Plan, value_M: Floats) -> Floats:
    """Drops the edges of value 0: they have no policy gradient, but they have a KL. Biased by it.

    Args:
        plan: the trees.
        value_M: (M,) scalar value of every edge.
    """
    del plan
    return np.where(value_M == 0.0, 0.0, 1.0)


BIASED: Mapping[str, Callable[[Plan, Floats, float], Floats]] = {
    "cppo": cppo,
    "maximal_variance": maximal_variance,
    "best_of_n": lambda plan, value, rate: best_of_n(
        plan, value, max(2, int(plan.leaf.sum() // plan.num_prompts * (1.0 - rate) + 1e-9))
    ),
    "extremes": lambda plan, value, rate: extremes(plan, value, share=1.0 - rate),
    "first_steps": lambda plan, _value, rate: first_steps(plan, share=1.0 - rate),
    "parent_top1": lambda plan, value, _rate: parent_top1(plan, value),
    "zero_advantage": lambda plan, value, _rate: zero_advantage(plan, value),
}
"""Pruners by name: (plan, value (M,), share that is dropped) -> (M,) weights."""
