"""Time and work of the released execution plans and of the engine, on the same trees and noise.

    python bench/tree_throughput.py [--model auto] [--leaves 16] [--steps 10] [--prompts 16]
        [--plans core] [--budget 110] [--device auto] [--json out.json] [--plot out.png]
        [--check-only]

`core` plans are DanceGRPO, Flow-GRPO, BranchGRPO and branchcore's own recipe; `all` takes the other
released loops too, and longer. Checks run first; a failed one ends the run with exit code 1 before
anything is timed. Rounds are interleaved, a ratio is the median over rounds of paired times, its
interval a bootstrap over rounds. On a CPU one thread is used and CPU seconds are the headline:
neighbours move wall time. On a GPU, wall seconds with a wait at both ends of every stage are; the
model is a random one of SD3.5-M's shapes, which is checked at a small size, and `core` is without
BranchGRPO's mixed form.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from attempts import write_json
from checks import run_checks
from machine import facts, load_average
from measure import call_costs, keep_freed_memory
from plans import CORE, PLANS
from ratios import clock_of, ratios
from rounds import ROUNDS, Bench, Samples
from tables import print_checks, print_plans, print_ratios
from tqdm import tqdm
from workload import FACTORS, MODELS, RECIPES, Workload, recipe_options, workload

DEFAULT_PROMPTS = {"digits": 16}
DEFAULT_BUDGET = {"core": 110.0, "all": 420.0}
GPU_CORE = [name for name in CORE if not name.endswith("branch_mix")]
FOOTER = """
predicted: forward = 1, forward + backward = {pair:.2f}; as released {released_forward:.2f} and
{released_pair:.2f} (measured); the rest is batching and overhead. MiB: growth of the peak {memory}
within one iteration. exact:x/x is the same gradient. engine/x is another estimator, at equal leaves
and not at equal gradient variance; tempflow and g2rpo score leaves at every step of a trunk, so
that they have no equal. Batch 1, as released, costs a small model mostly overhead; steel:x is the
same loop batched."""


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tree_throughput", description=(__doc__ or "").splitlines()[0]
    )
    known = ", ".join(map(str, FACTORS))
    models = f"{', '.join(MODELS)}; auto = digits, on a GPU sd35m-shape"
    parser.add_argument("--model", default="auto", help=models)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--leaves", type=int, default=16, help=f"per prompt: {known}")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--prompts", type=int, help="per iteration; default 1, digits: 16")
    parser.add_argument("--plans", default="core", help=f"core, all, or of {','.join(PLANS)}")
    budgets = ", ".join(f"{name} {seconds:g}" for name, seconds in DEFAULT_BUDGET.items())
    parser.add_argument("--budget", type=float, help=f"seconds for everything; default {budgets}")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--plot",
        type=Path,
        help="PNG to draw; default: beside --json, else tree_throughput.png here",
    )
    parser.add_argument("--check-only", action="store_true", help="stop after the checks")
    chosen = parser.parse_args(arguments)
    on_gpu = chosen.device == "cuda" or (chosen.device == "auto" and torch.cuda.is_available())
    named = {"core": GPU_CORE if on_gpu else CORE, "all": PLANS}
    chosen.plans = list(named.get(chosen.plans, chosen.plans.split(",")))
    if chosen.budget is None:
        chosen.budget = DEFAULT_BUDGET["core" if set(chosen.plans) <= set(CORE) else "all"]
    unknown = [name for name in chosen.plans if name not in PLANS]
    if unknown:
        parser.error(f"--plans must be from {', '.join(PLANS)}, got {', '.join(unknown)}")
    if chosen.budget <= 0:
        parser.error(f"--budget must be positive, got {chosen.budget:g}")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    try:
        chosen.load = workload(chosen.model, chosen.leaves, chosen.steps, device)
    except ValueError as error:
        parser.error(str(error))
    if chosen.plot is None:
        chosen.plot = (chosen.json or Path("tree_throughput.json")).with_suffix(".png")
    if chosen.prompts is None:
        chosen.prompts = DEFAULT_PROMPTS.get(chosen.load.model_name, 1)
    for flag, path in (("--json", chosen.json), ("--plot", chosen.plot)):
        if path and not path.parent.is_dir():
            parser.error(f"{flag} must be in a folder that exists, got {path}")
    if not chosen.check_only and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib, got none; try pip install 'branchcore[demo]'")
    if not 1 <= chosen.prompts <= 60:
        parser.error(f"--prompts must be 1 to 60, got {chosen.prompts}")
    return chosen


def time_plans(chosen: argparse.Namespace, start: float, result: dict[str, Any]) -> None:
    """Times all plans within the budget, prints the tables and fills in the result."""
    load: Workload = chosen.load
    bench = Bench(load, chosen.plans, chosen.prompts)
    end, clock = start + chosen.budget, clock_of(load.device)
    rows = {"cpu": 64}.get(load.device.type, load.max_batch or 64)
    costs = call_costs(bench.task(chosen.plans[0], 1).view, load.device, rows)
    limits = {"tape": bench.load.tape, "max_batch": load.max_batch}
    result["config"] |= {"clock": clock, "costs": costs._asdict(), **limits}

    def fill_in(samples: Samples) -> None:
        plans = {name: bench.summary(name, samples[name], memory[name]) for name in bench.names}
        result["config"]["rounds"] = len(next(iter(samples.values())))
        found = ratios(plans, costs, clock, bench.load.tape)
        result.update(plans=plans, ratios=found)
        if bench.too_large:
            result["too_large"] = bench.too_large
        write_json(chosen.json, result)

    with tqdm(
        total=len(chosen.plans) * (1 + ROUNDS[0]), unit="run", leave=False, disable=None
    ) as bar:
        memory = bench.warm_up(bar, end - time.perf_counter())
        bench.rounds(bar, end, fill_in)
    print_plans(result["plans"], chosen.prompts, clock)
    print_ratios(result["ratios"], clock)
    print(
        FOOTER.format(
            **costs._asdict(), memory="resident set" if clock == "cpu" else "CUDA allocation"
        )
    )
    for name, error in bench.too_large.items():
        print(f"\nnot timed, out of memory: {name}: {error.splitlines()[0]}")


def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    chosen = options(arguments)
    load: Workload = chosen.load
    if load.device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    meta = facts(load.device)
    checks = run_checks(load, chosen.plans)
    checked = time.perf_counter() - start
    print_checks(checks)
    failed = [check.name for check in checks if not check.passed]
    result: dict[str, Any] = {
        "meta": meta,
        "config": {
            "model": load.model_name,
            "leaves": load.leaves,
            "steps": load.steps,
            "splits": load.splits,
            "factors": FACTORS[load.leaves],
            "prompts": chosen.prompts,
            "plans": chosen.plans,
            "recipes": RECIPES,
            "options": recipe_options(load.leaves, load.steps),
            "budget_s": chosen.budget,
            "device": str(load.device),
            "dtype": str(load.timed_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "checks": {c.name: {"value": c.value, "limit": c.limit, "pass": c.passed} for c in checks},
        "plans": {},
        "ratios": {},
    }
    write_json(chosen.json, result)
    if not failed and not chosen.check_only:
        time_plans(chosen, start, result)
    meta |= {
        "load_average_end": load_average(),
        "checks_s": checked,
        "total_s": time.perf_counter() - start,
    }
    print(f"\n{meta['total_s']:.0f} s, load average {meta['load_average_start']} to", end=" ")
    processor = meta["gpu"] or meta["cpu"]
    print(f"{meta['load_average_end']}, {processor}, torch {meta['versions']['torch']}")
    write_json(chosen.json, result)
    if result["plans"]:
        from picture import draw

        draw(result, chosen.plot)
        print(f"wrote {chosen.plot}")
    if failed:
        print(f"tree_throughput: checks must pass, failed {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or result.get("too_large") else 0


if __name__ == "__main__":
    sys.exit(main())
