"""A plan as text: one table of levels, and the tree with straight runs folded."""

from __future__ import annotations

from branchcore.plan import Plan


def _edge_mark(plan: Plan, i: int) -> str:
    if plan.parent[i] < 0:
        return "o"
    mark = "~" if plan.stochastic[i] else "-"
    return mark + ("*" if plan.train[i] else "")


def _draw_node(plan: Plan, i: int, indent: str, last: bool, lines: list[str]) -> None:
    run = [i]
    while plan.num_children[run[-1]] == 1:
        child = int(plan.child_start[run[-1]])
        if _edge_mark(plan, child) != _edge_mark(plan, run[-1]):
            break
        run.append(child)
    end = run[-1]
    steps = f" x{len(run)}" if len(run) > 1 else ""
    leaf = " leaf" if plan.leaf[end] else ""
    elbow = "" if plan.parent[i] < 0 else ("`- " if last else "|- ")
    lines.append(f"{indent}{elbow}{_edge_mark(plan, i)}{steps} {plan.sigma[end]:.3g}{leaf}")
    below = indent if plan.parent[i] < 0 else indent + ("   " if last else "|  ")
    children = range(plan.child_start[end], plan.child_start[end + 1])
    for child in children:
        _draw_node(plan, child, below, child == children[-1], lines)


def draw(plan: Plan, prompt: int = 0) -> str:
    """Returns the trees of one prompt as text: `~` stochastic, `-` ODE, `*` trained edges.

    Runs of equal edges are folded (`x3`); the number is the noise level a run ends at.
    """
    plan = plan.select([prompt])
    counts = plan.counts()
    lines = [
        f"{len(plan)} nodes, {counts.forwards} forwards, {counts.trained_edges} trained edges of "
        f"{counts.trained_parents} parents, {counts.decodes} leaves"
    ]
    for lo, hi in plan.levels()[:1]:
        for root in range(lo, hi):
            _draw_node(plan, root, "", True, lines)
    return "\n".join(lines)
