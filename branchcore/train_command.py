"""The command `train`: one run of any model, on one process or on all that torchrun starts."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from branchcore import recipes
from branchcore.callbacks import LOGGERS
from branchcore.checkpoint import check_writable
from branchcore.distributed import TIMEOUT_S, Ranks, joined
from branchcore.drawing import draw
from branchcore.model_commands import (
    MODELS,
    flags_of,
    pipeline_options,
    real_train_options,
    settings,
)
from branchcore.models.commands import task as tasks
from branchcore.models.sizing.live_bytes import CallBytes
from branchcore.parallel import ParallelConfig
from branchcore.planner.forecast import forecast
from branchcore.plots import curves
from branchcore.progress import VIEWS, chosen_view
from branchcore.run_folder import check_free
from branchcore.trainer import Metrics, Trainer
from branchcore.trainer_config import TrainerConfig

_log = logging.getLogger("branchcore")
PROBE_S = 3.0
"""Seconds of the probe before a run, at most."""


def train_options(train: argparse.ArgumentParser) -> None:
    """Adds the options of `train`."""
    train.add_argument("--recipe", default="branch_mix", help=", ".join(recipes.RECIPES))
    train.add_argument("--model", default="digits", help=MODELS)
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="continue the run in --out from its newest whole checkpoint, or begin it",
    )
    train.add_argument("--iterations", type=int, help="training iterations in all")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the recipe or a field of TrainerConfig, e.g. --set kl=0.05",
    )
    train.add_argument(
        "--log",
        action="append",
        default=[],
        choices=tuple(LOGGERS),
        help="repeatable; beside metrics.jsonl, which is always written",
    )
    train.add_argument(
        "--view",
        default="auto",
        choices=VIEWS,
        help="what the terminal shows; auto: live in a terminal, else a bar",
    )
    train.add_argument(
        "--deterministic",
        action="store_true",
        help="only kernels that give the same bits every time; may be slower",
    )
    pipeline_options(train.add_argument_group("real models"))
    real_train_options(train.add_argument_group("training of real models"))
    _process_options(train.add_argument_group("several processes, started by torchrun"))
    train.set_defaults(run=_train)


def _process_options(group: Any) -> None:
    group.add_argument(
        "--parallel",
        default="auto",
        choices=("auto", "replicate", "shard"),
        help="replicate weights, or shard them (FSDP2); auto: shard if all weights are trained",
    )
    group.add_argument("--shards", type=int, help="processes per copy of the weights; else all")
    group.add_argument("--mixed", action="store_true", help="bfloat16 from float32 shards")
    group.add_argument("--offload", action="store_true", help="keep shards in CPU memory")
    group.add_argument(
        "--reshard", action="store_true", help="gather weights for every call: the least memory"
    )
    group.add_argument(
        "--rank-timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="how long a process waits for the others",
    )


def _deterministic() -> None:
    """Asks torch for kernels that give the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _train(args: argparse.Namespace) -> None:
    if args.deterministic:
        _deterministic()
    names = ("shards", "mixed", "offload", "reshard")
    if args.mixed and args.model == "digits":
        raise ValueError("--mixed must be left out for digits, which computes in float32")
    parallel = ParallelConfig(kind=args.parallel, **{name: getattr(args, name) for name in names})
    with joined(args.device, args.rank_timeout) as ranks:
        _run(args, ranks, parallel)


