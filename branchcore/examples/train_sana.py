"""SANA learns blue: Flow-GRPO on all weights, with a frozen copy for the KL and fp32 masters."""

import sys
from typing import Any

from torch import Tensor

import branchcore as bc
from branchcore.models.sana import from_pretrained
from branchcore.models.weights import facts, save_transformer, train_all

PROMPTS = ["a cat", "a dog", "a house on a hill", "a bold seven"]


def blueness(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Scores images (L, 3, H, W) in [0, 1]."""
    return {"blue": images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3))}


def train(path: str, out: str, *, iterations: int = 100, steps: int = 10, **options: Any) -> None:
    """Trains the pipeline at `path`; `out` becomes the folder of the run."""
    model = from_pretrained(path, **options)
    train_all(model, reference=True)
    model.encode(PROMPTS, release=True)
    recipe = bc.recipes.build("flow_grpo", model.sigmas(steps), group=8, kl=0.01)
    config = bc.TrainerConfig(iterations=iterations, prompts_per_iteration=2, prompts_per_round=1,
                              max_batch=8, tape=8, lr=1e-5)  # fmt: skip
    trainer = bc.Trainer(model, PROMPTS, blueness, recipe, config, out, facts=facts(model))
    trainer.run()
    save_transformer(model, out)


if __name__ == "__main__":
    train(*sys.argv[1:], device="cuda")
