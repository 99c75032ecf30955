"""Training with rewards that fail: the same bits after retries, masked leaves, and their limit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from faulty_rewards import nothing_left_behind

from branchcore import recipes, schedule
from branchcore.credit import EdgeCredit, lift
from branchcore.metrics import repeatable
from branchcore.rewards import RewardFailure, Rewards, patient, waiting
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

PROMPTS = ["a", "b", "c", "d", "e"]
SG = schedule.shifted_linear(6)
CONFIG = TrainerConfig(iterations=2, prompts_per_iteration=4, prompts_per_round=2, lr=1e-3)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    with nothing_left_behind():
        yield


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """None is made."""
    monkeypatch.setattr(waiting, "pause", lambda seconds: None)


def toy_reward(images, prompts):
    shift = torch.tensor([ord(p) for p in prompts]) % 3
    flat = images.flatten(1)
    return {"mean": -(flat.mean(1) - 0.2 * shift).abs(), "spread": -flat.std(1)}


def first_fails(n, how):
    """The toy's reward; n calls fail, then one succeeds, and so on."""
    left = [n]

    def reward(images, prompts):
        left[0] -= 1
        if left[0] >= 0:
            if how == "raise":
                raise OSError("gone")
            return {"mean": torch.full((len(prompts),), math.nan), "spread": images[:, 0, 0]}
        left[0] = n
        return toy_reward(images, prompts)

    return reward


def trained(toy, out, reward, recipe=None, **options):
    config = dataclasses.replace(CONFIG, **options)
    recipe = recipe or recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7)
    trainer = Trainer(toy(torch.float32), PROMPTS, reward, recipe, config, out)
    rows = [repeatable(trainer.step()) for _ in range(config.iterations)]
    return rows, torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()])


def test_trials_time_limits_and_overlap_change_no_bit(toy, tmp_path):
    wanted, weights = trained(toy, tmp_path / "0", toy_reward, reward_attempts=1)
    assert [row["masked_leaves"] for row in wanted] == [0, 0]
    runs = [(toy_reward, {"reward_timeout": 30.0}), (first_fails(2, "raise"), {}),
            (first_fails(1, "nan"), {"reward_timeout": 30.0, "reward_max_failed": 0.1}),
            (Rewards({"x": toy_reward}), {})]  # fmt: skip
    for i, (reward, options) in enumerate(runs):
        for overlap in (False, True):
            out = tmp_path / f"{i} {overlap}"
            got, others = trained(toy, out, reward, overlap_rewards=overlap, **options)
            assert torch.equal(others, weights)
            assert [row["grad_norm"] for row in got] == [row["grad_norm"] for row in wanted]
            if i < 3:
                assert got == wanted


class SomeBad:
    """`toy_reward`, but in every round the leaf with the least sum has no score, alone either."""

    def __init__(self, round_leaves):
        self.round_leaves, self.bad = round_leaves, set()

    def __call__(self, images, prompts):
        sums = images.flatten(1).sum(1).tolist()
        if len(sums) == self.round_leaves:
            self.bad.add(min(sums))
        scores = toy_reward(images, prompts)
        scores["spread"][[x in self.bad for x in sums]] = math.nan
        return scores


def weighing(seen):
    """A recipe whose advantages are sums over weighed leaves of reward minus mean."""

    def credit(plan, values, weights, log_prob, *, leaf_weight=None):
        seen.append((values, leaf_weight))
        there = np.ones(len(values), dtype=bool) if leaf_weight is None else leaf_weight > 0.0
        total = np.where(there, values @ weights, 0.0)
        value = lift(plan, np.where(there, total - total[there].mean(), 0.0)[:, None])[:, 0]
        return EdgeCredit(np.stack([value.clip(0.0), (-value).clip(0.0)], 1), value)

    return dataclasses.replace(recipes.flow_grpo(SG, group=4), credit=credit)


