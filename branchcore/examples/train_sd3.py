"""Stable Diffusion 3.5 learns to paint red: Flow-GRPO with a LoRA, every stage written out."""

import sys
from typing import Any

import torch
from torch import Tensor

import branchcore as bc
from branchcore.models.sd3 import from_pretrained
from branchcore.models.weights import add_lora, save_lora

PROMPTS = ["a cat", "a dog", "a house on a hill", "a bold seven"]


def redness(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Scores images (L, 3, H, W) in [0, 1]; any names, any number of them."""
    return {"red": images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))}


def train(path: str, out: str, *, iterations: int = 100, steps: int = 10, **options: Any) -> None:
    """Trains the pipeline at `path` and leaves the LoRA in `out`."""
    model = from_pretrained(path, **options)
    add_lora(model, rank=32)
    model.encode(PROMPTS, release=True)
    recipe = bc.recipes.build("flow_grpo", model.sigmas(steps), group=8, kl=0.01)
    optimizer = torch.optim.AdamW([p for p in model.module.parameters() if p.requires_grad], 3e-4)
    for i in range(iterations):
        plan = recipe.plan([i], seed=0, iteration=i)  # one prompt's trees, as a table
        where: Any = {"seed": 0, "iteration": i, "tape": 8, "max_batch": 8, "device": model.device}
        batch = bc.collect(plan, model, recipe, [PROMPTS[i % 4]], [i], redness, **where)
        bc.accumulate(batch, recipe, max_batch=8)  # adds the gradient
        optimizer.step()
        optimizer.zero_grad()
    save_lora(model, out)


if __name__ == "__main__":
    train(*sys.argv[1:], device="cuda")
