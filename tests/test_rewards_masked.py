"""Masked leaves in whole runs: every recipe goes on without them, NaN reaches nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from branchcore import recipes, schedule
from branchcore.pruning_config import PruningConfig
from branchcore.rewards import waiting
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SG = schedule.shifted_linear(6)
CONFIG = TrainerConfig(
    iterations=2, prompts_per_iteration=4, prompts_per_round=2, lr=1e-3, reward_max_failed=0.3
)
PROMPTS = ["a", "b", "c", "d", "e"]


class SomeBad:
    """A reward without a score for the leaf with the least sum of every large batch."""

    def __init__(self):
        self.bad = set()

    def __call__(self, images, prompts):
        sums = images.flatten(1).sum(1).tolist()
        if len(sums) >= 4:
            self.bad.add(min(sums))
        flat = images.flatten(1)
        scores = {"mean": flat.mean(1).exp(), "spread": flat.std(1)}
        scores["spread"][[x in self.bad for x in sums]] = math.nan
        return scores


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """None is made."""
    monkeypatch.setattr(waiting, "pause", lambda seconds: None)


def rows(toy, out, recipe, config):
    trainer = Trainer(toy(torch.float32), PROMPTS, SomeBad(), recipe, config, out)
    found = [trainer.step() for _ in range(2)]
    assert all(bool(p.isfinite().all()) for p in trainer.model.module.parameters())
    return found


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_every_recipe_goes_on_without_masked_leaves(toy, tmp_path, name):
    recipe = recipes.build(name, schedule.shifted_linear(10, 3))
    config = dataclasses.replace(CONFIG, prompts_per_iteration=2, prompts_per_round=1)
    for row in rows(toy, tmp_path / "a", recipe, config):
        assert row["masked_leaves"] >= 2
        assert row["grad_norm"] > 0.0
        assert all(math.isfinite(x) for x in row.values())
        assert "stopped_share" not in row


def test_stopping_and_masking_go_together(toy, tmp_path):
    recipe = recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7)
    config = dataclasses.replace(CONFIG, prune=PruningConfig(stop=(2,), stop_rate=0.4))
    for row in rows(toy, tmp_path / "a", recipe, config):
        assert row["masked_leaves"] == 2
        share = (32 - row["leaves"] - 2) / 32
        np.testing.assert_allclose(row["stopped_share"], share, atol=1e-12)
        assert share > 0.0
        assert all(math.isfinite(x) for x in row.values())
