"""A result of learning.py in words: tables, and sentences that are true of any numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BASE = "full"
COMMAND = "python bench/learning.py --jobs 2"
WAYS = {
    "full": "nothing",
    "dppo": "`threshold`, rate 0.7",
    "optimal": "`optimal`, rate 0.5",
    "cppo": "`cppo`, rate 0.5",
    "parent_top1": "`parent_top1`",
    "depth": "2 of 9 depths, moved every 30 iterations",
}
UNBIASED = ("full", "dppo", "optimal")


def pair(found: Mapping[str, Any] | None, form: str) -> str:
    """Formats a mean with its interval's half width; empty without either."""
    if found is None:
        return ""
    mean, ci = format(found["mean"], form), found["ci95"]
    return mean if ci is None else f"{mean} ± {(ci[1] - ci[0]) / 2:{form.lstrip('+')}}"


def check(result: Mapping[str, Any]) -> None:
    """Raises ValueError unless there is something to compare."""
    arms, seeds = list(result["arms"]), len(result["seeds"])
    if BASE not in arms or len(arms) < 2 or seeds < 2:
        raise ValueError(
            f"learning: result must compare arms with {BASE} over 2 seeds or more, got {arms} and "
            f"{seeds}; try {COMMAND}"
        )


def head(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the head of the table."""
    same = result["same_iteration"]
    return (
        "arm", "left out", "kept", "CPU s per iteration", "iterations", "reward", "against `full`",
        "both right", "against `full`", "diversity", "nearest real",
        f"reward after {same} iterations, against `full`",
    )  # fmt: skip


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Returns the rows of the table, an arm each."""
    found: list[list[str]] = []
    for name, arm in result["arms"].items():
        final, whole = arm["final"], name == BASE
        cells = [name, WAYS[name], f"{arm['kept_share']['mean']:.2f}"]
        cells += [pair(arm["cpu_s_per_iteration"], ".2f"), f"{arm['iterations']['mean']:.0f}"]
        for measure in ("reward", "both_right"):
            against = None if whole else final[measure]["against_full"]
            cells += [pair(final[measure], ".3f"), pair(against, "+.3f")]
        cells += [pair(final["diversity"], ".3f"), pair(final["nearest_real"], ".2f")]
        after = arm["after_same_iteration"]["reward"]["against_full"]
        found.append([*cells, pair(None if whole else after, "+.3f")])
    return found


def named(names: Sequence[str]) -> str:
    """Joins names in words."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Returns what was measured: at equal time, per iteration, after equal iterations."""
    arms = {name: arm for name, arm in result["arms"].items() if name != BASE}
    return [_at_equal_time(result, arms), _per_iteration(result, arms)]


def _at_equal_time(result: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    kinds: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    for name, arm in arms.items():
        low, high = arm["final"]["reward"]["against_full"]["ci95"]
        kind = "above" if low > 0.0 else "below" if high < 0.0 else "not told apart from"
        kinds[kind].append(name)
    said = [f"{kind} `full`: {named(names)}" for kind, names in kinds.items() if names]
    return (
        f"Held-out reward after {result['budget_s']:g} CPU seconds, by the intervals of the "
        f"differences: {'; '.join(said)}."
    )


def _per_iteration(result: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    whole = result["arms"][BASE]["cpu_s_per_iteration"]["mean"]
    share = {name: arm["cpu_s_per_iteration"]["mean"] / whole for name, arm in arms.items()}
    costs = {
        name: arm["after_same_iteration"]["reward"]["against_full"] for name, arm in arms.items()
    }
    fast, slow = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
    order = sorted(costs, key=lambda name: costs[name]["mean"])
    worst, best = order[0], order[-1]
    return (
        f"What is bought: an iteration takes {share[fast]:.2f} (`{fast}`) to {share[slow]:.2f} "
        f"(`{slow}`) of `full`'s CPU seconds, rollouts included. What it costs: after the same "
        f"{result['same_iteration']} iterations the reward differs from `full`'s by "
        f"{pair(costs[worst], '+.3f')} (`{worst}`) to {pair(costs[best], '+.3f')} (`{best}`)."
    )


def table(result: Mapping[str, Any]) -> str:
    """Formats a result as a Markdown table for a terminal."""
    head = ("arm", "iterations", "kept", "CPU s/it", "reward", "against full", "both right")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, arm in result["arms"].items():
        reward, right = arm["final"]["reward"], arm["final"]["both_right"]
        cells = (
            name,
            f"{arm['iterations']['mean']:.0f}",
            f"{arm['kept_share']['mean']:.2f}",
            f"{arm['cpu_s_per_iteration']['mean']:.2f}",
            pair(reward, ".3f"),
            pair(reward["against_full"], "+.3f"),
            pair(right, ".3f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
