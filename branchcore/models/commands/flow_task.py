"""Training of a real model as the command line drives it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from branchcore import recipes, rewards
from branchcore.model import Model
from branchcore.models import runtime, weights
from branchcore.models.accelerate import accelerate
from branchcore.models.commands.flow_samples import FlowSamples
from branchcore.models.commands.pictures import save_samples
from branchcore.models.commands.pipeline_flags import Pipeline
from branchcore.models.commands.sample_history import keep_samples, undrawn
from branchcore.models.commands.task import Flags, Loaded, Settings
from branchcore.models.flow_model import FlowModel
from branchcore.models.sampling import STEPS, sample
from branchcore.models.sizing.live_bytes import measure
from branchcore.models.sizing.memory import bytes_of, plan_memory
from branchcore.prompt_files import read_prompts
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward, component_weights, kind_of, patient, score
from branchcore.schedule import shifted_linear
from branchcore.trainer_config import TrainerConfig

DEFAULTS: dict[str, Any] = {
    "iterations": 100,
    "prompts_per_iteration": 8,
    "prompts_per_round": 1,
    "max_batch": 8,
    "tape": 0,
}
"""Of `TrainerConfig`: little memory, whatever the model; a preset, --memory and --set say more."""
PLANNED = ("prompts_per_round", "max_batch", "tape")
LORA_LR, FULL_LR = 3e-4, 1e-5
RANK, NUM_STEPS = 32, 10
MEASURED = ("eval_prompts", "eval_count", "eval_steps")
BEFORE = "before.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Flags of `train` that are about a real model, but for how it is loaded."""

    prompts: Path
    """File of prompts."""
    prompt_field: str | None = None
    """Of a JSON-lines or Parquet file."""
    reward: tuple[str, ...] = ()
    """Specifications for `rewards.build`."""
    reward_frames: int | None = None
    """Frames of a video that are scored; None = 4, or all if there are fewer."""
    preset: str | None = None
    """Published configuration of the recipe."""
    steps: int | None = None
    """T, without a preset; None = 10."""
    eval_prompts: int = 4
    """Distinct prompts of the file that are sampled at every evaluation."""
    eval_count: int = 4
    """Samples of each."""
    eval_steps: int = STEPS
    """Steps of their ODE."""
    lora_rank: int | None = None
    """Of the adapter; None = 32."""
    lora_alpha: float | None = None
    """None = twice the rank."""
    lora_targets: tuple[str, ...] | None = None
    """Ends of layer names; None = the family's attention projections."""
    full: bool = False
    """All weights instead of an adapter."""
    reference: bool = False
    """With `full`: keep a frozen copy for a KL."""
    attention: str | None = None
    """Backend."""
    accelerate: bool = False
    """Bind the fused ops to the blocks."""
    compile: bool = False
    """torch.compile the blocks."""
    checkpointing: bool = False
    """The tape keeps block inputs only."""
    fuse_decoder: bool = False
    """Channels-last VAE decoder with fused norms."""
    memory: str | None = None
    """Budget for the planner, such as 80GB."""

    def __post_init__(self) -> None:
        for name in ("steps", "reward_frames", *MEASURED, "lora_rank"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {number}")
        if self.preset is not None and self.steps is not None:
            raise ValueError("--preset must come with its own schedule, got ['--steps'] too")
        if self.memory is not None:
            bytes_of(self.memory)
        if not self.reward:
            raise ValueError("--reward must be given at least once, got none")
        adapter = {k: getattr(self, k) for k in ("lora_rank", "lora_alpha", "lora_targets")}
        both = [_flag(name) for name, value in adapter.items() if value is not None]
        if self.full and both:
            raise ValueError(f"--full must come without a LoRA, got {both} too")
        if self.reference and not self.full:
            raise ValueError(
                "--reference must come with --full, got a LoRA; the policy without it is the "
                "reference"
            )


def check_reference(flags: TrainFlags, recipe: Recipe) -> None:
    """Raises ValueError unless there is a reference policy where, and only where, one is asked."""
    compares = recipe.objective.compares
    if flags.full and compares and not flags.reference:
        raise ValueError(
            f"--full must come with --reference for {recipe.name}, whose loss compares with "
            "the base policy, got none; try --reference or --set kl=0"
        )
    if flags.reference and not compares:
        raise ValueError(
            f"--reference must come with a loss that compares with it, got {recipe.name} "
            "without a KL; try --set kl=0.01"
        )


def prepare(model: FlowModel, flags: TrainFlags, *, seed: int = 0) -> list[str]:
    """Switches on what is trained and what the flags ask for; returns the latter in sentences."""
    if flags.full:
        weights.train_all(model, reference=flags.reference)
    else:
        rank, alpha = flags.lora_rank or RANK, flags.lora_alpha
        weights.add_lora(model, rank=rank, alpha=alpha, targets=flags.lora_targets, seed=seed)
    notes: list[str] = []
    if flags.accelerate:
        notes.append(str(accelerate(model.module)))
    if flags.attention is not None:
        notes.append(runtime.set_attention(model, flags.attention))
    if flags.checkpointing:
        notes.append(runtime.checkpoint_blocks(model))
    if flags.fuse_decoder:
        notes.append(runtime.fuse_decoder(model.vae))
    if flags.compile:
        notes.append(runtime.compile_blocks(model))
    return notes


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reward_frames(asked: int | None, frames: int | None) -> int | None:
    if frames is None:
        if asked is not None:
            raise ValueError(f"--reward-frames must be left out for images, got {asked}")
        return None
    return min(4, frames) if asked is None else asked


class FlowTask:
    """A training run of a real model.

    Args:
        name: of the family.
        flags: of the command line.

    Raises:
        ValueError: flags that do not fit together, no prompts, no pipeline, no reward.
        OSError: a file that cannot be read.
    """

    model: FlowModel
    reward: Reward

    def __init__(self, name: str, flags: Flags) -> None:
        own = {field.name for field in fields(TrainFlags)}
        self.pipeline = Pipeline(name, flags, own)
        if "prompts" not in flags:
            raise ValueError(f"--prompts must be a file with --model {name}, got none")
        self.flags = TrainFlags(**{k: v for k, v in flags.items() if k in own})
        self.prompts = read_prompts(self.flags.prompts, field=self.flags.prompt_field)
        distinct = list(dict.fromkeys(self.prompts))
        self.grid_prompts = distinct[: self.flags.eval_prompts]
        self.reward_frames = _reward_frames(self.flags.reward_frames, self.pipeline.frames)
        self.num_steps = NUM_STEPS if self.flags.steps is None else self.flags.steps
        self.config: TrainerConfig | None = None
        self._undrawn = undrawn()

    @property
    def facts(self) -> dict[str, Any]:
        """What is generated, what is trained, what is asked of it and how that is measured."""
        return {
            **weights.facts(self.model),
            **self.pipeline.facts,
            **{name: getattr(self.flags, name) for name in MEASURED},
            "rewards": [kind_of(spec) for spec in self.flags.reward],
            "reward_frames": self.reward_frames,
        }

    def settings(self, recipe: str) -> Settings:
        """Returns a preset as published, or steps of the pipeline's schedule."""
        chosen = DEFAULTS | {"lr": FULL_LR if self.flags.full else LORA_LR}
        if self.flags.preset is None:
            return Settings(shifted_linear(self.num_steps, 3.0), {}, chosen)
        preset = recipes.preset_of(recipe, self.flags.preset)
        return Settings(preset.sigmas, preset.options, chosen | dict(preset.trainer))

    def load(self, recipe: Recipe, config: TrainerConfig) -> Loaded:
        """Loads reward and model, adds what is trained and switches accelerations on.

        Raises:
            ValueError: a KL under full fine-tuning without a reference, and what the functions that
                do the work refuse.
        """
        flags = self.flags
        check_reference(flags, recipe)
        device = self.pipeline.device
        reward = rewards.build(flags.reward, device=device, frames=self.reward_frames)
        self._try_reward(reward, config)
        self.reward = patient(reward, config)
        taken = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.model = model = self.pipeline.load()
        notes = prepare(model, flags, seed=config.seed)
        cost = None
        if flags.memory is not None:
            self.start()  # without text encoders there is more to give
            budget, prompt = bytes_of(flags.memory), self.prompts[0]
            cost = measure(model, prompt)
            keep = [name for name in PLANNED if getattr(config, name) != DEFAULTS[name]]
            more: dict[str, Any] = {"cost": cost, "reserved": taken, "keep": keep}
            plan = plan_memory(model, recipe, config, budget, prompt=prompt, **more)
            config, notes = plan.config, [*notes, str(plan)]
            model.decode_batch = plan.decode_batch
        self.config = config
        if flags.preset is not None:
            return Loaded(recipes.preset_of(recipe.name, flags.preset).sigmas, config, notes, cost)
        return Loaded(model.sigmas(self.num_steps), config, notes, cost)

    def _try_reward(self, reward: Reward, config: TrainerConfig) -> None:
        """Scores noise: what is wrong with a reward is said before the model is loaded."""
        noise = torch.rand(2, *self.pipeline.shape, generator=torch.Generator().manual_seed(0))
        names = score(reward, noise.to(self.pipeline.device), self.prompts[:1] * 2).names
        component_weights(names, config.reward_weights)

    def start(self) -> None:
        """Encodes all prompts and frees the text encoders."""
        self.model.encode(list(dict.fromkeys(self.prompts)), release=True)

    def evaluate(self, model: Model) -> dict[str, float]:
        """Samples the fixed prompts from held-out noise; returns mean rewards."""
        assert isinstance(model, FlowModel)
        assert self.config is not None
        flags, config = self.flags, self.config
        sizes = {"count": flags.eval_count, "steps": flags.eval_steps}
        images = sample(model, self.grid_prompts, **sizes, max_batch=config.max_batch)
        self._undrawn.append((images * 255).round().byte().cpu().contiguous())
        texts = [text for text in self.grid_prompts for _ in range(flags.eval_count)]
        scores = score(self.reward, images.flatten(0, 1), texts)
        means = np.nanmean(scores.values, axis=0)  # masked samples are NaN
        chosen = component_weights(scores.names, config.reward_weights)
        parts = dict(zip(scores.names, means.tolist(), strict=True))
        return {"reward": float(means @ chosen), **parts}

    def draw(self, out: Path, iteration: int) -> None:
        """Draws samples.png from the oldest evaluation not drawn yet, beside those of iteration 0.

        The trainer logs iteration 0 after the first step, which may be evaluated already.
        """
        levels = self._undrawn.popleft()
        keep_samples(out, iteration, levels / 255, self.grid_prompts)
        if iteration == 0:
            partial = out / f".partial-{BEFORE}"
            save_file({"samples": levels}, partial)
            os.replace(partial, out / BEFORE)
            return
        panels = {"before": load_file(out / BEFORE)["samples"] / 255, "after": levels / 255}
        save_samples(panels, self.grid_prompts, out / "samples.png")

    def export(self, out: Path) -> None:
        """Writes the LoRA, or all weights, as diffusers does."""
        if self.flags.full:
            weights.save_transformer(self.model, out)
        else:
            weights.save_lora(self.model, out / "lora")


def to_train(name: str, flags: Flags) -> FlowTask:
    """Returns the training task; nothing is loaded yet."""
    return FlowTask(name, flags)


def to_sample(name: str, flags: Flags) -> FlowSamples:
    """Loads the model to sample."""
    return FlowSamples(name, flags)
