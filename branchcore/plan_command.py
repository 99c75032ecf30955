"""The command `plan`: a recipe's tree, or with --model what a whole run does and takes."""

from __future__ import annotations

import argparse

from branchcore import recipes
from branchcore.model_commands import flags_of, pipeline_options, real_train_options, settings
from branchcore.models.sizing.memory import bytes_of
from branchcore.planner.forecast import Forecast
from branchcore.planner.request import Request
from branchcore.planner.sheet import GPUS
from branchcore.planner.solve import Planned, Planner
from branchcore.planner.words import comparison, report
from branchcore.pruning_config import PruningConfig
from branchcore.report import plan_report
from branchcore.schedule import shifted_linear

_OTHERS = (
    *("shift", "iteration", "gpus", "gpu", "prompts_per_update", "compare", "leaves", "memory"),
    *("parallel", "shards", "mixed", "offload", "reshard", "recipe_flag", "uid"),
)
"""Arguments of `plan` that are no flags of the model."""


def plan_options(plan: argparse.ArgumentParser) -> None:
    """Adds the options of `plan`."""
    plan.add_argument("recipe", nargs="?", help=", ".join(recipes.RECIPES))
    plan.add_argument("--recipe", dest="recipe_flag", help="the same, as `train` has it")
    plan.add_argument("--leaves", "--group", type=int, help="leaves per prompt; trunks: per step")
    plan.add_argument("--seed", type=int, default=0)
    plan.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="as in `train`"
    )
    tree = plan.add_argument_group("its tree (without --model)")
    tree.add_argument("--shift", type=float, help="of the schedule (3)")
    tree.add_argument("--iteration", type=int, default=0, help="windows depend on it")
    tree.add_argument("--prompt", type=int, dest="uid", default=0, help="random trees depend on it")
    run = plan.add_argument_group("a run (with --model)")
    run.add_argument("--model", help="digits, sd3, flux, qwen_image, wan, sana")
    run.add_argument("--gpus", type=int, default=1, help="how many (1)")
    run.add_argument("--gpu", choices=tuple(GPUS), help="which; default: what is here")
    run.add_argument("--prompts-per-update", type=int, help="prompts of an iteration, of all GPUs")
    run.add_argument("--compare", metavar="A,B", help="other recipes at as many leaves")
    run.add_argument("--parallel", choices=("auto", "replicate", "shard"))
    run.add_argument("--shards", type=int)
    for name in ("mixed", "offload", "reshard"):
        run.add_argument(f"--{name}", action="store_true", default=None)
    pipeline_options(run)
    real_train_options(run)
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    if args.recipe and args.recipe_flag and args.recipe != args.recipe_flag:
        raise ValueError(f"--recipe must be given once, got {args.recipe} and {args.recipe_flag}")
    args.recipe = args.recipe or args.recipe_flag
    if args.model is not None:
        _plan_run(args)
        return
    if args.recipe is None:
        raise ValueError("recipe must be named for its tree, got none; try --model for a run")
    _plan_tree(args)


def _plan_run(args: argparse.Namespace) -> None:
    planner, request = Planner(), request_of(args)
    planned = planner.plan(request)
    print(report(planned, planner.forecast(planned)))
    if args.compare:
        rows = compared(planner, planned, [n.strip() for n in args.compare.split(",")])
        print(f"\nAt as many leaves per prompt:\n{comparison(rows)}")


def compared(planner: Planner, first: Planned, names: list[str]) -> list[tuple[Planned, Forecast]]:
    """Plans other recipes for as many leaves, each with its other options as suggested."""
    leaves = round(first.counts.decodes / first.local.prompts_per_iteration)
    rows = [(first, planner.forecast(first))]
    base = first.request
    for name in names:
        other = Request(
            model=base.model, recipe=name, flags=base.flags, fields=base.fields,
            parallel=base.parallel, leaves=leaves, gpus=base.gpus, gpu=base.gpu, memory=base.memory,
        )  # fmt: skip
        planned = planner.plan(other)
        rows.append((planned, planner.forecast(planned)))
    return rows


def request_of(args: argparse.Namespace) -> Request:
    """Returns what was asked, and only that."""
    recipe = args.recipe or "branch_mix"
    options, fields = settings(args.set, recipe)
    if args.prompts_per_update is not None:
        fields["prompts_per_iteration"] = args.prompts_per_update
    names = ("shards", "mixed", "offload", "reshard")
    parallel = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.parallel is not None:
        parallel["kind"] = args.parallel
    flags = {k: v for k, v in flags_of(args).items() if k not in _OTHERS}
    return Request(
        model=args.model, recipe=recipe, flags=flags, options=options, fields=fields,
        parallel=parallel, leaves=args.leaves, gpus=args.gpus, gpu=args.gpu,
        memory=None if args.memory is None else bytes_of(args.memory),
    )  # fmt: skip


def _plan_tree(args: argparse.Namespace) -> None:
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
    where = {"seed": args.seed, "iteration": args.iteration, "uid": args.uid}
    print(plan_report(recipe, sigmas, pruning, **where))
