"""What the commands that run a model share, and the command `sample`; the same for every model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from branchcore import recipes
from branchcore.models.commands import task as tasks
from branchcore.pruning_config import PruningConfig
from branchcore.trainer_config import TrainerConfig

_log = logging.getLogger("branchcore")
MODELS = ", ".join(tasks.MODELS)
_OURS = (
    *("command", "run", "threads", "model", "recipe", "out", "resume", "iterations", "seed"),
    *("set", "count", "log", "view", "deterministic", "rank_timeout"),
    *("parallel", "shards", "mixed", "offload", "reshard"),
)
"""Arguments that no model sees; the rest are flags of models, None where they are not given."""


def sample_options(sample: argparse.ArgumentParser) -> None:
    """Adds the options of `sample`."""
    sample.add_argument("--model", default="digits", help=MODELS)
    sample.add_argument(
        "--weights", type=Path, help="run folder, LoRA, or (digits) checkpoint or safetensors file"
    )
    sample.add_argument("--prompt", action="append", help="repeatable; digits: a fixed choice")
    sample.add_argument("--count", type=int, help="samples per prompt (digits 8, others 4)")
    sample.add_argument("--seed", type=int, help="noise; default: the held-out noise")
    sample.add_argument("--out", type=Path, required=True, help="PNG; videos: and a GIF beside it")
    real = sample.add_argument_group("real models")
    pipeline_options(real)
    real.add_argument("--steps", type=int, help="of the ODE (28)")
    real.add_argument("--max-batch", type=int, help="rows of a model call at most")
    sample.set_defaults(run=_sample)


def pipeline_options(group: Any) -> None:
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


def real_train_options(group: Any) -> None:
    """Adds the options of training a pipeline."""
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


def _sample(args: argparse.Namespace) -> None:
    task = tasks.to_sample(args.model, flags_of(args))
    prompts = list(task.prompts)
    count = task.count if args.count is None else args.count
    panels = task.panels(prompts, count=count, seed=args.seed)
    files = task.picture(panels, prompts, args.out)
    each = "1 prompt" if len(prompts) == 1 else f"each of {len(prompts)} prompts"
    print(f"wrote {', '.join(map(str, files))}: {count} samples of {each}")
