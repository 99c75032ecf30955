"""The model that is planned for: the embedded one, a pipeline on disk, or a published shape."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from branchcore import recipes, rewards
from branchcore.model import Model
from branchcore.models import family_module
from branchcore.models.commands import task as tasks
from branchcore.models.commands.flow_task import (
    DEFAULTS,
    NUM_STEPS,
    PLANNED,
    TrainFlags,
    check_reference,
    prepare,
)
from branchcore.models.commands.pipeline_flags import DTYPES, Pipeline
from branchcore.models.digits.presets import PRESETS, SIGMAS
from branchcore.models.family import Size
from branchcore.models.sizing.published import (
    FLUX1_DEV,
    QWEN_IMAGE,
    SANA_1600M,
    SD35_LARGE,
    SD35_MEDIUM,
    WAN21_1B,
    WAN21_14B,
    Architecture,
    Shape,
)
from branchcore.planner.request import Request
from branchcore.prompt_files import read_prompts
from branchcore.recipes.recipe import Recipe, Sigmas
from branchcore.rewards import Reward
from branchcore.schedule import shifted_linear

PUBLISHED = (SD35_MEDIUM, SD35_LARGE, FLUX1_DEV, QWEN_IMAGE, WAN21_1B, WAN21_14B, SANA_1600M)
"""Architectures that are planned for without their weights; the first of a family is its usual."""
_TOKENS: Mapping[str, int] = {
    "sd3": 205, "flux": 512, "qwen_image": 128, "wan": 512, "sana": 300,
}  # fmt: skip
_STAND_IN = "a red house"


class Subject(NamedTuple):
    """A model, and what goes with it."""

    name: str
    model: Model
    prompts: list[str]
    reward: Reward | None
    """None: nobody said which."""
    flags: TrainFlags | None
    """Of a real model."""
    present: bool
    """Whether it has weights, on a device that is here."""

    def sigmas(self, request: Request) -> Sigmas:
        """Returns the schedule of a run."""
        if self.flags is None:
            return _digits(request).sigmas
        if self.flags.preset is not None:
            return recipes.preset_of(request.recipe, self.flags.preset).sigmas
        steps = NUM_STEPS if self.flags.steps is None else self.flags.steps
        model: Any = self.model
        return model.sigmas(steps)

    def options(self, request: Request) -> dict[str, Any]:
        """Returns the options of the recipe: as suggested, for so many leaves, as set."""
        known = recipes.options_of(request.recipe)
        suggested: Mapping[str, Any] = {}
        if self.flags is None:
            suggested = _digits(request).options
        elif self.flags.preset is not None:
            suggested = recipes.preset_of(request.recipe, self.flags.preset).options
        sized: dict[str, Any] = {}
        if request.leaves is not None:
            steps = len(self.sigmas(request)) - 1
            sized = recipes.leaf_options(tuple(known), request.leaves, steps)
        return {**suggested, **sized, **request.options}

    def fields(self, request: Request) -> dict[str, Any]:
        """Returns the settings of the run but for those that are planned and were left open."""
        if self.flags is None:
            suggested = dict(_digits(request).fields)
        else:
            preset = self.flags.preset
            chosen = {} if preset is None else recipes.preset_of(request.recipe, preset).trainer
            suggested = {**DEFAULTS, **chosen}
        return {k: v for k, v in suggested.items() if k not in PLANNED} | dict(request.fields)

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError for a recipe that this model cannot run."""
        if self.flags is not None:
            check_reference(self.flags, recipe)


def _digits(request: Request) -> tasks.Settings:
    if request.recipe not in PRESETS:
        recipes.options_of(request.recipe)  # says which there are
    preset = PRESETS[request.recipe]
    steps = request.flags.get("steps")
    sigmas = SIGMAS if steps is None else shifted_linear(int(steps))
    return tasks.Settings(sigmas, preset.recipe, preset.trainer)


def load_subject(request: Request) -> Subject:
    """Loads what a request is about; a name on the hub of a published shape needs no download.

    Raises:
        ValueError, NotImplementedError: flags that the model does not have, or that exclude each
            other.
        OSError: a file that cannot be read.
    """
    flags = dict(request.flags)
    if request.model == "digits":
        steps = {k: v for k, v in flags.items() if k != "steps"}
        task: Any = tasks.to_train("digits", steps)
        return Subject("digits", task.model, list(task.prompts), task.reward, None, True)
    own = {field.name for field in fields(TrainFlags)}
    given = {k: v for k, v in flags.items() if k in own}
    stand_in: dict[str, Any] = {"prompts": Path(), "reward": ("none",)}
    train = TrainFlags(**{**stand_in, **given})
    architecture = _published(request.model, flags.get("path"))
    if architecture is not None:
        model = _shape(request.model, architecture, flags, own)
        prepare(model, train)
        return Subject(request.model, model, [_STAND_IN], None, train, False)
    pipeline = Pipeline(request.model, flags, own)
    prompts = [_STAND_IN]
    if "prompts" in flags:
        prompts = list(dict.fromkeys(read_prompts(train.prompts, field=train.prompt_field)))
    reward = None
    if "reward" in flags:
        frames = None if pipeline.frames is None else min(train.reward_frames or 4, pipeline.frames)
        reward = rewards.build(train.reward, device=pipeline.device, frames=frames)
    model = pipeline.load()
    prepare(model, train)
    model.encode(prompts, release=True)
    return Subject(request.model, model, prompts, reward, train, True)


def _published(family: str, path: str | None) -> Architecture | None:
    """Returns the architecture that is meant; None for a folder."""
    known = [a for a in PUBLISHED if a.family == family]
    if not known:
        family_module(family)  # says which there are
        raise ValueError(f"--model must be digits or a published family, got {family!r}")
    if path is None:
        return known[0]
    if Path(path).exists():
        return None
    found = [a for a in known if a.source == path]
    if not found:
        names = ", ".join(a.source for a in known)
        raise ValueError(f"--path must be a folder or one of {names}, got {path!r}")
    return found[0]


def _shape(family: str, architecture: Architecture, flags: Mapping[str, Any], own: set[str]) -> Any:
    """Returns a published model on the meta device, at the size that is asked for."""
    from branchcore.models.sizing import shapes

    asked = inspect.signature(family_module(family).from_pretrained).parameters
    given = {"num_frames" if k == "frames" else k: v for k, v in flags.items()}
    tasks.refuse(family, given, {*asked, *own, "path", "device"})
    chosen = {k: given.get(k, p.default) for k, p in asked.items()}
    size = Size(chosen["height"], chosen["width"], chosen.get("num_frames") or 1)
    shape = Shape(architecture, size, given.get("max_text_tokens", _TOKENS[family]))
    maker = shapes.family_of(shape)
    maker.check_size(size)
    guidance = chosen.get("guidance") or 1.0
    maker.check_guidance(guidance, architecture.transformer)
    dtype = DTYPES[given.get("dtype", "bf16")]
    assert isinstance(dtype, torch.dtype)
    return shapes.flow_model(shape, "meta", dtype, guidance=guidance)
