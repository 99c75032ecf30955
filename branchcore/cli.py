"""Command line: `python -m branchcore train | sample | plan | report | explain | doctor | docs`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from branchcore import doctor, recipes
from branchcore._dispatch import explain
from branchcore.docs_command import docs_options
from branchcore.model_commands import sample_options, settings
from branchcore.pruning_config import PruningConfig
from branchcore.report import plan_report
from branchcore.run_report import write_report
from branchcore.schedule import shifted_linear
from branchcore.train_command import train_options

_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)
_log = logging.getLogger("branchcore")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a failure is one line on stderr and exit code 1, Ctrl-C 130."""
    logging.basicConfig(level=os.environ.get("BRANCHCORE_LOG", "WARNING").upper())
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except _ERRORS as error:
        _log.debug("traceback", exc_info=error)
        sys.exit(f"branchcore {args.command}: {error}")
    except KeyboardInterrupt as stop:
        _log.debug("traceback", exc_info=stop)
        print(f"\nbranchcore {args.command}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="branchcore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train_options(commands.add_parser("train", help="train a model with a recipe"))
    sample_options(commands.add_parser("sample", help="sample images or videos"))
    _plan_options(commands.add_parser("plan", help="show a recipe's tree and what it costs"))
    _report_options(commands.add_parser("report", help="show a run as one HTML page"))
    kernels = commands.add_parser("explain", help="which kernels run here, and why")
    kernels.set_defaults(run=_explain)
    health = commands.add_parser("doctor", help="what this machine should run, and whether it does")
    health.add_argument("--json", action="store_true", help="print the same as JSON")
    health.set_defaults(run=_doctor)
    docs_options(commands.add_parser("docs", help="write the docstrings as pages to look at"))
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


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


def _report_options(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", type=Path, metavar="run", help="its folder, finished or not")
    report.add_argument("--out", type=Path, help="the page; report.html in that folder")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    print(f"wrote {write_report(args.folder, args.out)}")


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
    pruning = fields.pop("prune", PruningConfig())
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
    print(plan_report(recipe, sigmas, pruning, **where))
