"""Wan 2.1 learns to move: tree rollouts of videos with a LoRA on self- and cross-attention."""

import sys
from typing import Any

from torch import Tensor

import branchcore as bc
from branchcore.models.runtime import checkpoint_blocks
from branchcore.models.wan import from_pretrained
from branchcore.models.weights import add_lora, facts, save_lora

PROMPTS = ["a cat", "a dog", "a house on a hill", "a bold seven"]


def motion(videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Scores videos (L, F, 3, H, W) in [0, 1] by how much one frame differs from the next."""
    return {"motion": videos.diff(dim=1).abs().mean((1, 2, 3, 4))}


def train(path: str, out: str, *, iterations: int = 100, steps: int = 20, **options: Any) -> None:
    """Trains the pipeline at `path`; `out` becomes the folder of the run."""
    model = from_pretrained(path, **options)  # num_frames=33, guidance=5.0
    add_lora(model, rank=32)
    checkpoint_blocks(model)  # the tape keeps block inputs only
    model.decode_batch = 1  # videos per VAE call
    model.encode(PROMPTS, release=True)
    recipe = bc.recipes.build("branch_mix", model.sigmas(steps), branching=[2, 2], splits=[0, 2])
    config = bc.TrainerConfig(iterations=iterations, prompts_per_iteration=2, prompts_per_round=1,
                              max_batch=4, lr=1e-4)  # fmt: skip
    trainer = bc.Trainer(model, PROMPTS, motion, recipe, config, out, facts=facts(model))
    trainer.run()
    save_lora(model, f"{out}/lora")


if __name__ == "__main__":
    train(*sys.argv[1:], device="cuda")
