"""Train the embedded digits model with several recipes and seeds at equal CPU time.

    python bench/digits_training.py [--recipes branch_mix ...] [--seeds 0 1 2] [--budget 150]
        [--out runs/digits_training] [--json bench/results/digits_training.json]

Each run uses the recipe's measured defaults (branchcore/models/digits/presets.py) and stops when
its training iterations have used the budget of CPU seconds; evaluation is not counted. A row holds
the last held-out evaluation within the budget, 60 prompts x 8 noises that no training has seen.
Runs that exist are continued, not repeated. One thread.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import facts

from branchcore import recipes
from branchcore.models.digits.task import DigitsTask
from branchcore.plots import read_metrics
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

MEASURES = ("both_right", "judge_accuracy", "diversity", "nearest_real", "reward")


class OutOfBudget(Exception):
    """The run has used its CPU seconds."""


def train(recipe_name: str, seed: int, out: Path, budget: float) -> None:
    """Trains to the preset's iterations or to the budget, whichever comes first."""
    task = DigitsTask()
    preset = task.presets[recipe_name]
    config = TrainerConfig(**preset.trainer, seed=seed)

    def stop(metrics: dict[str, Any]) -> None:
        if metrics.get("cpu_s", 0.0) > budget:
            raise OutOfBudget

    trainer = Trainer(
        task.model,
        task.prompts,
        task.reward,
        recipes.build(recipe_name, task.sigmas, **preset.recipe),
        config,
        out,
        evaluate=task.evaluate,
        callbacks=[stop],
        facts={"model": "digits"},
        resume=True,
    )
    try:
        trainer.run()
    except OutOfBudget:
        print(f"{out}: stopped at {budget:.0f} CPU seconds")


def row(recipe_name: str, seed: int, out: Path, budget: float) -> dict[str, Any]:
    """Reads a run's base and last evaluation within the budget."""
    logged = [r for r in read_metrics(out / "metrics.jsonl") if "eval/both_right" in r]
    last = [r for r in logged if r.get("cpu_s", 0.0) <= budget][-1]
    return {
        "recipe": recipe_name,
        "seed": seed,
        "iterations": last["iteration"],
        "cpu_s": round(last.get("cpu_s", 0.0), 1),
        **{name: round(last[f"eval/{name}"], 4) for name in MEASURES},
        "base": {name: round(logged[0][f"eval/{name}"], 4) for name in MEASURES},
        "curve": [[r["iteration"], round(r["eval/both_right"], 3)] for r in logged],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table."""
    head = ("recipe", "seed", "iterations", "cpu_s", *MEASURES)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(r[name]) for name in head) + " |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["branch_mix"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=150.0, help="CPU seconds per run")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_training"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for recipe_name in args.recipes:
        for seed in args.seeds:
            out = args.out / f"{recipe_name}-{seed}"
            train(recipe_name, seed, out, args.budget)
            rows.append(row(recipe_name, seed, out, args.budget))
            print(table(rows))
    if args.json is not None:
        old = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        new = {(r["recipe"], r["seed"]) for r in rows}
        kept = [r for r in old if (r["recipe"], r["seed"]) not in new]
        result = {"meta": facts(), "budget_s": args.budget, "rows": kept + rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
