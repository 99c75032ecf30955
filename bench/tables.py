"""The result of bench/tree_throughput.py as Markdown on stdout."""

from __future__ import annotations

from typing import Any

from checks import Check
from plans.task import STAGES


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


def print_plans(plans: dict[str, Any], prompts: int) -> None:
    print("| plan | CPU s | 95 % CI | wall s | images/CPU s | F / E / P / D |", end="")
    print(f" {' / '.join(STAGES)} % | MiB |\n|---|--:|:-:|--:|--:|:-:|:-:|--:|")
    for name, plan in plans.items():
        star = "*" if plan["extrapolated"] else ""
        low, high = plan["ci95"]
        whole = sum(plan["split"].values())
        share = " / ".join(f"{100 * t / whole:.0f}" for t in plan["split"].values())
        work = " / ".join(str(plan[key]) for key in "FEPD")
        memory = "-" if plan["peak_mem"] is None else f"{plan['peak_mem']:.0f}"
        print(
            f"| {name}{star} | {plan['cpu_s']:.3f} | {low:.3f}-{high:.3f} | {plan['median_s']:.3f} "
            f"| {plan['D'] / plan['cpu_s']:.0f} | {work} | {share} | {memory} |"
        )
    part = [p for p in plans.values() if p["extrapolated"]]
    if part:
        print(
            f"\n\\* runs prompt by prompt: timed on {part[0]['prompts_timed']} of the {prompts} "
            "prompts and scaled; its memory is that of one prompt."
        )


def print_ratios(found: dict[str, Any]) -> None:
    print("\n| A/B | A is faster, CPU s | 95 % CI | wall | predicted | meas./pred. | required |")
    print("|---|--:|:-:|--:|--:|--:|--:|")
    for name, row in found.items():
        low, high = row["ci95"]
        target = "" if row["target"] is None else f">= {row['target']:g}"
        print(
            f"| {name} | {row['cpu']:.2f}x | {low:.2f}-{high:.2f} | {row['wall']:.2f}x "
            f"| {row['predicted']:.2f}x | {row['cpu'] / row['predicted']:.2f} | {target} |"
        )
