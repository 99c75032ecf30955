"""The digits task as the command line drives it: model, prompts, reward, evaluation, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from branchcore import checkpoint
from branchcore.model import Model
from branchcore.models.commands.sample_history import keep_samples, undrawn
from branchcore.models.commands.task import Flags, Loaded, Settings, refuse
from branchcore.models.digits.evaluate import sample, score
from branchcore.models.digits.model import Digits, load_digits_model
from branchcore.models.digits.pictures import sample_grid
from branchcore.models.digits.presets import PRESETS, SIGMAS, Preset
from branchcore.models.digits.prompts import PROMPTS
from branchcore.models.digits.rewards import DigitsReward
from branchcore.models.digits.weights import load_state, read_tensors
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig

GRID_PROMPTS = tuple(PROMPTS[i] for i in (0, 5, 8, 15, 19, 23, 26, 33, 38, 45, 51, 58))


class DigitsTask:
    """Everything a run on the embedded model needs."""

    prompts: Sequence[str] = PROMPTS
    presets: Mapping[str, Preset] = PRESETS
    sigmas = SIGMAS
    grid_prompts: Sequence[str] = GRID_PROMPTS
    facts: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.model: Digits = load_digits_model()
        self.reward = DigitsReward()
        self._undrawn = undrawn()

    @cached_property
    def base(self) -> Tensor:
        """Samples of the pretrained model."""
        return DigitsTask().sample()

    def settings(self, recipe: str) -> Settings:
        """Returns the options that suit this model."""
        preset = self.presets[recipe]
        return Settings(self.sigmas, preset.recipe, preset.trainer)

    def load(self, recipe: Recipe, config: TrainerConfig) -> Loaded:
        """Returns the schedule; the model is loaded already."""
        return Loaded(self.sigmas, config)

    def start(self) -> None:
        """Does nothing: the prompts are known."""

    def evaluate(self, model: Model) -> dict[str, float]:
        """Returns held-out measures of the model, by name."""
        assert isinstance(model, Digits)
        images = sample(model)
        self._undrawn.append(images[[PROMPTS.index(prompt) for prompt in self.grid_prompts]])
        return score(images, PROMPTS)._asdict()

    def draw(self, out: Path, iteration: int) -> None:
        """Draws samples.png, the pretrained model's samples and this one's, and keeps them."""
        images = self._undrawn.popleft()
        ink = (1 - images.unsqueeze(2)) / 2  # black on white
        keep_samples(out, iteration, ink, self.grid_prompts)
        if iteration:
            panels = {"before": self.base, "after": images}
            self.picture(panels, self.grid_prompts, out / "samples.png")

    def export(self, out: Path) -> None:
        """Writes nothing: the checkpoints are all there is."""

    def sample(
        self, prompts: Sequence[str] = GRID_PROMPTS, *, count: int = 8, seed: int | None = None
    ) -> Tensor:
        """Returns (P, count, 8, 8) images; seed None = the fixed held-out noise."""
        options = {} if seed is None else {"seed": seed}
        return sample(self.model, prompts, num_noises=count, **options)

    def picture(self, panels: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
        """Writes image panels side by side, one row per prompt."""
        sample_grid(panels, list(prompts), path)


class DigitsSamples:
    """The embedded model to sample.

    Args:
        prompt: texts; a fixed choice where left out.
        weights: run folder, checkpoint or safetensors file; None = the pretrained model.
    """

    count = 8

    def __init__(self, prompt: Sequence[str] = GRID_PROMPTS, weights: Path | None = None) -> None:
        self.prompts = prompt
        self.task = DigitsTask()
        found = None if weights is None else _load_weights(self.task.model, weights)
        self.heading = str(found or "base model")

    def panels(self, prompts: Sequence[str], *, count: int, seed: int | None) -> dict[str, Tensor]:
        """Returns one panel (P, count, 8, 8)."""
        return {self.heading: self.task.sample(prompts, count=count, seed=seed)}

    def picture(
        self, panels: Mapping[str, Tensor], prompts: Sequence[str], path: Path
    ) -> list[Path]:
        """Writes panels as a PNG; returns the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.task.picture(panels, prompts, path)
        return [path]


def _load_weights(model: Digits, path: Path) -> Path:
    """Gives a model the weights of a run or checkpoint (EMA if it has them), or of a file."""
    if path.is_file():
        tensors = read_tensors(path)[0]
    else:
        folder = path if (path / "state.json").is_file() else checkpoint.latest(path)
        if folder is None:
            raise ValueError(f"--weights must be a run, a checkpoint or a file, got {path}")
        checkpoint.load_state(folder)
        held = checkpoint.read_index(folder)
        path = folder / ("ema" if held.group("ema") else "model")
        tensors = checkpoint.load_group(folder, path.name)
    load_state(model.module, tensors, path)
    return path


def to_train(name: str, flags: Flags) -> DigitsTask:
    """Returns the training task; the model has no options."""
    refuse(name, flags, ())
    return DigitsTask()


def to_sample(name: str, flags: Flags) -> DigitsSamples:
    """Returns the model to sample."""
    refuse(name, flags, ("prompt", "weights"))
    return DigitsSamples(**flags)
