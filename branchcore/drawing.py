"""A plan as text: its counts, and the tree with straight runs and equal siblings folded."""

from __future__ import annotations

from branchcore.plan import Plan


def _edge_mark(plan: Plan, i: int) -> str:
    if plan.parent[i] < 0:
        return "o"
    mark = "~" if plan.stochastic[i] else "-"
    return mark + ("*" if plan.train[i] else "")


def _node(plan: Plan, i: int) -> list[str]:
    """Returns the lines of a node and what grows from it, not indented."""
    run = [i]
    while plan.num_children[run[-1]] == 1 and not plan.leaf[run[-1]]:
        child = int(plan.child_start[run[-1]])
        if _edge_mark(plan, child) != _edge_mark(plan, run[-1]):
            break
        run.append(child)
    end = run[-1]
    steps = f" x{len(run)}" if len(run) > 1 else ""
    leaf = " leaf" if plan.leaf[end] else ""
    lines = [f"{_edge_mark(plan, i)}{steps} {plan.sigma[end]:.3g}{leaf}"]
    children = range(plan.child_start[end], plan.child_start[end + 1])
    branches = _alike([_node(plan, child) for child in children])
    for branch in branches:
        last = branch is branches[-1]
        lines.append(("`- " if last else "|- ") + branch[0])
        lines += [("   " if last else "|  ") + line for line in branch[1:]]
    return lines


def _alike(branches: list[list[str]]) -> list[list[str]]:
    """Draws equal siblings once, with their number."""
    texts = ["\n".join(b) for b in branches]
    folded: list[list[str]] = []
    for text in dict.fromkeys(texts):
        count, lines = texts.count(text), text.split("\n")
        folded.append([f"{count} of {lines[0]}" if count > 1 else lines[0], *lines[1:]])
    return folded


def draw(plan: Plan, prompt: int = 0) -> str:
    """Returns the trees of one prompt as text: `~` stochastic, `-` ODE, `*` trained edges.

    Runs of equal edges are folded (`x3`; the number is the noise level a run ends at), and so are
    equal siblings (`6 of`).
    """
    plan = plan.select([prompt])
    counts = plan.counts()
    first, last = plan.levels()[0]
    trees = _alike([_node(plan, root) for root in range(first, last)])
    return "\n".join(
        [
            f"{len(plan)} nodes, {counts.forwards} forwards, {counts.trained_edges} trained edges "
            f"of {counts.trained_parents} parents, {counts.decodes} leaves",
            *(line for tree in trees for line in tree),
        ]
    )
