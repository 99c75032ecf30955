"""Write README's tables from bench/results, so that no number is typed by hand.

python bench/readme.py [--check]
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from readme_foreign import foreign
from readme_pruning import census, learning, masked, packing, pruning
from readme_scaling import faults, scaling
from readme_text import markdown, where

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def tree_throughput(result: dict[str, Any]) -> str:
    """Formats the ratios between plans, and the work of each."""
    config = result["config"]
    return "\n".join(
        [
            "    python bench/tree_throughput.py --plans all "
            "--json bench/results/tree_throughput_cpu.json",
            "",
            f"Model {config['model']}, {config['prompts']} prompts x {config['leaves']} leaves, "
            f"{config['steps']} steps, {config['dtype']}, one thread. A/B is how many times faster "
            "A is than B. Names without a prefix are the released loops at their own batch sizes, "
            "with one update per iteration: at batch 1 `dance` (DanceGRPO), `branch`, `branch_mix` "
            "(BranchGRPO), `mix`, `flash` (MixGRPO, its Flash), `g2rpo` (Granular-GRPO), in "
            "micro-batches of 9 `flow` (Flow-GRPO) and `guard` (GRPO-Guard), `tempflow` "
            "(TempFlow-GRPO) in batches of the children of a state; `tree` is TreeGRPO's algorithm "
            "box, node by node. `exact:` is the same algorithm, same gradient, in the engine: its "
            "own claim; `steel:` the released algorithm batched over all leaves, without sharing "
            "or tape; `engine` the `branchcore` recipe, another estimator at equal leaves: an "
            "algorithm + engine ratio, not one at equal gradient variance. `tempflow` and `g2rpo` "
            "score leaves at every step of a trunk, so that no `engine` ratio is at equal leaves.",
            "",
            "![CPU seconds of every plan, and the ratios](bench/results/tree_throughput_cpu.png)",
            "",
            *plans_and_ratios(result),
        ]
    )


def plans_and_ratios(result: dict[str, Any]) -> list[str]:
    """Formats both tables of a run of tree_throughput."""
    ratios = [
        [
            name,
            f"**{r['cpu']:.1f}x**",
            f"{r['ci95'][0]:.1f} to {r['ci95'][1]:.1f}",
            f"{r['wall']:.1f}x",
        ]
        for name, r in result["ratios"].items()
    ]
    plans = [
        [name, f"{p['cpu_s']:.2f}", *(str(p[k]) for k in "FEPD")]
        for name, p in result["plans"].items()
    ]
    head = ("plan", "CPU s", "forwards", "trained edges", "trained parents", "decodes")
    return [
        markdown(("A/B", "CPU seconds", "95 % CI", "wall"), ratios),
        "",
        markdown(head, plans),
        "",
        where(result["meta"]),
    ]


def tree_throughput_sd3(result: dict[str, Any]) -> str:
    """Formats the same for a diffusers pipeline with guidance and a LoRA."""
    config = result["config"]
    return "\n".join(
        [
            f"    python bench/tree_throughput.py --model sd35m512-small --prompts "
            f"{config['prompts']} --plans {','.join(config['plans'])} \\",
            "        --json bench/results/tree_throughput_sd3.json",
            "",
            f"diffusers' SD3 classes at a toy size, with classifier-free guidance and a LoRA: "
            f"{config['prompts']} prompts x {config['leaves']} leaves, {config['steps']} steps, "
            f"{config['dtype']}, one thread. A released loop pays the unconditional half with its "
            "graph and detaches it afterwards; the engine keeps it out of the graph, and computes "
            "text, time and modulation once per prompt and noise level. On this size overhead of "
            "small batches is part of the difference: by the measured cost of large calls alone "
            f"exact:flow/flow would be {result['ratios']['exact:flow/flow']['predicted']:.1f}x.",
            "",
            *plans_and_ratios(result),
        ]
    )


def ops_cpu(result: dict[str, Any]) -> str:
    """Formats the ops' times beside eager torch's."""
    rows = [
        [
            r["op"],
            r["case"],
            f"{r['ms']:.1f}",
            f"**{r['ratio']:.1f}x**",
            f"{r['ratio_blocked']:.1f}x",
            f"{100 * r['floor_share']:.0f} % of {r['floor_of']}",
        ]
        for r in result["rows"]
    ]
    head = ("op", "case", "ms", "vs eager", "vs eager, cache-blocked", "floor")
    return "\n".join(
        [
            "    python bench/ops.py --json bench/results/ops_cpu.json",
            "",
            "One core. Eager torch computes what the released trainers compute, on the whole wave "
            "at once, and, cache-blocked, one parent after the other.",
            "",
            markdown(head, rows),
            "",
            where(result["meta"]),
        ]
    )


def digits_training(result: dict[str, Any]) -> str:
    """Formats what training reaches on held-out noise."""
    names = ("both_right", "judge_accuracy", "diversity", "nearest_real", "reward")
    base = result["rows"][0]["base"]
    rows = [["base model", "", "", "", *(f"{base[n]:.3f}" for n in names)]]
    rows += [
        [r["recipe"], str(r["seed"]), str(r["iterations"]), f"{r['cpu_s']:.0f}"]
        + [f"{r[n]:.3f}" for n in names]
        for r in result["rows"]
    ]
    head = ("recipe", "seed", "iterations", "CPU s", "both right", "judge", "diversity")
    return "\n".join(
        [
            "    python bench/digits_training.py --recipes branch_mix branch_grpo dance_grpo",
            "",
            "On held-out noise, 60 prompts x 8: share with both style words right, accuracy of a "
            "judge no reward has seen, pixel std over noise (the base model's diversity buys "
            "nothing: it ignores the style words), distance to the nearest real digit (real "
            f"digits: 2.05). At most {result['budget_s']:.0f} CPU seconds of iterations, one "
            "thread. Options differ by recipe and were tuned by hand on this task, `branch_mix` "
            "most: a demonstration, not a ranking of methods. The rising distance to real digits "
            "is faint grey behind them: the reward's own loophole, which the KL holds down.",
            "",
            markdown((*head, "nearest real", "reward"), rows),
            "",
            where(result["meta"]),
        ]
    )


def aot(result: dict[str, Any]) -> str:
    """Formats what compilers made of the GPU kernels, an op and language a row."""
    meta, kernels = result["meta"], result["kernels"]
    groups = sorted({(r["op"], r["language"]) for r in kernels if r["op"] != "device"})
    rows = []
    for op, language in groups:
        own = [r for r in kernels if (r["op"], r["language"]) == (op, language)]
        hopper = [r for r in own if r["chip"] == "sm_90"]
        costs = [r["instructions_per_normal"] for r in hopper]
        costs = [cost for cost in costs if cost is not None]
        rows.append(
            [
                op,
                {"cuda": "CUDA C++", "triton": "Triton"}[language],
                str(len({r["kernel"] for r in own})),
                str(len(own)),
                str(max(r["registers"] for r in hopper)),
                f"{min(costs):.1f} to {max(costs):.1f}" if costs else "",
            ]
        )
    head = ("op", "language", "kernels", "compiled", "registers", "instructions per normal")
    versions = f"Triton {meta['triton']}, nvcc {meta['nvcc']}"
    return "\n".join(
        [
            f"    {AOT_COMMAND}",
            "",
            "Triton for sm_80, sm_90, sm_100 and gfx942; CUDA C++ for sm_80, 86, 89, 90, 100, 120, "
            "and PTX. Registers are the most of any build on sm_90; instructions per normal are "
            "SASS on sm_90, of one iteration that draws one stream, everything included.",
            "",
            markdown(head, rows),
            "",
            f"{versions}, {meta['date']}, commit {meta['commit'][:9]}.",
        ]
    )


AOT_COMMAND = "python bench/aot.py --json bench/results/aot.json"
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "tree_throughput": ("tree_throughput_cpu.json", tree_throughput),
    "tree_throughput_sd3": ("tree_throughput_sd3.json", tree_throughput_sd3),
    "ops_cpu": ("ops_cpu.json", ops_cpu),
    "digits_training": ("digits_training.json", digits_training),
    "aot": ("aot.json", aot),
    "census": ("census.json", census),
    "pruning": ("pruning.json", pruning),
    "masked": ("masked_backward.json", masked),
    "learning": ("learning.json", learning),
    "packing": ("packing.json", packing),
    "scaling": ("scaling.json", scaling),
    "faults": ("faults.json", faults),
    "foreign": ("foreign.json", foreign),
}


def render(text: str) -> str:
    """Returns README with every section made anew from its result file."""
    for name, (file, section) in SECTIONS.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        if not (RESULTS / file).exists():
            sys.exit(f"readme: {RESULTS / file} must exist, got no such file; see bench/README.md")
        body = section(json.loads((RESULTS / file).read_text()))
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if README is not up to date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old)
    if check and new != old:
        sys.exit("README.md must be up to date with bench/results; try python bench/readme.py")
    path.write_text(new)


if __name__ == "__main__":
    main()
