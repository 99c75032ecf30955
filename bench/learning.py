"""Learning curves of pruned training on the embedded digits model, at equal CPU time.

    python bench/learning.py [--seeds 0 1 2 3 4] [--budget 100] [--arms full dppo ...] [--jobs 1]
        [--every 10] [--out runs/learning] [--json bench/results/learning.json]
        [--plot bench/results/learning.png]

BranchGRPO with its digits preset, and five ways to leave out trained parents; nothing else differs
between arms. A run ends with the first evaluation (60 prompts x 8 held-out noises, not counted)
after its training iterations have used the budget of CPU seconds, so that every curve is known at
the budget: between evaluations it is a straight line. Each run is a process of its own with one
thread, `--jobs` of them at a time; seeds one after the other, all arms of a seed side by side, so
that the load of the machine hits all arms alike. Runs that exist are continued, not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from learning_picture import draw
from learning_summary import planned_parents, reaches, summary
from learning_words import table
from machine import commit, facts
from tqdm import tqdm

from branchcore import recipes
from branchcore.models.digits.task import DigitsTask
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.recipe import Recipe
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "branch_grpo"
ENDLESS = 10**9
# The paper's depth window covers 5 of 19 trained depths at T = 20 and moves every 30 iterations; 2
# of 9 is the same share of the parents (0.4) at T = 10, and leaves it room to move twice.
DEPTH = {"pruning": "depth", "prune_depths": (6, 7), "slide_interval": 30}
ARMS: dict[str, tuple[dict[str, Any], PruningConfig]] = {
    "full": ({}, PruningConfig()),
    "dppo": ({}, PruningConfig(rule="threshold", rate=0.7)),
    "optimal": ({}, PruningConfig(rule="optimal", rate=0.5)),
    "cppo": ({}, PruningConfig(rule="cppo", rate=0.5)),
    "parent_top1": ({}, PruningConfig(rule="parent_top1")),
    "depth": (DEPTH, PruningConfig()),
}


class OutOfBudget(Exception):
    """The run has used its CPU seconds."""


class Run(NamedTuple):
    """One run of an arm."""

    arm: str
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        """What the run's process prints."""
        return self.folder.with_suffix(".log")

    @property
    def commits(self) -> Path:
        """The commit of every start."""
        return self.folder.with_suffix(".commits")


def build(arm: str, task: DigitsTask) -> tuple[Recipe, dict[str, Any]]:
    """Returns an arm's recipe and its fields of TrainerConfig."""
    options, prune = ARMS[arm]
    preset = task.presets[NAME]
    recipe = recipes.build(NAME, task.sigmas, **{**preset.recipe, **options})
    return recipe, {**preset.trainer, "iterations": ENDLESS, "prune": prune}


def train(run: Run, budget: float, every: int) -> None:
    """Trains until the first evaluation past the budget; notes the commit beside the run."""
    task = DigitsTask()
    recipe, fields = build(run.arm, task)
    fields |= {"evaluate_every": every, "checkpoint_every": every}

    def stop(metrics: dict[str, Any]) -> None:
        if "eval/reward" in metrics and metrics.get("cpu_s", 0.0) >= budget:
            raise OutOfBudget

    trainer = Trainer(
        task.model,
        task.prompts,
        task.reward,
        recipe,
        TrainerConfig(**fields, seed=run.seed),
        run.folder,
        evaluate=task.evaluate,
        callbacks=[stop],
        facts={"model": "digits", "arm": run.arm},
        resume=True,
    )
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.commits.open("a") as file:
        file.write(f"{commit()}\n")
    try:
        trainer.run()
    except OutOfBudget:
        trainer.save()


def train_all(runs: Sequence[Run], jobs: int, options: Sequence[str]) -> None:
    """Trains runs in processes, in order, `jobs` at a time.

    Raises:
        RuntimeError: a process failed; the others are stopped, and continue in the next call.
    """
    left, active = list(runs), dict[Run, subprocess.Popen[bytes]]()
    try:
        with tqdm(total=len(left), unit="run") as bar:
            while left or active:
                while left and len(active) < jobs:
                    run = left.pop(0)
                    active[run] = _start(run, options)
                    bar.set_postfix_str(", ".join(f"{r.arm} {r.seed}" for r in active))
                time.sleep(0.1)
                for run in [run for run, process in active.items() if process.poll() is not None]:
                    _check(run, active.pop(run).returncode)
                    bar.update()
    finally:
        for process in active.values():
            process.terminate()
            process.wait()


def _start(run: Run, options: Sequence[str]) -> subprocess.Popen[bytes]:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "--only", run.arm, str(run.seed), *options]
    with run.log.open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)


def _check(run: Run, code: int) -> None:
    if code:
        last = run.log.read_text().replace("\r", "\n").splitlines()[-15:]
        raise RuntimeError(
            f"learning: {run.arm}, seed {run.seed} must end with status 0, got {code}; its log is "
            f"{run.log} and ends with\n" + "\n".join(last)
        )


def result_of(runs: Sequence[Run], budget: float) -> dict[str, Any]:
    """Returns the result file of finished runs."""
    task = DigitsTask()
    folders = {arm: {r.seed: r.folder for r in runs if r.arm == arm} for arm in ARMS}
    folders = {arm: found for arm, found in folders.items() if found}
    built = {arm: build(arm, task) for arm in folders}
    planned = {
        arm: planned_parents(recipe, fields["prompts_per_iteration"])
        for arm, (recipe, fields) in built.items()
    }
    commits = {line for r in runs for line in r.commits.read_text().split()}
    return {
        "meta": facts(),
        "commits": sorted(commits),
        "recipe": NAME,
        **summary(folders, planned, budget),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Learning curves of pruned training.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", type=float, default=100.0, help="CPU seconds per run")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--every", type=int, default=10, help="iterations between evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--json", type=Path, default=RESULTS / "learning.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "learning.png")
    parser.add_argument("--only", nargs=2, metavar=("ARM", "SEED"), help="train this run alone")
    args = parser.parse_args(words)
    torch.set_num_threads(1)

    def run_of(arm: str, seed: int) -> Run:
        return Run(arm, seed, args.out / f"{arm}-{seed}")

    if args.only is not None:
        train(run_of(args.only[0], int(args.only[1])), args.budget, args.every)
        return
    runs = [run_of(arm, seed) for seed in args.seeds for arm in args.arms]
    options = ["--budget", str(args.budget), "--every", str(args.every), "--out", str(args.out)]
    train_all([r for r in runs if not reaches(r.folder, args.budget)], args.jobs, options)
    result = result_of(runs, args.budget)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.plot)
    print(table(result))


if __name__ == "__main__":
    main()
