"""Models, rewards and recipes of the tree benchmark, and the closed forms of each plan's work.

Letters: N leaves per prompt, T steps, n_i nodes of a BranchGRPO tree at step i.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from plans import RECIPES
from plans.task import Task
from torch import Tensor

from branchcore import Plan, recipes, schedule
from branchcore.model import Model
from branchcore.models.digits import COMPONENT_WEIGHTS, PROMPTS, DigitsReward, load_digits_model
from branchcore.models.digits.model import build_transformer, transformer_velocity
from branchcore.recipes.branching import scaled_splits

FACTORS = {12: (2, 2, 3), 16: (2, 2, 2, 2), 24: (2, 2, 2, 3), 81: (3, 3, 3, 3)}
MODELS = ("auto", "digits", "tiny")
ETA = {"engine": 0.7}
RELEASED_ETA = 0.3
SHIFT = 3.0

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
    return {"reward": (images * pattern).mean((1, 2))}


class FixedReward:
    """Hands out the same rewards to the same leaves, in the plan's leaf order, whatever they show.

    For checks in float32: a z-score would magnify the rounding of the latents it is made from.
    """

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __call__(self, images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"reward": torch.from_numpy(self.rng.random(len(images))).to(images)}


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

    def model(self, num_prompts: int, dtype: torch.dtype) -> Model:
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
        )


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
    factors = FACTORS[leaves]
    splits = scaled_splits("dense", steps, len(factors))
    if len(set(splits)) < len(splits) or steps < 7:
        raise ValueError(f"--steps must be at least 7, for distinct splits, got {steps}")
    sigmas = schedule.shifted_linear(steps, SHIFT)
    tree = {"splits": splits, "branching": factors}
    options = {
        "dance": {"group": leaves, "eta": RELEASED_ETA},
        "flow": {"group": leaves, "kl": 0.0},
        "branch": {**tree, "eta": RELEASED_ETA},
        "branch_mix": {**tree, "eta": RELEASED_ETA},
        "engine": {**tree, "eta": ETA["engine"]},
    }
    built = {name: recipes.build(RECIPES[name], sigmas, **options[name]) for name in RECIPES}
    name = "digits" if model_name == "auto" else model_name
    return Workload(name, leaves, steps, splits, device, built)


class Work(NamedTuple):
    """Per iteration: model rows of the rollout, trained edges, distinct trained states, decodes."""

    F: int
    E: int
    P: int
    D: int


def closed_form(name: str, load: Workload, plan: Plan, prompts: int) -> Work:
    """Returns the work of a plan by counting rules that look at (N, T) only.

    `dance` draws its trained steps, so that only its shared root needs the draw itself: of the
    chains that train step 0, sharing leaves one state per prompt.
    """
    N, T = load.leaves, load.steps
    factors = dict(zip(load.splits, FACTORS[N], strict=True))
    nodes = [1]
    for i in range(T):
        nodes.append(nodes[-1] * factors.get(i, 1))
    tree = sum(nodes[:T])
    base = name.removeprefix("exact:").removeprefix("steel:")
    engine = name.startswith("exact:") or name == "engine"
    if base == "dance":
        drawn = int(N * prompts * int(0.6 * (T - 1)))
        at_root = plan.train & (plan.depth == 1)
        first = np.bincount(plan.prompt[at_root], minlength=prompts)
        forwards = prompts * (1 + N * (T - 1) if engine else N * T)
        return Work(forwards, drawn, drawn - int(np.maximum(first - 1, 0).sum()), prompts * N)
    if base == "flow":
        return Work(*(prompts * x for x in (N * T, N * (T - 1), N * (T - 1), N)))
    sde = {
        # released: the dead edges of depth T too
        "branch": range(T) if name == "branch" else range(T - 1),
        "branch_mix": [i for i in range(T - 1) if i < 4 or i in factors],
        "engine": list(factors),
    }[base]
    edges, parents = sum(nodes[i + 1] for i in sde), sum(nodes[i] for i in sde)
    return Work(*(prompts * x for x in (tree, edges, parents, N)))
