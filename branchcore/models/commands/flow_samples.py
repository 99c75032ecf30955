"""Samples of a real model for the command line, with and without what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from branchcore.checkpoint import check_like
from branchcore.models.commands.pictures import save_samples
from branchcore.models.commands.pipeline_flags import Pipeline
from branchcore.models.commands.task import Flags
from branchcore.models.flow_model import FlowModel
from branchcore.models.sampling import HELD_OUT_SEED, STEPS, sample
from branchcore.models.weights import LORA_FILE, load_lora


class FlowSamples:
    """A real model to sample.

    Args:
        name: of the family.
        flags: of the command line.

    Raises:
        ValueError: no prompt; see `Pipeline` and `TrainedWeights.find` for the rest.
        OSError: no such pipeline.
    """

    count = 4

    def __init__(self, name: str, flags: Flags) -> None:
        pipeline = Pipeline(name, flags, ("prompt", "weights", "steps", "max_batch"))
        if "prompt" not in flags:
            raise ValueError(f"--prompt must be given with --model {name}, got none")
        self.prompts: Sequence[str] = flags["prompt"]
        self.steps, self.max_batch = flags.get("steps", STEPS), flags.get("max_batch")
        self.weights = TrainedWeights.find(flags["weights"]) if "weights" in flags else None
        self.model = pipeline.load()

    def panels(self, prompts: Sequence[str], *, count: int, seed: int | None) -> dict[str, Tensor]:
        """Returns samples of the base model and, from the same noise, of the trained weights."""
        options: dict[str, Any] = {"steps": self.steps, "max_batch": self.max_batch}
        options |= {"count": count, "seed": HELD_OUT_SEED if seed is None else seed}
        self.model.encode(prompts, release=True)
        panels = {"base model": sample(self.model, prompts, **options)}
        if self.weights is not None:
            self.weights.apply(self.model)
            panels[str(self.weights.path)] = sample(self.model, prompts, **options)
        return panels

    def picture(
        self, panels: Mapping[str, Tensor], prompts: Sequence[str], path: Path
    ) -> list[Path]:
        """Writes a PNG, and a GIF beside it if these are videos; returns the files."""
        return save_samples(panels, prompts, path)


class TrainedWeights(NamedTuple):
    """A LoRA, or all weights of a transformer, on disk."""

    path: Path
    is_lora: bool

    @classmethod
    def find(cls, path: Path) -> TrainedWeights:
        """Finds the weights in a run's folder, or at the path itself.

        Raises:
            ValueError: there are none.
        """
        for folder in (path, path / "lora"):
            if (folder / LORA_FILE).is_file():
                return cls(folder, True)
        for folder in (path, path / "transformer"):
            if (folder / "config.json").is_file():
                return cls(folder, False)
        if path.suffix == ".safetensors" and path.is_file():
            return cls(path, True)
        raise ValueError(
            "--weights must be a run with a folder lora or transformer, one of these folders, or "
            f"a LoRA's safetensors file, got {path}"
        )

    def apply(self, model: FlowModel) -> None:
        """Gives a model these weights; see `load_lora`.

        Raises:
            ValueError: weights of another transformer.
        """
        if self.is_lora:
            load_lora(model, self.path)
            return
        module: Any = model.module
        trained = type(module).from_pretrained(self.path, dtype=model.dtype).state_dict()
        check_like(self.path, trained, module.state_dict())
        module.load_state_dict(trained)
