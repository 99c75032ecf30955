"""Command line: `python -m branchcore train | sample | plan | explain | doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from branchcore import checkpoint, doctor, recipes
from branchcore._dispatch import explain
from branchcore.drawing import draw
from branchcore.plots import curves
from branchcore.report import plan_report
from branchcore.schedule import shifted_linear
from branchcore.trainer import Metrics, Trainer
from branchcore.trainer_config import TrainerConfig

TASKS = {"digits": ("branchcore.models.digits.task", "DigitsTask")}
_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)
_log = logging.getLogger("branchcore")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a failure is one line on stderr and exit code 1."""
    logging.basicConfig(level=os.environ.get("BRANCHCORE_LOG", "WARNING").upper())
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except _ERRORS as error:
        _log.debug("traceback", exc_info=error)
        sys.exit(f"branchcore {args.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="branchcore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _train_options(commands.add_parser("train", help="train a model with a recipe"))
    _sample_options(commands.add_parser("sample", help="sample images"))
    _plan_options(commands.add_parser("plan", help="show a recipe's tree and what it costs"))
    kernels = commands.add_parser("explain", help="which kernels run here, and why")
    kernels.set_defaults(run=_explain)
    health = commands.add_parser("doctor", help="what this machine should run, and whether it does")
    health.add_argument("--json", action="store_true", help="print the same as JSON")
    health.set_defaults(run=_doctor)
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--recipe", default="branch_mix", help=", ".join(recipes.RECIPES))
    train.add_argument("--model", default="digits", help=", ".join(TASKS))
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--iterations", type=int, help="training iterations in all")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the recipe or a field of TrainerConfig, e.g. --set kl=0.05",
    )
    train.set_defaults(run=_train)


def _sample_options(sample: argparse.ArgumentParser) -> None:
    sample.add_argument("--model", default="digits", help=", ".join(TASKS))
    sample.add_argument("--weights", type=Path, help="run folder, checkpoint or safetensors file")
    sample.add_argument("--prompt", action="append", help="repeatable; default: a fixed choice")
    sample.add_argument("--count", type=int, default=8, help="images per prompt")
    sample.add_argument("--seed", type=int, help="noise; default: the held-out noise")
    sample.add_argument("--out", type=Path, required=True, help="PNG to write")
    sample.set_defaults(run=_sample)


def _plan_options(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("recipe", help=", ".join(recipes.RECIPES))
    plan.add_argument("--preset", help="a published configuration, e.g. flux or sd3.5-m")
    plan.add_argument("--steps", type=int, help="sampling steps T (10)")
    plan.add_argument("--shift", type=float, help="of the schedule (3)")
    plan.add_argument("--leaves", type=int, help="leaves per prompt; trunks: per step")
    plan.add_argument("--iteration", type=int, default=0, help="windows depend on it")
    plan.add_argument("--seed", type=int, default=0)
    plan.add_argument("--prompt", type=int, default=0, help="random trees depend on it")
    plan.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the recipe"
    )
    plan.set_defaults(run=_plan)


def _explain(_args: argparse.Namespace) -> None:
    print(explain())


def _doctor(args: argparse.Namespace) -> None:
    report = doctor.examine()
    print(json.dumps(report.as_json(), indent=2) if args.json else report)
    if report.to_fix:
        sys.exit(1)


def _plan(args: argparse.Namespace) -> None:
    known = recipes.options_of(args.recipe)
    options, fields = settings(args.set, args.recipe)
    if fields:
        raise ValueError(f"--set must name options from {tuple(known)}, got {sorted(fields)}")
    given = {"steps": args.steps, "shift": args.shift}
    if args.preset is not None:
        preset = recipes.preset_of(args.recipe, args.preset)
        both = [f"--{name}" for name, value in given.items() if value is not None]
        if both:
            raise ValueError(f"--preset must come with its own schedule, got {both} too")
        sigmas, published = preset.sigmas, dict(preset.options)
        print(f"{args.preset}: {preset.source}\ntrainer {dict(preset.trainer)}")
    else:
        steps = 10 if args.steps is None else args.steps
        sigmas = shifted_linear(steps, 3.0 if args.shift is None else args.shift)
        published = {}
    if args.leaves is not None:
        published |= recipes.leaf_options(tuple(known), args.leaves, len(sigmas) - 1)
    options = published | options
    recipe = recipes.build(args.recipe, sigmas, **options)
    print(f"{args.recipe}, T = {len(sigmas) - 1}, {options or 'defaults'}\n")
    where = {"seed": args.seed, "iteration": args.iteration, "uid": args.prompt}
    print(plan_report(recipe, sigmas, **where))