@pytest.mark.parametrize("overlap", [False, True])
def test_masked_leaves_weigh_nothing_and_are_counted(toy, tmp_path, overlap):
    reward, seen = SomeBad(8), []
    options = {"reward_max_failed": 0.125, "iterations": 1, "overlap_rewards": overlap}
    (row,), weights = trained(toy, tmp_path / "a", reward, weighing(seen), **options)
    assert len(seen) == len(reward.bad) == 2
    values = np.concatenate([values for values, _ in seen])
    weight = np.concatenate([weight for _, weight in seen])
    assert [x.sum() for _, x in seen] == [7.0, 7.0]
    assert (np.isnan(values).all(1) == (weight == 0.0)).all()
    assert row["masked_leaves"] == 2
    assert row["leaves"] == 14
    kept = values[weight > 0.0]
    np.testing.assert_allclose(row["reward/mean"], kept[:, 0].mean(), rtol=1e-12)
    np.testing.assert_allclose(row["reward"], kept.sum(1).mean(), rtol=1e-12)
    assert all(math.isfinite(x) for x in row.values())
    assert bool(torch.isfinite(weights).all())
    assert float(row["grad_norm"]) > 0.0


def test_the_limit_is_a_share_of_all_leaves_of_an_iteration(toy, tmp_path):
    """One of the eight leaves of each round may be masked, but not two of sixteen."""
    model = toy(torch.float32)
    before = torch.cat([p.detach().flatten().clone() for p in model.module.parameters()])
    config = dataclasses.replace(CONFIG, reward_max_failed=0.1)
    trainer = Trainer(model, PROMPTS, SomeBad(8), weighing([]), config, tmp_path / "run")
    wanted = (
        r"reward: must score all but 0\.1 of 16 leaves, masked 2, the last because of "
        r"reward: spread must be finite, got nan .*; try a larger reward_max_failed"
    )
    with pytest.raises(RewardFailure, match=wanted):
        trainer.run()
    after = torch.cat([p.detach().flatten() for p in model.module.parameters()])
    assert torch.equal(after, before)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_leaves_out_what_cannot_be_scored(monkeypatch):
    pytest.importorskip("diffusers")
    from branchcore.models.commands import flow_task, sample_history

    samples = torch.arange(6.0).view(2, 3, 1)
    monkeypatch.setattr(flow_task, "sample", lambda *_, **__: samples)

    def reward(images, prompts):
        assert prompts == [PROMPTS[int(x) // 3] for x in images[:, 0]]
        if 4.0 in images:
            raise OSError("gone")
        return {"a": images[:, 0], "b": 2.0 * images[:, 0]}

    task, model = (object.__new__(x) for x in (flow_task.FlowTask, flow_task.FlowModel))
    task.flags = flow_task.TrainFlags(prompts=None, reward=("jpeg",), eval_count=3)
    task.config = dataclasses.replace(CONFIG, reward_max_failed=0.2)
    task.reward, task.grid_prompts = patient(reward, task.config), PROMPTS[:2]
    task._undrawn = sample_history.undrawn()
    assert task.evaluate(model) == pytest.approx({"reward": 6.6, "a": 2.2, "b": 4.4})


def test_patience_may_change_on_resume_but_what_is_masked_may_not(toy, tmp_path):
    def run(resume, **options):
        config = dataclasses.replace(CONFIG, **options)
        recipe = recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7)
        Trainer(toy(torch.float32), PROMPTS, toy_reward, recipe, config, tmp_path / "run",
                resume=resume).run()  # fmt: skip

    run(False)
    run(True, iterations=3, reward_attempts=7, reward_timeout=60.0)
    with pytest.raises(ValueError, match=r"got .'reward_max_failed': 0\.0. where this one has"):
        run(True, reward_max_failed=0.1)


@pytest.mark.parametrize(
    ("field", "value"), [("reward_attempts", 0), ("reward_timeout", 0.0), ("reward_max_failed", 1)]
)
def test_the_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be in \[.*\], got {value}"):
        dataclasses.replace(CONFIG, **{field: value})
