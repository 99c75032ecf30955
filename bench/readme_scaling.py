"""Sections of README about many processes: what they say to each other, and when they fail."""

from __future__ import annotations

from typing import Any

from readme_text import markdown, where


def _size(gigabytes: float) -> str:
    return f"{gigabytes / 1e3:.1f} TB" if gigabytes >= 1e3 else f"{gigabytes:.3g} GB"


def scaling(result: dict[str, Any]) -> str:
    """Formats what a GPU sends in an iteration, by the closed forms."""
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for r in result["many"]:
        cells.setdefault((r["model"], r["method"]), {})[r["gpus"]] = r
    gpus = sorted({r["gpus"] for r in result["many"]})
    rows = [
        [
            *names,
            *(_size(found[n]["gigabytes"]) for n in gpus),
            f"{found[gpus[-1]]['collectives']:,}",
            "" if found[gpus[-1]]["control"] is None else str(found[gpus[-1]]["control"]),
        ]
        for names, found in cells.items()
    ]
    head = ("model", "way", *(f"{n} GPUs" for n in gpus), "collectives", "small ones")
    counted, calls = result["counted"], result["reshard_calls"]
    worlds = sorted({r["processes"] for r in counted})
    named = f"{', '.join(map(str, worlds[:-1]))} and {worlds[-1]}"
    loops = "; ".join(
        f"{o['name']}: {o['rollout']} forwards, {o['edges']} edges, {o['updates']} updates"
        for o in result["released"]
    )
    return "\n".join(
        [
            "    python bench/scaling.py --json bench/results/scaling.json",
            "",
            "What each GPU sends in one iteration, in rings, on so many GPUs, and how many "
            f"collectives that takes on {gpus[-1]} of them. Computed by closed forms; nothing "
            f"here ran on a GPU. On {named} processes over gloo every collective of "
            f"{len(counted)} iterations of the digits model equals these forms in number and "
            "bytes (`--mixed`, which halves the bytes of a gather, is not among them). What "
            "replicated weights, and shards without `--reshard`, send does not depend on tree, "
            "prompts or batch, only on the number of updates: one here, unless the row says "
            "otherwise. "
            f"`--reshard` makes {calls['calls']} forwards and {calls['passes']} passes here (two "
            f"prompts of BranchGRPO's FLUX preset on a GPU, batches of {result['max_batch']}). "
            "The released loops gather all weights in fp32 for every forward and every backward, "
            "one row each, and reduce gradients after every edge; their calls per GPU are counted "
            f"from the scripts, not run ({loops}). Small ones: errors, counts, metrics, norms, of "
            "at most a few hundred bytes per process.",
            "",
            markdown(head, rows),
            "",
            where(result["meta"]),
        ]
    )


def faults(result: dict[str, Any]) -> str:
    """Formats what became of a run under random faults."""
    counts, kills = result["faults"], result["kills"]
    quiet = ", ".join(f"{value:.3f}" for value in result["quiet"])
    once = "each logged once" if result["every_iteration_once"] else "not each logged once"
    last = ", the last that all quiet runs have" if result["cut_short"] else ""
    return "\n".join(
        [
            "    python bench/faults.py --json bench/results/faults.json",
            "",
            f"{result['minutes']:.0f} minutes of BranchGRPO on the digits model, two processes "
            f"under torchrun: {counts.get('raise', 0)} calls of the reward raised, "
            f"{counts.get('hang', 0)} hung, and a process was killed {len(kills)} times. The run "
            f"made {result['iterations']} iterations, {once}, and masked "
            f"{result['masked_leaves']:.0f} leaves. Held-out reward at iteration "
            f"{result['judged_at']}{last}: {result['disturbed']:.3f}; of quiet runs, the first "
            f"with the same seed: {quiet}.",
            "",
            where(result["meta"]),
        ]
    )
