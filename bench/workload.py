"""Models, rewards and recipes of the tree benchmark, and the closed forms of each plan's work.

Letters: N leaves per prompt, T steps, n_i nodes of a BranchGRPO tree at step i.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from families import FAMILIES, FamilyModel
from mmdit import SD35M, SMALL, MMDiTConfig, MMDiTModel
from plans import RECIPES
from plans.task import Task
from torch import Tensor

from branchcore import recipes, schedule
from branchcore.model import Model
from branchcore.models.digits import COMPONENT_WEIGHTS, PROMPTS, DigitsReward, load_digits_model
from branchcore.models.digits.model import build_transformer, transformer_velocity
from branchcore.recipes.branching import scaled_splits

FACTORS = {12: (2, 2, 3), 16: (2, 2, 2, 2), 24: (2, 2, 2, 3), 81: (3, 3, 3, 3)}
SMALL_FAMILIES = {f"{name}-small": name for name in FAMILIES}
MODELS = (
    *("auto", "digits", "tiny", "sd35m-shape", "mmdit-small"),
    *FAMILIES,
    *SMALL_FAMILIES,
)
ETA = {"engine": 0.7}
RELEASED_ETA = 0.3
SHIFT = 3.0
WINDOW, FLASH_RATIO = 4, 0.6
"""MixGRPO's window, also that of its T = 10; Flash's published 0.4 of 25 steps would leave no
second-order step of 10."""
TREE_START = 1
"""First step of TreeGRPO's window; the mean of its law is 0.945."""
TRUNKS = {12: 2, 16: 4, 24: 4, 81: 9}
"""TempFlow's seeds per number of leaves; the release has 4, of 6 children each."""
STRIDES = (1, 2)
ENGINE_TAIL = 0.4


class Shape(NamedTuple):
    """A plain-torch transformer with random weights: how it is timed, and how it is checked."""

    config: MMDiTConfig
    dtype: torch.dtype
    """Of the weights when timed; latents are float32."""
    max_batch: int | None
    """Rows with a graph that fit in memory at once."""


SHAPES = {
    "sd35m-shape": Shape(SD35M, torch.bfloat16, 16),
    "mmdit-small": Shape(SMALL, torch.float32, None),
}

Reward = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]


