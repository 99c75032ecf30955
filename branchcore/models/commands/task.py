"""What the command line drives: one protocol to train and one to sample, for every model.

A model's module of `MODELS` has `to_train(name, flags)` and `to_sample(name, flags)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from branchcore.model import Model
from branchcore.models import FAMILIES
from branchcore.models.sizing.live_bytes import CallBytes
from branchcore.recipes.recipe import Recipe, Sigmas
from branchcore.rewards import Reward
from branchcore.trainer_config import TrainerConfig

MODELS = {
    "digits": "branchcore.models.digits.task",
    **dict.fromkeys(FAMILIES, "branchcore.models.commands.flow_task"),
}
OUTPUTS = ("metrics.jsonl", "curves.png", "samples.png", "lora", "transformer")
"""What a run may leave in its folder beside checkpoints."""
Flags = Mapping[str, Any]
"""Options of the command line that were given, by name."""


class Settings(NamedTuple):
    """What a model suggests for a recipe; the command line's own options go before."""

    sigmas: Sigmas
    """(T + 1,) schedule, of the right length only where the model is not loaded yet."""
    options: Mapping[str, Any]
    """Of the recipe."""
    fields: Mapping[str, Any]
    """Of `TrainerConfig`."""


class Loaded(NamedTuple):
    """What is known once a model is loaded."""

    sigmas: Sigmas
    """(T + 1,) its own schedule."""
    config: TrainerConfig
    """The run, as it fits."""
    notes: Sequence[str] = ()
    """What was switched on, in plain sentences."""
    cost: CallBytes | None = None
    """Bytes of its calls, if they were measured."""


class TrainTask(Protocol):
    """A training run's model, prompts, reward and pictures; made without long work."""

    prompts: Sequence[str]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies the run beside recipe, prompts and trainer."""
        ...

    def settings(self, recipe: str) -> Settings:
        """Returns what the model suggests for a recipe."""
        ...

    def load(self, recipe: Recipe, config: TrainerConfig) -> Loaded:
        """Loads model and reward."""
        ...

    @property
    def model(self) -> Model:
        """The loaded policy."""
        ...

    @property
    def reward(self) -> Reward:
        """Scores decoded leaves."""
        ...

    def start(self) -> None:
        """Does what is long and comes after all checks: encodes prompts."""
        ...

    def evaluate(self, model: Model) -> Mapping[str, float]:
        """Returns held-out measures by name."""
        ...

    def draw(self, out: Path, iteration: int) -> None:
        """Draws samples before and after, once an evaluation at this iteration is logged."""
        ...

    def export(self, out: Path) -> None:
        """Writes the trained weights for other programs, where checkpoints are not enough."""
        ...


class SampleTask(Protocol):
    """A loaded model to sample."""

    prompts: Sequence[str]
    """Those asked for, or a fixed choice."""
    count: int
    """Samples of each where nobody says how many."""

    def panels(
        self, prompts: Sequence[str], *, count: int, seed: int | None
    ) -> Mapping[str, Tensor]:
        """Returns samples (P, count, ...) by heading; seed None = the held-out noise."""
        ...

    def picture(
        self, panels: Mapping[str, Tensor], prompts: Sequence[str], path: Path
    ) -> list[Path]:
        """Draws panels side by side, one row per prompt; returns the files."""
        ...


def to_train(name: str, flags: Flags) -> TrainTask:
    """Returns the task of training a model; nothing is loaded yet.

    Raises:
        ValueError: an unknown model, or options that it does not have.
    """
    return _module(name).to_train(name, flags)


def to_sample(name: str, flags: Flags) -> SampleTask:
    """Loads a model to sample.

    Raises:
        ValueError: an unknown model, or options that it does not have.
    """
    return _module(name).to_sample(name, flags)


def _module(name: str) -> Any:
    if name not in MODELS:
        raise ValueError(f"--model must be from {tuple(MODELS)}, got {name!r}")
    return importlib.import_module(MODELS[name])


def refuse(name: str, flags: Flags, known: Collection[str]) -> None:
    """Raises ValueError for options that a model does not have."""
    for flag in flags:
        if flag not in known:
            raise ValueError(
                f"--{flag.replace('_', '-')} must be left out with --model {name}, "
                f"got {flags[flag]!r}"
            )
