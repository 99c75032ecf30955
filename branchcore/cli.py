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

from branchcore import doctor
from branchcore._dispatch import explain
from branchcore.docs_command import docs_options
from branchcore.model_commands import sample_options
from branchcore.plan_command import plan_options
from branchcore.run_report import write_report
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
        sys.stdout.flush()
    except _ERRORS as error:
        _log.debug("traceback", exc_info=error)
        if isinstance(error, BrokenPipeError) and args.command != "train":
            # what reads stdout has left, as `head` does: what is still to be printed goes away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
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
    plan_options(commands.add_parser("plan", help="what a recipe, or a whole run, does and takes"))
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
