"""Qwen-Image learns contrast: MixGRPO with a LoRA, fused ops bound to its blocks, and an EMA."""

import sys
from typing import Any

from torch import Tensor

import branchcore as bc
from branchcore.models.accelerate import accelerate
from branchcore.models.qwen_image import from_pretrained
from branchcore.models.runtime import checkpoint_blocks
from branchcore.models.weights import add_lora, facts, save_lora

PROMPTS = ["a cat", "a dog", "a house on a hill", "a bold seven"]


def contrast(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Scores images (L, 3, H, W) in [0, 1]."""
    return {"contrast": images.std((1, 2, 3))}


def train(path: str, out: str, *, iterations: int = 100, steps: int = 10, **options: Any) -> None:
    """Trains the pipeline at `path`; `out` becomes the folder of the run."""
    model = from_pretrained(path, **options)
    add_lora(model, rank=64)
    accelerate(model.module)  # print it: it says what it bound
    checkpoint_blocks(model)  # the tape keeps block inputs only
    model.encode(PROMPTS, release=True)
    recipe = bc.recipes.build("mix_grpo", model.sigmas(steps), window=2, group=6)
    config = bc.TrainerConfig(iterations=iterations, prompts_per_iteration=2, prompts_per_round=1,
                              max_batch=6, lr=1e-4, ema_decay=0.9)  # fmt: skip
    trainer = bc.Trainer(model, PROMPTS, contrast, recipe, config, out, facts=facts(model))
    trainer.run()
    with trainer.averaged():
        save_lora(model, f"{out}/lora")


if __name__ == "__main__":
    train(*sys.argv[1:], device="cuda")
