"""The commands that run a model: `train` and `sample`, the same for every model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from branchcore import recipes
from branchcore.callbacks import LOGGERS
from branchcore.checkpoint import check_writable
from branchcore.drawing import draw
from branchcore.models.commands import task as tasks
from branchcore.plots import curves
from branchcore.pruning_config import PruningConfig
from branchcore.run_folder import check_free
from branchcore.trainer import Metrics, Trainer
from branchcore.trainer_config import TrainerConfig

_log = logging.getLogger("branchcore")
_MODELS = ", ".join(tasks.MODELS)
_OURS = (
    *("command", "run", "threads", "model", "recipe", "out", "resume", "iterations", "seed"),
    *("set", "count", "log"),
)
"""Arguments that no model sees; the rest are flags of models, None where they are not given."""


def train_options(train: argparse.ArgumentParser) -> None:
    """Adds the options of `train`."""
    train.add_argument("--recipe", default="branch_mix", help=", ".join(recipes.RECIPES))
    train.add_argument("--model", default="digits", help=_MODELS)
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
    train.add_argument(
        "--log",
        action="append",
        default=[],
        choices=tuple(LOGGERS),
        help="repeatable; beside metrics.jsonl, which is always written",
    )
    _pipeline_options(train.add_argument_group("real models"))
    _real_train_options(train.add_argument_group("training of real models"))
    train.set_defaults(run=_train)


def sample_options(sample: argparse.ArgumentParser) -> None:
    """Adds the options of `sample`."""
    sample.add_argument("--model", default="digits", help=_MODELS)
    sample.add_argument(
        "--weights", type=Path, help="run folder, LoRA, or (digits) checkpoint or safetensors file"
    )
    sample.add_argument("--prompt", action="append", help="repeatable; digits: a fixed choice")
    sample.add_argument("--count", type=int, help="samples per prompt (digits 8, others 4)")
    sample.add_argument("--seed", type=int, help="noise; default: the held-out noise")
    sample.add_argument("--out", type=Path, required=True, help="PNG; videos: and a GIF beside it")
    real = sample.add_argument_group("real models")
    _pipeline_options(real)
    real.add_argument("--steps", type=int, help="of the ODE (28)")
    real.add_argument("--max-batch", type=int, help="rows of a model call at most")
    sample.set_defaults(run=_sample)


def _pipeline_options(group: Any) -> None:
    """Adds arguments of the families' `from_pretrained`, which has the defaults."""
    group.add_argument("--path", help="folder of the diffusers pipeline, or its name on the hub")
    for name in ("height", "width", "frames"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--guidance", type=float, help="scale of classifier-free guidance, 1 = off")
    group.add_argument("--embedded-guidance", type=float, help="of guidance-distilled models")
    group.add_argument("--negative-prompt", help="of the unconditional half")
    group.add_argument("--max-text-tokens", type=int)
    group.add_argument("--dtype", choices=("bf16", "fp32"))
    group.add_argument("--device", help="default: the GPU if there is one")


def _real_train_options(group: Any) -> None:
    group.add_argument("--prompts", type=Path, help=".txt, .jsonl or .parquet")
    group.add_argument("--prompt-field", metavar="NAME", help="of .jsonl or .parquet (prompt)")
    group.add_argument(
        "--reward",
        action="append",
        metavar="NAME[=PATH]",
        help="repeatable, e.g. pickscore=/models/pickscore; weights: --set reward_weights",
    )
    group.add_argument("--reward-frames", type=int, help="of a video that are scored (4)")
    group.add_argument("--preset", help="of the recipe, e.g. sd3.5-m: steps, options, rates")
    group.add_argument("--steps", type=int, help="sampling steps T (10) of the model's schedule")
    group.add_argument("--eval-prompts", type=int, help="distinct prompts to evaluate (4)")
    group.add_argument("--eval-count", type=int, help="samples of each (4)")
    group.add_argument("--eval-steps", type=int, help="steps of their ODE (28)")
    group.add_argument("--lora-rank", type=int, help="(32)")
    group.add_argument("--lora-alpha", type=float, help="(twice the rank)")
    group.add_argument("--lora-targets", type=_names, metavar="A,B", help="ends of layer names")
    _switch(group, "--full", "train all weights instead of a LoRA")
    _switch(group, "--reference", "with --full: keep a frozen copy for a KL")
    group.add_argument("--attention", metavar="BACKEND", help="native, flash, _flash_3")
    _switch(group, "--accelerate", "bind the fused ops to the blocks")
    _switch(group, "--compile", "torch.compile the blocks")
    _switch(group, "--checkpointing", "the tape keeps block inputs only")
    _switch(group, "--fuse-decoder", "channels-last VAE decoder with fused norms")
    group.add_argument("--memory", metavar="SIZE", help="budget, e.g. 80GB: plans the batches")


def _switch(group: Any, name: str, text: str) -> None:
    group.add_argument(name, action="store_true", default=None, help=text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what was given to the model itself, by name."""
    given = {k: v for k, v in vars(args).items() if k not in _OURS and v is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def settings(texts: Sequence[str], recipe: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits NAME=VALUE texts into options of the recipe and fields of `TrainerConfig`.

    Values are JSON; what is not JSON is taken as a string. `prune` is the rule of a
    `PruningConfig`, `prune_rate` its rate, and so on; together they make the field `prune`.
    """
    pruning = {"prune_" + f.name for f in dataclasses.fields(PruningConfig) if f.name != "rule"}
    fields = {f.name for f in dataclasses.fields(TrainerConfig)} | pruning
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
    of_pruning = {k: chosen[1].pop(k) for k in list(chosen[1]) if k in pruning | {"prune"}}
    if of_pruning:
        rule = of_pruning.pop("prune", "none")
        named = {name.removeprefix("prune_"): value for name, value in of_pruning.items()}
        named |= {"stop": _depths(named["stop"])} if "stop" in named else {}
        chosen[1]["prune"] = PruningConfig(rule=rule, **named)
    return chosen


def _depths(value: Any) -> tuple[Any, ...]:
    """Returns depths given as 4, as 4,6 or as [4, 6]."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list) else [parts]
    try:
        return tuple(int(part) if isinstance(part, str) else part for part in parts)
    except ValueError as error:
        raise ValueError(f"--set prune_stop must be depths like 4,6, got {value!r}") from error


def _train(args: argparse.Namespace) -> None:
    with ExitStack() as blocks:
        named = dict.fromkeys(args.log)
        _run(args, [blocks.enter_context(LOGGERS[name](args.out)) for name in named])


def _run(args: argparse.Namespace, loggers: Sequence[Callable[[Metrics], None]]) -> None:
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
    sigmas, config, notes = task.load(recipe, config)
    recipe = recipes.build(args.recipe, sigmas, **options)

    def follow(metrics: Metrics) -> None:
        done, evaluated = metrics["iteration"], any(x.startswith("eval/") for x in metrics)
        if evaluated:
            with trainer.averaged():
                task.draw(args.out, done)
        if done == config.iterations or (done and done % config.checkpoint_every == 0):
            with trainer.averaged():
                task.export(args.out)
        if evaluated and done:
            curves(args.out / "metrics.jsonl", args.out / "curves.png")

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
        resume=args.resume,
    )
    _introduce(trainer, recipe, options, notes)
    task.start()
    trainer.run()
    written = [name for name in tasks.OUTPUTS if (args.out / name).exists()]
    print(f"wrote {args.out}/{', '.join(written)} and checkpoints")


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
    if trainer.iteration:
        print(f"resumed after iteration {trainer.iteration}")
    _log.info("tree of the first prompt:\n%s", draw(plan))


def _sample(args: argparse.Namespace) -> None:
    task = tasks.to_sample(args.model, flags_of(args))
    prompts = list(task.prompts)
    count = task.count if args.count is None else args.count
    panels = task.panels(prompts, count=count, seed=args.seed)
    files = task.picture(panels, prompts, args.out)
    print(f"wrote {', '.join(map(str, files))}: {len(prompts)} prompts x {count} samples")