def _task(name: str, **options: Any) -> Any:
    if name not in TASKS:
        raise ValueError(f"--model must be from {tuple(TASKS)}, got {name!r}")
    module, attribute = TASKS[name]
    return getattr(importlib.import_module(module), attribute)(**options)


def settings(texts: Sequence[str], recipe: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits NAME=VALUE texts into options of the recipe and fields of `TrainerConfig`.

    Values are JSON; what is not JSON is taken as a string.
    """
    fields = {f.name for f in dataclasses.fields(TrainerConfig)}
    options = set(recipes.options_of(recipe))
    chosen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in fields | options:
            raise ValueError(
                f"--set must be NAME=VALUE with a name from {sorted(fields | options)}, "
                f"got {text!r}"
            )
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        chosen[0 if name in options else 1][name] = parsed
    return chosen


def _train(args: argparse.Namespace) -> None:
    options, fields = settings(args.set, args.recipe)
    task = _task(args.model)
    preset = task.presets[args.recipe]
    options = preset.recipe | options
    fields = preset.trainer | {"seed": args.seed} | fields
    if args.iterations is not None:
        fields["iterations"] = args.iterations
    recipe = recipes.build(args.recipe, task.sigmas, **options)
    config = TrainerConfig(**fields)

    def redraw(metrics: Metrics) -> None:
        if any(name.startswith("eval/") for name in metrics) and metrics["iteration"]:
            curves(args.out / "metrics.jsonl", args.out / "curves.png")

    trainer = Trainer(
        task.model,
        task.prompts,
        task.reward,
        recipe,
        config,
        args.out,
        evaluate=task.evaluate,
        callbacks=[redraw],
        facts={"model": args.model},
        resume=args.resume,
    )
    _introduce(trainer, recipe, options)
    base = _task(args.model).sample()
    trainer.run()
    with trainer.averaged():
        after = task.sample()
    panels = {"before": base, "after": after}
    task.picture(panels, task.grid_prompts, args.out / "samples.png")
    print(f"wrote {args.out}/metrics.jsonl, curves.png, samples.png and checkpoints")


def _introduce(trainer: Trainer, recipe: recipes.Recipe, options: dict[str, Any]) -> None:
    """Prints what the run will do, in plain words, before it starts."""
    config = trainer.config
    plan = recipe.plan(list(range(config.prompts_per_iteration)), seed=config.seed, iteration=0)
    counts = plan.counts()
    print(f"recipe {recipe.name} {options}")
    print(f"{config}")
    print(
        f"each iteration: {config.prompts_per_iteration} prompts, {counts.decodes} images, "
        f"{counts.forwards} forwards, {counts.trained_edges} trained edges of "
        f"{counts.trained_parents} parents, {recipe.updates} update(s)"
    )
    if trainer.iteration:
        print(f"resumed after iteration {trainer.iteration}")
    _log.info("tree of the first prompt:\n%s", draw(plan))


def weights_file(path: Path) -> Path:
    """Returns the weights of a run or checkpoint (EMA if it has them), or the file itself."""
    if path.is_file():
        return path
    folder = path if (path / "state.json").is_file() else checkpoint.latest(path)
    if folder is None:
        raise ValueError(f"--weights must be a run, a checkpoint or a file, got {path}")
    average = folder / "ema.safetensors"
    return average if average.is_file() else folder / "model.safetensors"


def _sample(args: argparse.Namespace) -> None:
    weights = None if args.weights is None else weights_file(args.weights)
    task = _task(args.model, weights=weights)
    prompts = args.prompt or list(task.grid_prompts)
    images = task.sample(prompts, count=args.count, seed=args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    task.picture({str(weights or "base model"): images}, prompts, args.out)
    print(f"wrote {args.out}: {len(prompts)} prompts x {args.count} images")
