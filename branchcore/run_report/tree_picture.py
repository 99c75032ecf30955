"""A prompt's tree as SVG that fits any width: depth across, leaves down, rewards at the right.

Edges stand at percentages of the width and pixels of the height. Letters: M nodes, L leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from branchcore.run_report.markup import Markup, join, tag
from branchcore.run_report.read import Row
from branchcore.run_report.scale import fixed, number, signed

LEFT, RIGHT = 1.5, 66.0
"""Percent of the width where roots and the deepest nodes stand."""
BARS, HALF, END = 79.5, 9.0, 99.8
"""Percent of the width: where the mean reward stands, how far the longest bar goes, numbers end."""
TALL, SMALL, MOST_HEIGHT = 22, 7, 900
"""Pixels per leaf, at most and at least, and of all leaves if there is a choice."""
TOP = 26
LABELS = 200
"""Edges up to which advantages are written beside them."""


class Layout(NamedTuple):
    """Where the nodes of a tree stand."""

    x: list[float]
    """(M,) percent."""
    y: list[float]
    """(M,) pixels."""
    height: float
    row: float
    """Pixels per end of a branch."""
    depth: list[int]


def layout_of(parent: Sequence[int]) -> Layout:
    """Places nodes: ends of branches below each other in depth-first order, others between.

    Args:
        parent: (M,) -1 = root, else a smaller number than the node's own.
    """
    children: list[list[int]] = [[] for _ in parent]
    depth: list[int] = []
    for node, up in enumerate(parent):
        depth.append(0 if up < 0 else depth[up] + 1)
        if up >= 0:
            children[up].append(node)
    ends = [node for node in _depth_first(parent, children) if not children[node]]
    row = max(SMALL, min(TALL, MOST_HEIGHT / max(len(ends), 1)))
    place = {node: TOP + row * (i + 0.5) for i, node in enumerate(ends)}
    y = [place.get(node, 0.0) for node in range(len(parent))]
    for node in reversed(range(len(parent))):
        if children[node]:
            y[node] = (y[children[node][0]] + y[children[node][-1]]) / 2
    step = (RIGHT - LEFT) / max(max(depth, default=0), 1)
    x = [round(LEFT + step * d, 2) for d in depth]
    return Layout(x, [round(v, 1) for v in y], TOP + row * len(ends) + 8, row, depth)


def _depth_first(parent: Sequence[int], children: Sequence[Sequence[int]]) -> list[int]:
    stack = [node for node in reversed(range(len(parent))) if parent[node] < 0]
    order: list[int] = []
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(children[node])
    return order


def totals(tree: Row) -> list[float | None]:
    """Returns the weighted sum of every leaf's rewards, None where there is none."""
    weights: list[float] = tree["reward_weights"]
    return [
        None
        if any(r is None for r in row)
        else sum(w * r for w, r in zip(weights, row, strict=True))
        for row in tree["rewards"]
    ]


def farthest(tree: Row) -> float:
    """Returns the largest distance of a leaf's total reward from their mean."""
    there = [value for value in totals(tree) if value is not None]
    return max((abs(value - sum(there) / len(there)) for value in there), default=0.0)


def draw_tree(tree: Row, reach: float) -> Markup:
    """Returns the tree as SVG.

    Args:
        tree: a record of `tree_record`.
        reach: distance from the mean reward that the longest bar stands for.
    """
    at = layout_of(tree["parent"])
    largest = max((abs(a) for a in tree["advantage"] if a is not None), default=0.0) or 1.0
    edges = [_edge(tree, at, node, largest) for node in range(len(at.x))]
    return tag(
        "svg",
        _levels(tree, at),
        *edges,
        _leaves(tree, at, reach or 1.0),
        cls="tree",
        width="100%",
        height=math.ceil(at.height),
        role="img",
        aria_label=f"tree of {tree['prompt']}: {len(at.x)} nodes, {len(tree['leaves'])} leaves",
    )


def _edge(tree: Row, at: Layout, node: int, largest: float) -> Markup | None:
    up = tree["parent"][node]
    if up < 0:
        return tag("circle", cls="root", cx=f"{at.x[node]}%", cy=at.y[node], r=3.5)
    kind, style = _style(tree, node, largest)
    begin, end = f"{at.x[up]}%", f"{at.x[node]}%"
    corner = None
    if at.y[up] != at.y[node]:
        corner = tag("line", x1=begin, x2=begin, y1=at.y[up], y2=at.y[node])
    line = tag("line", x1=begin, x2=end, y1=at.y[node], y2=at.y[node])
    text = None
    if kind in ("up", "down") and at.row >= 14 and sum(tree["train"]) <= LABELS:
        middle = f"{(at.x[up] + at.x[node]) / 2:.2f}%"
        value = signed(tree["advantage"][node], 2)
        text = tag("text", value, cls="worth", x=middle, y=at.y[node] - 3.5, text_anchor="middle")
    hit = tag("line", cls="hit", x1=begin, x2=end, y1=at.y[node], y2=at.y[node])
    told = tag("title", _edge_text(tree, node))
    return tag("g", told, corner, line, text, hit, cls=f"edge {kind}", style=style)


