"""Section of README about a foreign trainer: what its conversions change, and what they gain."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from readme_text import markdown, where

TRAINERS = Path(__file__).resolve().parent.parent / "tests" / "foreign"
FILES = {"depth 1": "depth1.py", "depth 2": "depth2.py"}


def changes(file: str) -> tuple[list[str], list[str]]:
    """Returns the lines that a conversion writes and those it removes, blank ones apart."""
    texts = [(TRAINERS / name).read_text().splitlines() for name in ("original.py", file)]
    lines = [x for x in difflib.ndiff(*texts) if x[:1] in "+-" and x[1:].strip()]
    return [x for x in lines if x[0] == "+"], [x for x in lines if x[0] == "-"]


def foreign(result: dict[str, Any]) -> str:
    """Formats the changed lines and the CPU seconds of an iteration."""
    config, cases = result["config"], result["cases"]
    counts = {name: changes(file) for name, file in FILES.items()}
    rows: list[list[str]] = []
    for i, row in enumerate(cases[0]["rows"]):
        written, removed = counts.get(row["name"], ((), ()))
        lines = f"+{len(written)} -{len(removed)}" if row["name"] in counts else ""
        found = [case["rows"][i] for case in cases]
        cells = [f"{r['cpu_s']:.2f} (**{r['ratio']:.2f}x**)" for r in found]
        rows.append([row["name"], row["what"], lines, *cells])
    kinds = [f"{c['size']}, {'no KL' if not c['kl'] else 'KL'}" for c in cases]
    one, two = (lines for lines, _ in counts.values())
    removed = counts["depth 1"][1]
    return "\n".join(
        [
            "    python bench/foreign_trainer.py --json bench/results/foreign.json",
            "",
            "CPU seconds of an iteration, one thread, trainers in turn; in brackets how many times "
            f"faster than the original. {config['prompts']} prompts x {config['group']} leaves, "
            f"{config['steps']} steps, guidance {config['guidance']}, batches of "
            f"{config['batch']}; `tests/foreign/original.py` and what became of it. Random weights "
            "of diffusers' SD3 classes: `tiny` is the tests' own of width 32, where the overhead "
            "of small calls is part of the gain, `small` has width 128. With a KL both sides pay "
            "the reference's forward of both halves of guidance, which no batching saves. Depth 1 "
            "buys exactness, not time: the calls of the model are the same.",
            "",
            markdown(("trainer", "what", "lines", *kinds), rows),
            "",
            "Depth 1, the whole diff:",
            "",
            "```diff",
            *removed,
            *one,
            "```",
            "",
            f"Depth 2, all that is written; {len(counts['depth 2'][1])} lines go (encoding, "
            "sampling, decoding, log-probabilities, losses, accumulation):",
            "",
            "```diff",
            *two,
            "```",
            "",
            where(result["meta"]),
        ]
    )