def _run(args: argparse.Namespace, ranks: Ranks, parallel: ParallelConfig) -> None:
    view = chosen_view(args.view if ranks.main else "none")
    options, fields = settings(args.set, args.recipe)
    task = tasks.to_train(args.model, flags_of(args))
    suggested = task.settings(args.recipe)
    options = {**suggested.options, **options}
    fields = {**suggested.fields, "seed": args.seed, **fields}
    if args.iterations is not None:
        fields["iterations"] = args.iterations
    recipe = recipes.build(args.recipe, suggested.sigmas, **options)
    config = TrainerConfig(**fields)
    if not args.resume:
        check_free(args.out)
    check_writable(args.out)
    sigmas, config, notes, cost = task.load(recipe, config)
    recipe = recipes.build(args.recipe, sigmas, **options)

    def follow(metrics: Metrics) -> None:
        _follow(metrics, trainer, task, args.out)

    with ExitStack() as blocks:
        named = dict.fromkeys(args.log if ranks.main else ())
        loggers = [blocks.enter_context(LOGGERS[name](args.out)) for name in named]
        trainer = Trainer(
            task.model,
            task.prompts,
            task.reward,
            recipe,
            config,
            args.out,
            evaluate=task.evaluate,
            callbacks=[follow, *loggers],
            facts={"model": args.model, **task.facts},
            resume=args.resume is not None,
            ranks=ranks,
            parallel=parallel,
            view=view,
        )
        if ranks.main:
            _introduce(trainer, recipe, options, notes)
        task.start()
        if ranks.main:
            _foresee(args, trainer, task, cost)
        finished = trainer.iteration == config.iterations
        trainer.run()
    if ranks.main:
        if finished and not trainer.learner.parallel.sharded:
            with trainer.averaged():
                task.export(args.out)  # what a run with sharded weights left to do
        _conclude(trainer, args.out)


def _follow(metrics: Metrics, trainer: Trainer, task: tasks.TrainTask, out: Path) -> None:
    """Draws and exports what has been learned; sharded weights are in the checkpoints only."""
    done, config = metrics["iteration"], trainer.config
    evaluated = any(name.startswith("eval/") for name in metrics)
    if evaluated:
        task.draw(out, done)
    due = done == config.iterations or (done and done % config.checkpoint_every == 0)
    if due and not trainer.learner.parallel.sharded:
        with trainer.averaged():
            task.export(out)
    if evaluated and done:
        curves(out / "metrics.jsonl", out / "curves.png")


def _foresee(
    args: argparse.Namespace, trainer: Trainer, task: tasks.TrainTask, cost: CallBytes | None
) -> None:
    """Forecasts an iteration, to be logged beside what happens.

    Sharded weights are not all here, and a probe of compiled blocks would compile them for it.
    """
    if trainer.learner.parallel.sharded or args.compile:
        return
    config, world = trainer.config, trainer.ranks.world_size
    most = -(-config.prompts_per_iteration // world)
    each = config.prompts_per_round and min(most, config.prompts_per_round)
    local = dataclasses.replace(
        config, prompts_per_iteration=most, prompts_per_round=each, overlap_rewards=False
    )
    # what somebody else wrote is not called once more than the run does
    reward = task.reward if args.model == "digits" else None
    prompts = trainer.prompts[:8]
    found = forecast(
        task.model, prompts, trainer.recipe, local, reward=reward, cost=cost, seconds=PROBE_S
    )
    trainer.forecast = found.metrics()
    rest = "" if reward is not None else " and the reward"
    print(
        f"forecast of an iteration: {found.total:.2g} s{rest}, {found.peak / 1e9:.2g} GB of "
        f"tensors; metrics.jsonl has it as plan/ beside what is measured"
    )


def _conclude(trainer: Trainer, out: Path) -> None:
    if trainer.iteration < trainer.config.iterations:
        print(f"stopped by SIGTERM after iteration {trainer.iteration}; continue with --resume")
        return
    written = [name for name in tasks.OUTPUTS if (out / name).exists()]
    print(f"wrote {out}/{', '.join(written)} and checkpoints")


def _introduce(
    trainer: Trainer, recipe: recipes.Recipe, options: dict[str, Any], notes: Sequence[str]
) -> None:
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
    for note in notes:
        print(note)
    if not trainer.ranks.alone:
        kind = "sharded" if trainer.learner.parallel.sharded else "replicated"
        print(f"{trainer.ranks.world_size} processes, weights {kind}")
    if trainer.iteration:
        print(f"resumed after iteration {trainer.iteration}")
    _log.info("tree of the first prompt:\n%s", draw(plan))
