"""The digits task as the command line drives it: model, prompts, reward, evaluation, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from branchcore.model import Model
from branchcore.models.digits.evaluate import evaluate, sample
from branchcore.models.digits.model import Digits, load_digits_model
from branchcore.models.digits.pictures import sample_grid
from branchcore.models.digits.presets import PRESETS, SIGMAS, Preset
from branchcore.models.digits.prompts import PROMPTS
from branchcore.models.digits.rewards import DigitsReward

GRID_PROMPTS = tuple(PROMPTS[i] for i in (0, 5, 8, 15, 19, 23, 26, 33, 38, 45, 51, 58))


class DigitsTask:
    """Everything a run on the embedded model needs.

    Args:
        weights: safetensors file of a trained module; None = the pretrained one.
    """

    prompts: Sequence[str] = PROMPTS
    presets: Mapping[str, Preset] = PRESETS
    sigmas = SIGMAS
    grid_prompts: Sequence[str] = GRID_PROMPTS

    def __init__(self, weights: str | Path | None = None) -> None:
        self.model: Digits = load_digits_model(weights)
        self.reward = DigitsReward()

    def evaluate(self, model: Model) -> dict[str, float]:
        """Returns held-out measures of the model, by name."""
        assert isinstance(model, Digits)
        return evaluate(model)._asdict()

    def sample(
        self, prompts: Sequence[str] = GRID_PROMPTS, *, count: int = 8, seed: int | None = None
    ) -> Tensor:
        """Returns (P, count, 8, 8) images; seed None = the fixed held-out noise."""
        options = {} if seed is None else {"seed": seed}
        return sample(self.model, prompts, num_noises=count, **options)

    def picture(self, panels: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
        """Writes image panels side by side, one row per prompt."""
        sample_grid(panels, list(prompts), path)
