"""Runs of the digits model on several processes, as `test_ranks` starts them."""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from float64 import float64_throughout

from branchcore import recipes, schedule
from branchcore.models.digits.model import load_digits_model
from branchcore.models.digits.prompts import PROMPTS
from branchcore.parallel import ParallelConfig
from branchcore.pruning_config import PruningConfig
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SG = schedule.shifted_linear(4)
CONFIG = TrainerConfig(
    iterations=3, prompts_per_iteration=5, lr=1e-4, ema_decay=0.9, checkpoint_every=99, max_batch=8
)


def tree():
    return recipes.branch_grpo(SG, splits=(0, 1), clip=0.1, kl=0.05)


def windows():
    return recipes.mix_grpo(SG, group=3, window=1, kl=0.0)


def pooled():
    return recipes.flow_grpo(SG, group=3, global_std=True, kl=0.05)


def updates():
    return recipes.dance_grpo(SG, group=3, clip=0.1, updates=2)


def lagging():
    return recipes.diffusion_nft(SG, group=3)


PRUNED = PruningConfig(rule="optimal", rate=0.5)
AHEAD = PruningConfig(rule="history", rate=0.4, prompts=0.6)
RUNS = {
    "tree": (tree, {}),
    "random windows": (windows, {}),
    "global std": (pooled, {}),
    "global std, rounds": (pooled, {"prompts_per_round": 1}),
    "two updates": (updates, {}),
    "pruning": (tree, {"prune": PRUNED}),
    "history, prompts": (tree, {"prune": AHEAD, "prompts_per_iteration": 6}),
    "lagging sampler, rounds": (lagging, {"prompts_per_round": 1}),
    "fast steps": (tree, {"fast_steps": 2}),
    "2 prompts": (tree, {"prompts_per_iteration": 2}),
}


def reward(images, prompts):
    """Exact in float32, so that rounding of images does not reach it."""
    flat = images.double().flatten(1)
    aim = torch.tensor([len(p) % 5 for p in prompts]) / 5.0 - 0.5
    found = {"ink": -(flat.mean(1) - aim).abs(), "spread": flat.std(1)}
    return {name: torch.round(1024.0 * value) / 1024.0 for name, value in found.items()}


def run(kind, ranks=None, parallel=None, iterations=2):
    """Returns the gradients of all updates and the metrics of a run, in float64."""
    build, options = RUNS[kind]
    model = load_digits_model().to(torch.float64)
    config = dataclasses.replace(CONFIG, iterations=iterations, **options)
    rows, gradients = [], []
    with float64_throughout(), tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model, PROMPTS[:11], reward, build(), config, Path(out) / "run",
            callbacks=[rows.append], ranks=ranks, parallel=parallel,
        )  # fmt: skip
        learner = trainer.learner
        learner.pace.dtype = torch.float64
        step = learner.optimizer.step

        def keep():
            grads = [
                g.full_tensor() if hasattr(g, "full_tensor") else g
                for g in (p.grad for p in learner.masters.parameters)
            ]
            gradients.append(torch.cat([g.flatten() for g in grads]).numpy())
            step()

        learner.optimizer.step = keep
        for _ in range(iterations):
            rows.append(trainer.step())
    return gradients, rows


def ranked(ranks, kinds, options):
    parallel = ParallelConfig(**options)
    return {kind: run(kind, ranks, parallel) for kind in kinds}


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
