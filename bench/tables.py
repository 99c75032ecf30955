"""The result of bench/tree_throughput.py as Markdown on stdout."""

from __future__ import annotations

from typing import Any

from checks import Check
from plans.task import STAGES
from ratios import Headline


def print_checks(checks: list[Check]) -> None:
    """Prints the worst of each kind; counts and failures one by one."""
    print("| check | plans | worst | limit | |\n|---|---|---|---|---|")
    kinds: dict[str, list[Check]] = {}
    for check in checks:
        alone = check.kind if check.passed and not isinstance(check.limit, list) else check.name
        kinds.setdefault(alone + f" ({check.limit})" * (check.limit is None), []).append(check)
    for name, group in kinds.items():
        worst = group[0] if len(group) == 1 else max(group, key=lambda check: check.value)
        verdict = "pass" if worst.passed else "FAIL"
        shown = name.removesuffix(" (None)").replace("|", "\\|")
        print(f"| {shown} | {len(group)} | {_text(worst.value)} |", end="")
        print(f" {'reported' if worst.limit is None else _text(worst.limit)} | {verdict} |")
    print(f"\n{sum(c.passed for c in checks)} of {len(checks)} checks pass\n")


def _text(value: Any) -> str:
    return " / ".join(map(str, value)) if isinstance(value, list) else f"{value:.1e}"


def print_plans(plans: dict[str, Any], prompts: int, clock: Headline = "cpu") -> None:
    head, key = ("CPU s", "cpu_s") if clock == "cpu" else ("wall s", "median_s")
    other, other_key = ("wall s", "median_s") if clock == "cpu" else ("CPU s", "cpu_s")
    print(f"| plan | {head} | 95 % CI | {other} | images/{head} | F / E / P / D |", end="")
    print(f" {' / '.join(STAGES)} % | MiB |\n|---|--:|:-:|--:|--:|:-:|:-:|--:|")
    for name, plan in plans.items():
        star = "*" if plan["extrapolated"] else ""
        low, high = plan["ci95"]
        whole = sum(plan["split"].values())
        share = " / ".join(f"{100 * t / whole:.0f}" for t in plan["split"].values())
        work = " / ".join(str(plan[key]) for key in "FEPD")
        rate = plan["D"] / plan[key]
        memory = "-" if plan["peak_mem"] is None else f"{plan['peak_mem']:.0f}"
        print(
            f"| {name}{star} | {plan[key]:.3f} | {low:.3f}-{high:.3f} | {plan[other_key]:.3f} "
            f"| {rate:.{0 if rate >= 100 else 2}f} | {work} | {share} | {memory} |"
        )
    part = [p for p in plans.values() if p["prompts_timed"] < prompts]
    if part:
        print(
            f"\n\\* runs prompt by prompt: timed on {part[0]['prompts_timed']} of the {prompts} "
            "prompts and scaled; its memory is that of one prompt."
        )
    once = [name for name, plan in plans.items() if plan["rounds_timed"] == 1]
    if once:
        print(f"\n\\* too slow for every round, timed in the first alone: {', '.join(once)}.")


def print_ratios(found: dict[str, Any], clock: Headline = "cpu") -> None:
    head, other, other_head = ("CPU s", "wall", "wall")
    if clock == "wall":
        head, other, other_head = ("wall", "cpu", "CPU s")
    print(
        f"\n| A/B | A is faster, {head} | 95 % CI | {other_head} | predicted | meas./pred. "
        "| required |"
    )
    print("|---|--:|:-:|--:|--:|--:|--:|")
    for name, row in found.items():
        low, high = row["ci95"]
        target = "" if row["target"] is None else f">= {row['target']:g}"
        print(
            f"| {name} | {row[clock]:.2f}x | {low:.2f}-{high:.2f} | {row[other]:.2f}x "
            f"| {row['predicted']:.2f}x | {row[clock] / row['predicted']:.2f} | {target} |"
        )
