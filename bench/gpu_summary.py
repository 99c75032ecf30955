"""What a run of gpu_check found, as one short page: steps, verdicts, ratios, what was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Result = dict[str, Any]
MOST_FAILURES = 40


def tail(log: Path, lines: int, width: int = 300) -> str:
    """Returns the end of a log, at most so many lines and characters of each."""
    if not log.exists():
        return ""
    text = log.read_bytes()[-400_000:].decode(errors="replace").splitlines()
    return "\n".join(line[:width] for line in text[-lines:])


def counts(junit: Path) -> Result:
    """Counts the tests of a JUnit file and names those that failed."""
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError) as error:
        return {"error": f"no count: {error}"}
    found: Result = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in root.iter("testsuite"):
        for name in found:
            found[name] += int(suite.get(name, 0))
    bad = [
        f"{case.get('name')}: {(part.get('message') or '').splitlines()[0][:200]}"
        for case in root.iter("testcase")
        for part in case
        if part.tag in ("failure", "error") and (part.get("message") or "").strip()
    ]
    return found | {"failed": bad[:MOST_FAILURES]}


def ran(junit: Path, word: str = "") -> int:
    """Counts the tests that ran, not skipped, and have a word in their name."""
    try:
        cases = ElementTree.parse(junit).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError):
        return 0
    return sum(word in case.get("name", "") and case.find("skipped") is None for case in cases)


def read(path: Path) -> Result:
    """Reads a result; an empty one if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    ] + [""]


def summary(out: Path, result: Result) -> str:
    """Returns the page."""
    ops, tree, found = (
        read(out / f"{name}.json") for name in ("ops", "tree_throughput", "checklist")
    )
    meta = next((r["meta"] for r in (ops, tree, found) if "meta" in r), {})
    where = meta.get("gpu") or meta.get("cpu") or "unknown device"
    versions = ", ".join(f"{k} {v}" for k, v in meta.get("versions", {}).items())
    lines = ["# GPU check", ""]
    lines += [f"{where}, {versions}, commit {meta.get('commit')}, {meta.get('date')}, "
              f"{result['seconds']:.0f} s.", ""]  # fmt: skip
    if result["device"] == "cpu":
        lines += ["**A rehearsal on a CPU: no number here means anything.**", ""]
    lines += table(["step", "result", "s", "allowed", ""], [step_row(s) for s in result["steps"]])
    return "\n".join([*lines, *verdicts(ops), *ratios(tree), *forwards(found), *cuts(ops, found)])


def step_row(step: Result) -> list[str]:
    note = step.get("why", "")
    if "tests" in step:
        tests = step["tests"]
        note = tests.get("error") or (
            f"{tests['tests']} tests, {tests['failures']} failed, {tests['errors']} errors, "
            f"{tests['skipped']} skipped"
        )
        if "why" in step:
            note += f"; {step['why']}"
    if step["status"] == "cut short":
        note = next(iter(step.get("found", [])), "out of time, its result is whole")
    if step.get("resumed"):
        note += f" went on {step['resumed']} times after a broken context"
    if step["status"] == "failed" and not note:
        note = f"exit code {step.get('code')}"
    seconds = [f"{step[key]:.0f}" if key in step else "" for key in ("seconds", "allowed")]
    return [step["name"], step["status"], *seconds, note]


def verdicts(ops: Result) -> list[str]:
    if not ops.get("verdicts"):
        return []
    said = {True: "met", False: "**missed**", None: "not judged"}
    rows = [[v["target"], v["wanted"], v["got"], said[v["met"]]] for v in ops["verdicts"]]
    limits = ops["ceilings"]
    measured = limits["normals_measured"]
    source = "" if measured is None else f", measured {1e-12 * measured:.2f}"
    rate = limits["copy_bytes_per_s"]
    copied = "not measured" if rate is None else f"{1e-9 * rate:.0f} GB/s"
    return [
        f"Copy {copied}; normals "
        f"{1e-12 * limits['normals_per_s']:.2f} T/s (the model's 1.20 or faster{source}).",
        "",
        *table(["target", "wanted", "got", ""], rows),
    ]


def ratios(tree: Result) -> list[str]:
    failed = [name for name, check in tree.get("checks", {}).items() if not check["pass"]]
    lines = [f"Tree checks failed: {', '.join(failed)}.", ""] if failed else []
    if not tree.get("ratios"):
        return lines
    config = tree["config"]
    clock, plans = config["clock"], tree["plans"]
    key = "median_s" if clock == "wall" else "cpu_s"
    seconds = [f"{name} {p[key]:.3g}{'*' * p['extrapolated']}" for name, p in plans.items()]
    rows = []
    for name, row in tree["ratios"].items():
        low, high = row["ci95"]
        times = [f"{row[clock]:.2f}x", f"{low:.2f} to {high:.2f}", f"{row['predicted']:.2f}x"]
        rows.append([name, *times])
    return [
        *lines,
        f"{config['model']}, {config['prompts']} x {config['leaves']} leaves, {config['steps']} "
        f"steps, {config['rounds']} rounds, {clock} s: {', '.join(seconds)} (* timed in part).",
        "",
        *table(["A is faster than B", f"{clock} time", "95 % CI", "predicted"], rows),
    ]


def forwards(found: Result) -> list[str]:
    # a part that broke is its error, not a list
    parts = [part for name, part in found.items() if "forward" in name and isinstance(part, list)]
    rows = [row for part in parts for row in part if "ms" in row]
    if not rows:
        return []
    rows.sort(key=lambda row: (row["rows"], row["mode"]))
    cells = [[str(r["rows"]), r["mode"], f"{r['ms']:.2f}", f"{r['tflops']:.3g}"] for r in rows]
    lines = table(["rows", "forward", "ms", "TFLOP/s"], cells)
    if "bitwise" in found:
        said = ", ".join(f"{key} {value}" for key, value in found["bitwise"].items())
        lines += [f"Bits of the model's rows: {said}.", ""]
    return lines


def cuts(ops: Result, found: Result) -> list[str]:
    lines = []
    for name, part in (("ops", ops), ("checklist", found)):
        if part.get("cut"):
            lines += [f"Cut from {name} for time: {'; '.join(part['cut'])}.", ""]
        for key, head in (("failures", "Failures in"), ("errors", "Not judged, but broke in")):
            bad = [f"{f['what']}: {f['error'].splitlines()[0][:160]}" for f in part.get(key, [])]
            if bad:
                lines += [f"{head} {name}:", "", *(f"- {line}" for line in bad[:20]), ""]
    return lines