class Tiny:
    """A diffusers SD3 transformer with random weights: d = 192, 4 blocks, 64 + 16 tokens."""

    latent_shape = (4, 16, 16)

    def __init__(self, prompts: Sequence[str] = ()) -> None:
        config = {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 48,
            "caption_projection_dim": 192,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = build_transformer(config)
            self.text = torch.randn(len(prompts), 16, 64)
            self.pooled = torch.randn(len(prompts), 64)

    def to(self, target: torch.dtype | torch.device) -> Tiny:
        self.module.to(target)
        self.text, self.pooled = self.text.to(target), self.pooled.to(target)
        return self

    def with_prompts(self, _prompts: Sequence[str]) -> Tiny:
        return self

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        text, pooled = self.text[prompt], self.pooled[prompt]
        return transformer_velocity(self.module, x, sigma, text, pooled)

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        raise NotImplementedError("Tiny: the benchmark must run without KL")

    def decode(self, latents: Tensor) -> Tensor:
        return latents.mean(1)


def linear_reward(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
    """Scores images with a fixed random pattern, in their own dtype: what the checks use."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randn(images.shape[1:], generator=generator).to(images)
    return {"reward": (images * pattern).flatten(1).mean(1)}


def digits_reward(device: torch.device) -> Reward:
    score = DigitsReward(device)

    def reward(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        parts = score(images, prompts)
        return {"reward": sum(w * parts[name] for name, w in COMPONENT_WEIGHTS.items())}

    return reward


class Workload(NamedTuple):
    """What all plans of a run share."""

    model_name: str
    leaves: int
    steps: int
    splits: tuple[int, ...]
    device: torch.device
    recipes: dict[str, recipes.Recipe]
    max_batch: int | None = None
    """Rows of a model call at most, in plans that may choose; None = no limit."""
    tape: int | None = None
    """States whose graph fits in memory; None = all of them."""

    @property
    def timed_dtype(self) -> torch.dtype:
        """What weights are in when they are timed."""
        if self.model_name in FAMILIES:
            return torch.bfloat16
        shape = SHAPES.get(self.model_name)
        return torch.float32 if shape is None else shape.dtype

    def timed_model(self, num_prompts: int) -> Model:
        if self.model_name in FAMILIES:
            return FamilyModel(self.model_name, self.device, self.timed_dtype)
        shape = SHAPES.get(self.model_name)
        if shape is None:
            return self.model(num_prompts, torch.float32)
        return MMDiTModel(shape.config, num_prompts, self.device, shape.dtype)

    def model(self, num_prompts: int, dtype: torch.dtype) -> Model:
        """Builds the model that is checked: the timed one, or a small one of its class."""
        if self.model_name in SHAPES:
            return MMDiTModel(SMALL, num_prompts, self.device, dtype)
        family = SMALL_FAMILIES.get(self.model_name, self.model_name)
        if family in FAMILIES:
            return FamilyModel(family, self.device, dtype, full=False)
        chosen = PROMPTS[:num_prompts]
        model = load_digits_model() if self.model_name == "digits" else Tiny(chosen)
        # it warns at every cast; set now that it is imported, since its import resets the level
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        for target in (self.device, dtype) if dtype != torch.float32 else (self.device,):
            model = model.to(target)
        return model

    def reward(self) -> Reward:
        return digits_reward(self.device) if self.model_name == "digits" else linear_reward

    def task(
        self,
        recipe: str,
        model: Model,
        reward: Reward,
        num_prompts: int,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Task:
        prompts = tuple(PROMPTS[:num_prompts])
        return Task(
            recipe=self.recipes[recipe],
            model=model,
            view=model.with_prompts(prompts),
            reward=reward,
            prompts=prompts,
            eta=ETA.get(recipe, RELEASED_ETA),
            optimizer=optimizer,
            dtype=dtype,
            device=self.device,
            max_batch=self.max_batch,
            tape=self.tape,
        )


def window_start(steps: int) -> int:
    """Returns where MixGRPO's window stands, at 5.5 of 25 on the mean of its 300 iterations."""
    return steps // 5


def recipe_options(leaves: int, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the options of every plan's recipe, all of one update and without a KL."""
    factors, trunks = FACTORS[leaves], TRUNKS[leaves]
    tree = {"splits": scaled_splits("dense", steps, len(factors)), "branching": factors}
    window = {"group": leaves, "window": WINDOW, "start": window_start(steps)}
    return {
        "dance": {"group": leaves, "eta": RELEASED_ETA},
        "flow": {"group": leaves, "kl": 0.0},
        "branch": {**tree, "eta": RELEASED_ETA},
        "branch_mix": {**tree, "eta": RELEASED_ETA},
        "mix": window,
        "flash": {**window, "ratio": FLASH_RATIO, "shift": SHIFT},
        "tree": {"branching": factors, "start": TREE_START},
        "tempflow": {"trunks": trunks, "children": leaves // trunks, "kl": 0.0},
        "g2rpo": {"group": leaves, "strides": STRIDES},
        "guard": {"group": leaves, "kl": 0.0},
        "engine": {**tree, "eta": ETA["engine"], "tail": ENGINE_TAIL},
    }


def workload(model_name: str, leaves: int, steps: int, device: torch.device) -> Workload:
    """Builds the recipes of all plans.

    Raises:
        ValueError: there is no such tree or model.
    """
    if model_name not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {model_name!r}")
    if leaves not in FACTORS:
        known = ", ".join(map(str, FACTORS))
        raise ValueError(f"--leaves must be one of {known}, got {leaves}")
    splits = scaled_splits("dense", steps, len(FACTORS[leaves]))
    if len(set(splits)) < len(splits) or steps < 7:
        raise ValueError(f"--steps must be at least 7, for distinct splits, got {steps}")
    sigmas, options = schedule.shifted_linear(steps, SHIFT), recipe_options(leaves, steps)
    built = {name: recipes.build(RECIPES[name], sigmas, **options[name]) for name in RECIPES}
    default = "sd35m-shape" if device.type == "cuda" else "digits"
    name = default if model_name == "auto" else model_name
    limited = {**SHAPES, **FAMILIES}
    max_batch = limited[name].max_batch if name in limited else None
    return Workload(name, leaves, steps, splits, device, built, max_batch)