def _style(tree: Row, node: int, largest: float) -> tuple[str, str | None]:
    """Returns the class of an edge, and how strong its advantage is."""
    if tree["stopped"][node]:
        return "stopped", None
    if tree["pruned"][node]:
        return "pruned", None
    if not tree["train"][node]:
        return ("noisy" if tree["stochastic"][node] else "plain"), None
    advantage = tree["advantage"][node] or 0.0
    kind = "up" if advantage > 0 else "down" if advantage < 0 else "even"
    return kind, f"--strength:{0.3 + 0.7 * abs(advantage) / largest:.2f}"


def _edge_text(tree: Row, node: int) -> str:
    up = tree["parent"][node]
    step = f"noise level {number(tree['sigma'][up])} to {number(tree['sigma'][node])}"
    kind = "stochastic" if tree["stochastic"][node] else "ODE"
    if tree["stopped"][node]:
        return f"{step}\nstopped in the rollout"
    if not tree["train"][node]:
        return f"{step}\n{kind}, not trained"
    pruned = "\npruned from the backward" if tree["pruned"][node] else ""
    return f"{step}\ntrained, advantage {signed(tree['advantage'][node] or 0.0)}{pruned}"


def _levels(tree: Row, at: Layout) -> Markup:
    """Writes the noise level above depths at which all nodes share one, not all of many."""
    sigmas: dict[int, set[float]] = {}
    for sigma, depth in zip(tree["sigma"], at.depth, strict=True):
        sigmas.setdefault(depth, set()).add(sigma)
    stride = math.ceil(len(sigmas) / 11)
    texts: list[Markup] = []
    for depth, found in sigmas.items():
        if len(found) == 1 and depth % stride == 0:
            x = f"{at.x[at.depth.index(depth)]}%"
            often = "" if depth % (2 * stride) == 0 else " odd"
            anchor = "start" if depth == 0 else "middle"
            text = number(found.copy().pop(), 2)
            texts.append(tag("text", text, cls=f"tick{often}", x=x, y=11, text_anchor=anchor))
            texts.append(tag("line", cls="level", x1=x, x2=x, y1=18, y2=at.height - 4))
    return join(*texts)


def _leaves(tree: Row, at: Layout, reach: float) -> Markup:
    """Draws a bar per leaf from the mean of the tree to its total reward, and the number."""
    total = totals(tree)
    there = [value for value in total if value is not None]
    mean = sum(there) / len(there) if there else 0.0
    head = {"x": f"{END}%", "y": 11, "text_anchor": "end"}
    line = {"x1": f"{BARS}%", "x2": f"{BARS}%", "y1": 18, "y2": at.height - 4}
    parts = [tag("text", f"mean {number(mean)}", cls="tick", **head)]
    for node, value, rewards in zip(tree["leaves"], total, tree["rewards"], strict=True):
        told = tag("title", _leaf_text(tree, value, rewards))
        reached = None if value is None else (value - mean) / reach
        kind = "none" if reached is None else "up" if reached >= 0.0 else "down"
        text = "no score" if value is None else fixed(value, reach)
        body = _leaf(at, node, text, reached)
        parts.append(tag("g", told, body, cls=f"score {kind}"))
    return join(*parts, tag("line", cls="mean", **line))


def _leaf(at: Layout, node: int, text: str, reached: float | None) -> Markup:
    """Draws a leaf's dot, bar and number; no bar where there is no score."""
    y, x = at.y[node], at.x[node]
    ends = {"x1": f"{x}%", "x2": f"{BARS - HALF - 1}%", "y1": y, "y2": y}
    parts = [
        tag("line", cls="guide", **ends),
        tag("circle", cls="leaf", cx=f"{x}%", cy=y, r=min(2.5, at.row / 3)),
    ]
    if reached is not None:
        thick = max(2.0, min(12.0, at.row - 8.0))
        left = BARS + HALF * min(reached, 0.0)
        size = {"width": f"{max(HALF * abs(reached), 0.2):.2f}%", "height": round(thick, 1)}
        parts.append(tag("rect", x=f"{left:.2f}%", y=round(y - thick / 2, 1), rx=1.5, **size))
    if at.row >= 12:
        where = {"x": f"{END}%", "y": y + 3.5, "text_anchor": "end"}
        parts.append(tag("text", text, cls="tick", **where))
    area = {"x": f"{RIGHT}%", "y": round(y - at.row / 2, 1), "width": f"{100 - RIGHT}%"}
    return join(*parts, tag("rect", cls="hit", height=round(at.row, 1), **area))


def _leaf_text(tree: Row, total: float | None, rewards: Sequence[Any]) -> str:
    lines = [f"reward {number(total, 4)}"]
    lines += [f"{n} {number(r, 4)}" for n, r in zip(tree["components"], rewards, strict=True)]
    return "\n".join(lines)
