"""FLUX.1 learns simple pictures: BranchGRPO's trees with a LoRA, batches chosen for 80 GB."""

import sys
from typing import Any

from torch import Tensor

import branchcore as bc
from branchcore.models.flux import from_pretrained
from branchcore.models.sizing.memory import bytes_of, plan_memory
from branchcore.models.weights import add_lora, facts, save_lora
from branchcore.rewards import JpegCompressibility, Rewards

PROMPTS = ["a cat", "a dog", "a house on a hill", "a bold seven"]


def bright(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Scores images (L, 3, H, W) in [0, 1]."""
    return {"bright": images.mean((1, 2, 3))}


def train(path: str, out: str, *, iterations: int = 100, steps: int = 10, **options: Any) -> None:
    """Trains the pipeline at `path`; `out` becomes the folder of the run."""
    model = from_pretrained(path, **options)
    add_lora(model, rank=16, targets=["attn.to_q", "attn.to_k", "attn.to_v"])
    model.encode(PROMPTS, release=True)
    reward = Rewards({"jpeg": JpegCompressibility(), "bright": bright})
    recipe = bc.recipes.build("branch_grpo", model.sigmas(steps), splits=[0, 2], branching=[4, 2])
    config = bc.TrainerConfig(
        iterations=iterations, prompts_per_iteration=2, reward_weights={"jpeg": 1.0, "bright": 0.5}
    )
    plan = plan_memory(model, recipe, config, bytes_of("80GB"), prompt=PROMPTS[0])
    trainer = bc.Trainer(model, PROMPTS, reward, recipe, plan.config, out, facts=facts(model))
    trainer.run()
    save_lora(model, f"{out}/lora")


if __name__ == "__main__":
    train(*sys.argv[1:], device="cuda")
