"""Time and work of the released execution plans and of the engine, on the same trees and noise.

    python bench/tree_throughput.py [--model auto] [--leaves 16] [--steps 10] [--prompts 16]
        [--plans core] [--budget 110] [--json out.json] [--plot out.png] [--check-only]

`core` plans are DanceGRPO, Flow-GRPO, BranchGRPO and branchcore's own recipe; `all` takes the other
released loops too, and longer. Checks run first; a failed one ends the run with exit code 1 before
anything is timed. Rounds are interleaved, a ratio is the median over rounds of paired times, its
interval a bootstrap over rounds. On a CPU one thread is used and CPU seconds are the headline:
neighbours move wall time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from checks import run_checks
from machine import facts, load_average
from measure import PeakMemory, keep_freed_memory, pair_cost
from plans import CORE, PLANS
from plans.task import Clock
from ratios import Sample, ratios, summary
from tables import print_checks, print_plans, print_ratios
from tqdm import tqdm
from work import closed_form
from workload import FACTORS, MODELS, RECIPES, Workload, recipe_options, workload

ROUNDS = (3, 10)
AIM = 8
DEFAULT_PROMPTS = {"digits": 16, "tiny": 1}
DEFAULT_BUDGET = {"core": 110.0, "all": 420.0}
FOOTER = """
predicted: forward = 1, forward + backward = {pair:.2f} (measured); the rest is batching and
overhead. MiB: growth of the peak resident set within one iteration. exact:x/x is the same gradient.
engine/x is another estimator, at equal leaves and not at equal gradient variance; tempflow and
g2rpo score leaves at every step of a trunk, so that they have no equal. Batch 1, as released, costs
a small model mostly overhead; steel:x is the same loop batched."""


class Bench:
    """One model and optimizer, and the tasks of all plans on it."""

    def __init__(self, load: Workload, names: list[str], prompts: int) -> None:
        self.load, self.names, self.prompts = load, names, prompts
        self.model, self.reward = load.model(prompts, torch.float32), load.reward()
        # a step of size 0 costs what any step costs and leaves the weights to the next plan
        self.optimizer = torch.optim.AdamW(self.model.module.parameters(), lr=0.0)
        self.timed = dict.fromkeys(names, prompts)

    def task(self, name: str, prompts: int) -> Any:
        recipe = PLANS[name].recipe
        return self.load.task(recipe, self.model, self.reward, prompts, optimizer=self.optimizer)

    def run(self, name: str, prompts: int | None = None) -> Sample:
        prompts = prompts or self.timed[name]
        task, clock = self.task(name, prompts), Clock(self.load.device)
        PLANS[name].run(task, clock)
        return Sample(clock, self.prompts / prompts)

    def warm_up(self, bar: Any, left: float) -> dict[str, float | None]:
        """Runs every plan once, then decides how many prompts the prompt-by-prompt plans time.

        Returns:
            Peak memory growth per plan, MiB: of one prompt where prompts run one by one.
        """
        memory: dict[str, float | None] = {}
        start, by_prompt, whole = time.perf_counter(), 0.0, 0.0
        for name in self.names:
            bar.set_description(f"warm-up {name}")
            one = PLANS[name].by_prompt
            # the first call of a process pays for allocations and lazy imports
            self.run(name, 1)
            before = time.perf_counter()
            with PeakMemory(self.load.device) as peak:
                self.run(name, 1 if one else self.prompts)
            memory[name] = peak.mib
            if one:
                by_prompt += time.perf_counter() - before
            else:
                whole += time.perf_counter() - before
            bar.update()
        # measuring memory handed free pages back, and no round is to fault them in again
        large = [name for name in self.names if not PLANS[name].by_prompt]
        if large:
            self.run(max(large, key=lambda name: memory[name] or 0.0))
        left -= time.perf_counter() - start
        if by_prompt:
            fits = int((left / AIM - whole) / by_prompt)
            chosen = min(max(fits, 1), self.prompts)
            self.timed |= {n: chosen for n in self.names if PLANS[n].by_prompt}
        return memory

    def rounds(self, bar: Any, end: float) -> dict[str, list[Sample]]:
        samples: dict[str, list[Sample]] = {name: [] for name in self.names}
        total, done = ROUNDS[0], 0
        while done < total:
            start = time.perf_counter()
            for name in self.names:
                bar.set_description(f"round {done + 1}/{total} {name}")
                samples[name].append(self.run(name))
                bar.update()
            done += 1
            if done == 1:
                now = time.perf_counter()
                more = int((end - now) / (now - start))
                total = min(max(1 + more, ROUNDS[0]), ROUNDS[1])
                bar.total = len(self.names) * (1 + total)
            # a neighbour that wakes up must not cost the reader minutes
            if done >= ROUNDS[0] and 2 * time.perf_counter() - start > end:
                break
        return samples

    def summary(self, name: str, samples: list[Sample], memory: float | None) -> dict[str, Any]:
        work = closed_form(name, self.load, self.task(name, self.prompts).plan(), self.prompts)
        timed = self.timed[name]
        return {
            **summary(samples, work),
            "peak_mem": memory,
            "prompts_timed": timed,
            "extrapolated": timed < self.prompts,
        }


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tree_throughput", description=(__doc__ or "").splitlines()[0]
    )
    known = ", ".join(map(str, FACTORS))
    parser.add_argument("--model", default="auto", help=f"{', '.join(MODELS)}; auto = digits")
    parser.add_argument("--leaves", type=int, default=16, help=f"per prompt: {known}")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--prompts", type=int, help="prompts per iteration; default 16, tiny: 1")
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
    chosen.plans = list({"core": CORE, "all": PLANS}.get(chosen.plans, chosen.plans.split(",")))
    if chosen.budget is None:
        chosen.budget = DEFAULT_BUDGET["core" if set(chosen.plans) <= set(CORE) else "all"]
    unknown = [name for name in chosen.plans if name not in PLANS]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if unknown:
        parser.error(f"--plans must be from {', '.join(PLANS)}, got {', '.join(unknown)}")
    if chosen.budget <= 0:
        parser.error(f"--budget must be positive, got {chosen.budget:g}")
    try:
        chosen.load = workload(chosen.model, chosen.leaves, chosen.steps, device)
    except ValueError as error:
        parser.error(str(error))
    if chosen.plot is None:
        chosen.plot = (chosen.json or Path("tree_throughput.json")).with_suffix(".png")
    if chosen.prompts is None:
        chosen.prompts = DEFAULT_PROMPTS[chosen.load.model_name]
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
    end = start + chosen.budget
    pair = pair_cost(bench.task(chosen.plans[0], 1).view, load.device)
    with tqdm(total=len(chosen.plans) * (1 + ROUNDS[0]), unit="run", leave=False) as bar:
        memory = bench.warm_up(bar, end - time.perf_counter())
        samples = bench.rounds(bar, end)
    plans = {name: bench.summary(name, samples[name], memory[name]) for name in chosen.plans}
    found = ratios(plans, pair)
    rounds = len(next(iter(samples.values())))
    result["config"] |= {"rounds": rounds, "pair_over_forward": pair}
    result |= {"plans": plans, "ratios": found}
    print_plans(plans, chosen.prompts)
    print_ratios(found)
    print(FOOTER.format(pair=pair))


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
            "dtype": "float32",
            "threads": torch.get_num_threads(),
        },
        "checks": {c.name: {"value": c.value, "limit": c.limit, "pass": c.passed} for c in checks},
        "plans": {},
        "ratios": {},
    }
    if not failed and not chosen.check_only:
        time_plans(chosen, start, result)
    meta |= {
        "load_average_end": load_average(),
        "checks_s": checked,
        "total_s": time.perf_counter() - start,
    }
    print(f"\n{meta['total_s']:.0f} s, load average {meta['load_average_start']} to", end=" ")
    print(f"{meta['load_average_end']}, {meta['cpu']}, torch {meta['versions']['torch']}")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["plans"]:
        from picture import draw

        draw(result, chosen.plot)
        print(f"wrote {chosen.plot}")
    if failed:
        print(f"tree_throughput: checks must pass, failed {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
