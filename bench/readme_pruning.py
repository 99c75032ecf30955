"""Sections of README about what is left out: pruning, packing, work of published models."""

from __future__ import annotations

from typing import Any

import learning_words
from readme_text import markdown, where


def pruning(result: dict[str, Any]) -> str:
    """Formats what pruning costs in variance and saves in time."""
    variance = [
        [
            f"{r['rate']:g}",
            f"{r['share']:.2f}",
            *(f"{r[f'{name}_ratio']:.2f}" for name in ("rows", "history", "uniform")),
        ]
        for r in result["variance"]
    ]
    whole = next(t for t in result["times"] if (t["rule"], t["path"]) == ("all", "tape"))
    times = [
        [
            t["rule"],
            "on the tape" if t["path"] == "tape" else "no tape",
            f"{t['kept_share']:.2f}",
            f"{t['cpu_s']:.2f}",
            f"{t['ratio']:.2f}",
            f"{t['cpu_s'] / whole['cpu_s']:.2f}",
        ]
        for t in result["times"]
    ]
    return "\n".join(
        [
            "    python bench/pruning.py --prompts 20 --rounds 6 --json bench/results/pruning.json",
            "",
            f"Added variance against DPPO's `threshold` rule at equal expected cost, on "
            f"{result['trees']} recorded trees of the digits model with the gradient of every "
            "parent measured, and the CPU seconds of an update at half the parents, in turn with "
            "the whole one:",
            "",
            markdown(
                ("rate of `threshold`", "kept", "`optimal`", "`history`", "`uniform`"), variance
            ),
            "",
            markdown(
                ("rule", "where", "kept", "CPU s", "of all, same way", "of all on the tape"), times
            ),
            "",
            where(result["meta"]),
        ]
    )


def learning(result: dict[str, Any]) -> str:
    """Formats what pruning buys and costs in learning."""
    learning_words.check(result)
    meta, commits = result["meta"], result["commits"]
    short = ", ".join(commit[:9] for commit in commits)
    others = "" if commits == [meta["commit"]] else f" Runs of commit {short}."
    unbiased = [name for name in result["arms"] if name in learning_words.UNBIASED]
    return "\n".join(
        [
            f"    {learning_words.COMMAND}",
            "",
            f"`{result['recipe']}` with its digits preset, {result['budget_s']:g} CPU seconds of "
            f"iterations, one thread, {len(result['seeds'])} seeds: mean ± half the 95 % interval "
            "(Student's t). Measures as above, on held-out noise, on the straight line between the "
            "evaluations around the budget. Runs of one seed share their noise: differences to "
            f"`full` are of the same seed. {learning_words.named(unbiased)} have the same expected "
            "gradient, the others drop terms of it. All settings are those of `full`, which they "
            "were tuned for.",
            "",
            "![Learning curves at equal CPU time](bench/results/learning.png)",
            "",
            markdown(learning_words.head(result), learning_words.rows(result)),
            "",
            *learning_words.sentences(result),
            "Every interval is for itself, of one task and one base model: arms whose intervals "
            "overlap are not ranked.",
            "",
            where(meta) + others,
        ]
    )


def masked(result: dict[str, Any]) -> str:
    """Formats what a tape costs whose rows were dropped after the rewards."""
    first = result["rows"][0]
    rows = [
        [
            str(r["width"]),
            f"{r['all_ms']:.0f}",
            *(f"{r[name]:.2f}" for name in ("whole", "masked", "again", "half")),
        ]
        for r in result["rows"]
    ]
    head = ("width", "backward of all, ms", "whole", "masked", "forward and backward", "half")
    return "\n".join(
        [
            "    python bench/masked_backward.py --json bench/results/masked_backward.json",
            "",
            f"The backward of a tape of {first['rows']} rows of which {first['kept']} are kept "
            "after the rewards, in that of all rows: whole, with zeros for the others; masked; no "
            "tape, a forward and backward of the kept ones; and half a tape, which is the least. A "
            "LoRA on a transformer of two blocks:",
            "",
            markdown(head, rows),
            "",
            where(result["meta"]),
        ]
    )


def packing(result: dict[str, Any]) -> str:
    """Formats how full calls are."""
    rows = [
        [
            r["set"],
            r["space"],
            *(f"{r['density_by_window'][window]:.3f}" for window in ("1", "64")),
            f"{r['density_sorted']:.3f}",
            f"{r['ms']['100000']:.0f} ms",
        ]
        for r in result["rows"]
    ]
    head = ("set", "tokens of a call", "next-fit", "window 64", "all sorted", "100,000 items")
    return "\n".join(
        [
            "    python bench/packing.py --json bench/results/packing.json",
            "",
            "Filled share of calls of `packing.pack`, 20,000 rows of mixed sizes, which the script "
            "describes; `clips` are stills and 33-frame videos of 512 to 1024 pixels a side.",
            "",
            markdown(head, rows),
            "",
            where(result["meta"]),
        ]
    )


def census(result: dict[str, Any]) -> str:
    """Formats the work of published models, and what sharing saves of it."""
    kinds = ("attention", "MLP", "projections", "text K/V", "prompt and level")
    rows = [
        [
            r["shape"],
            f"{r['parameters'] / 1e9:.2f} B",
            f"{r['tera_per_row']:.2f}",
            *(f"{100 * r['parts'][kind]:.1f} %" for kind in kinds),
            f"{r['plain_tera']:.1f}",
            f"{r['shared_tera']:.1f}",
            f"{100 * (1 - r['shared_tera'] / r['plain_tera']):.2f} %",
            f"{r['decode_tera']:.1f}",
        ]
        for r in result["rows"]
    ]
    head = ("model", "parameters", "TFLOP per node", *kinds)
    count = result["rows"][0]["rows"]
    return "\n".join(
        [
            "    python bench/census.py --json bench/results/census.json",
            "",
            "One forward of a node, counted on the meta device; a multiply-add is two. The last "
            f"columns are {count} nodes of one prompt and noise level in one call: as they are, "
            "with what they have in common computed once, what that saves, and the decoding of "
            "one image or video.",
            "",
            markdown((*head, "plain", "shared", "saved", "decode"), rows),
            "",
            where(result["meta"]),
        ]
    )
