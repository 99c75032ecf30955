"""Random runs of a toy, and runs that are resumed, on several processes, for `test_ranks`."""

import dataclasses
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from rank_faults import CONFIG, PROMPTS, SG, Toy, reward

from branchcore import recipes
from branchcore.parallel import ParallelConfig
from branchcore.pruning_config import PruningConfig
from branchcore.trainer import Trainer

RECIPES = (
    lambda draw: recipes.branch_grpo(SG, splits=(0, draw.randint(1, 2)), clip=0.1, kl=0.05),
    lambda draw: recipes.mix_grpo(SG, group=draw.randint(2, 4), window=draw.randint(2, 3)),
    lambda draw: recipes.flow_grpo(SG, group=draw.randint(2, 4), global_std=True, kl=0.05),
    lambda draw: recipes.dance_grpo(SG, group=3, clip=0.1, updates=draw.randint(1, 2)),
    lambda draw: recipes.diffusion_nft(SG, group=3),
    lambda draw: recipes.tempflow_grpo(SG, trunks=2, children=2),
)
PRUNINGS = (
    PruningConfig(),
    PruningConfig(rule="uniform", rate=0.5),
    PruningConfig(rule="optimal", rate=0.5),
    PruningConfig(rule="history", rate=0.4, prompts=0.6),
)


def drawn(seed):
    """Returns a recipe and options of a run."""
    draw = random.Random(seed)
    recipe, prompts = draw.choice(RECIPES)(draw), draw.randint(1, 7)
    options = {
        "prompts_per_iteration": prompts,
        "prompts_per_round": draw.choice([None, 1, 2]),
        "max_batch": draw.choice([None, 4, 16]),
        "seed": seed,
    }
    if recipe.sampler_decay is None:
        options["prune"] = draw.choice(PRUNINGS)
    return recipe, options


def trained(out, recipe, config, resume=False, **spread):
    """Returns the gradients and the rows of the iterations that a run makes, in float64."""
    trainer = Trainer(
        Toy(), PROMPTS, reward, recipe, config, out, resume=resume, **spread
    )  # fmt: skip
    learner, gradients, rows = trainer.learner, [], []
    learner.pace.dtype = torch.float64
    step, iterate = learner.optimizer.step, trainer._iterate

    def keep_gradient():
        grads = [p.grad for p in learner.masters.parameters]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        gradients.append(torch.cat([g.flatten() for g in whole]).numpy())
        step()

    def keep_row():
        rows.append(iterate())
        return rows[-1]

    learner.optimizer.step, trainer._iterate = keep_gradient, keep_row
    trainer.run()
    return gradients, [(row["iteration"], row["reward"], row["grad_norm"]) for row in rows]


def random_runs(ranks, seeds, options):
    """One iteration or two of every drawn run."""
    spread = {"ranks": ranks, "parallel": ParallelConfig(**options)}
    found = []
    for seed in seeds:
        recipe, drawn_options = drawn(seed)
        # what has happened before matters to one pruning only
        length = 1 + (drawn_options.get("prune") == PRUNINGS[-1])
        config = dataclasses.replace(
            CONFIG, iterations=length, checkpoint_every=99, **drawn_options
        )
        folder = ranks.gather(tempfile.mkdtemp())[0]
        found.append(trained(Path(folder) / "run", recipe, config, **spread))
    return found


def part(ranks, out, iterations, options, resume):
    """A run to an iteration, from the start or from a checkpoint."""
    config = dataclasses.replace(CONFIG, iterations=iterations, prompts_per_iteration=5)
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7, kl=0.05)
    spread = {"ranks": ranks, "parallel": ParallelConfig(**options)}
    return trained(out, recipe, config, resume=resume, **spread)


def assert_same(found, wanted):
    """Equal but for rounding in float64."""
    (gradients, rows), (others, logged) = found, wanted
    assert len(gradients) == len(others) > 0
    for a, b in zip(gradients, others, strict=True):
        # terms of order 1 that cancel to 1e-9 leave their rounding
        assert np.linalg.norm(a - b) <= 1e-10 * np.linalg.norm(b) + 1e-14
    np.testing.assert_allclose(rows, logged, rtol=1e-8, atol=1e-12)
