"""Clipping that knows the noise floor: against a loop in float64, in runs, and what it refuses."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from branchcore import ops, recipes, reference, schedule, stages
from branchcore.distributed import Ranks
from branchcore.metrics import repeatable
from branchcore.noise_floor import NoiseFloor, clipped_by
from branchcore.objective import ClippedRatio, MaskedRatio
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SG = schedule.shifted_linear(6)
PROMPTS = ["a", "b", "c", "d", "e"]
CONFIG = TrainerConfig(
    iterations=3, prompts_per_iteration=3, lr=1e-6, max_batch=5, checkpoint_every=1, tape=0
)


def reward(images, prompts):
    flat = images.flatten(1)
    return {"mean": -flat.mean(1).abs(), "spread": -flat.std(1)}


@pytest.fixture
def noisy(toy):
    """A model whose velocities depend on how many rows a call has, as a real one's do in bf16."""

    class NoisyModel(toy):
        def _call(self, net, x, sigma, prompt):
            row = torch.sin(40.0 * x.flatten(1).sum(1)).view(-1, *[1] * (x.dim() - 1))
            return super()._call(net, x, sigma, prompt) * (1.0 + 1e-3 * row * (len(x) == 5))

    return NoisyModel


def dance(**options):
    return recipes.dance_grpo(SG, **{"group": 6, "eta": 0.7, "updates": 2, "clip": 1e-5, **options})


def run(model, out, recipe=None, resume=False, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    trainer = Trainer(
        model(torch.float32), PROMPTS, reward, recipe or dance(), config, out, resume=resume
    )
    trainer.run()
    return trainer, [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()])


def counted(p, q, start, exponent, advantage, weight, clip, floor=0.0):
    """What the bounds cut, edge by edge, and how much of it is nearer than the floor."""
    cut = noise = 0
    for n in range(len(q)):
        for e in range(int(start[n]), int(start[n + 1])):
            (lin, quad), (plus, minus) = exponent[e].tolist(), advantage[e].tolist()
            log_ratio = lin * float(p[e]) - quad * float(q[n])
            above = log_ratio - math.log1p(clip[1])
            below = math.log1p(-clip[0]) - log_ratio
            for advantage_of, excess in ((plus, above), (minus, below)):
                if weight[e] and advantage_of > 0.0 and excess > 0.0:
                    cut += 1
                    noise += excess <= floor
    return cut, noise


@pytest.mark.parametrize("clip", [(1e-2, 2e-2), (1e-4, 1e-4)])
@pytest.mark.parametrize("floor", [0.0, 5e-3, 3e-2, 10.0])
def test_clips_that_are_noise_are_counted_edge_by_edge(clip, floor):
    inputs = ops.ratio_loss.__globals__["_build"](counts=(4,) * 30, clip=clip, floor=floor)
    cut, noise = counted(*inputs.values())
    assert cut > 15
    assert 0 < noise < cut or floor in (0.0, 10.0)
    for wide in (inputs, {k: v.double() if k in "p_E q_N" else v for k, v in inputs.items()}):
        for function in (ops.ratio_loss, reference.ratio_loss):
            stats = function(**wide).stats
            assert float(stats.clipped_low + stats.clipped_high) == cut
            assert float(stats.clipped_noise) == noise


def test_the_floor_changes_neither_loss_nor_gradient():
    inputs = ops.ratio_loss.__globals__["_build"](counts=(4,) * 30)
    found = []
    for floor in (0.0, 1e-2):
        leaves = {k: inputs[k].clone().requires_grad_() for k in ("p_E", "q_N")}
        result = ops.ratio_loss(**{**inputs, **leaves, "floor": floor})
        result.loss.backward()
        found.append((result.loss, *(leaf.grad for leaf in leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for floor in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="ratio_loss: floor must be finite and >= 0, got"):
            ops.ratio_loss(**{**inputs, "floor": floor})


def test_the_clip_range_is_so_many_floors_of_the_log_ratio():
    own = ClippedRatio(clip=(1e-4, 3e-3), kl=0.5)
    by_floor = clipped_by(own, 1e-3, 2.0)
    assert by_floor.kl == 0.5
    assert by_floor.floor == 1e-3
    low, high = by_floor.clip
    assert math.log1p(-low) == pytest.approx(-2e-3, rel=1e-12)
    assert high == 3e-3  # wider than two floors
    assert clipped_by(own, 1e-3, 0.0).clip == own.clip
    assert clipped_by(own, 0.0, 5.0).clip == own.clip
    assert 0.0 < clipped_by(own, 3.0, 1.0).clip[0] < 1.0  # a ratio below 0 is none
    masked = clipped_by(MaskedRatio(clip=(1e-4, 1e-4), trust=1e-3), 1e-3, 2.0)
    assert isinstance(masked, MaskedRatio)
    assert masked.trust == 1e-3


def test_a_run_clips_by_its_floor(noisy, tmp_path):
    _, plain = run(noisy, tmp_path / "plain")
    trainer, rows = run(noisy, tmp_path / "floor", clip_floor=2)
    floor = rows[0]["noise_floor"]
    assert floor == plain[0]["noise_floor"]
    assert floor > 1e-4
    assert plain[0]["clip_share"] > 0.1
    assert plain[0]["clip_noise_share"] > 0.5
    assert "clip" not in plain[0]
    assert [row["clip"] for row in rows] == [-math.expm1(-2.0 * floor)] * 3
    for row, other in zip(rows, plain, strict=True):
        assert row["clip_share"] < other["clip_share"] / 4
    # the same as a recipe with this range, bit for bit
    low, high = trainer.learner.floor.recipe.objective.clip
    recipe = dance()
    known = dataclasses.replace(recipe.objective, clip=(low, high))
    other, _ = run(noisy, tmp_path / "known", dataclasses.replace(recipe, objective=known))
    assert torch.equal(weights(trainer), weights(other))


def test_a_resumed_run_keeps_its_floor(noisy, tmp_path, monkeypatch):
    whole, rows = run(noisy, tmp_path / "whole", clip_floor=1.5)
    first, _ = run(noisy, tmp_path / "parts", clip_floor=1.5, iterations=1)
    assert first.learner.floor.value == rows[0]["noise_floor"]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "noise_floor", lambda *_, **__: pytest.fail("measured again"))
        second, again = run(noisy, tmp_path / "parts", clip_floor=1.5, resume=True)
    assert [*map(repeatable, again)] == [*map(repeatable, rows)]
    assert torch.equal(weights(whole), weights(second))
    with pytest.raises(ValueError, match=r"same config, got \{'clip_floor': 1.5\}"):
        run(noisy, tmp_path / "parts", clip_floor=3, resume=True)


class Others(Ranks):
    """Processes whose floors are given; this one is the first."""

    def __init__(self, *floors):
        super().__init__()
        self.floors = floors

    def stack(self, values):
        return np.concatenate([values[None], np.reshape(self.floors, (-1, 1))])


def test_all_processes_go_by_the_largest_floor(monkeypatch):
    config, recipe = dataclasses.replace(CONFIG, clip_floor=2.0), dance()
    floor = NoiseFloor(recipe, config, Others(3e-3, math.nan), lockstep=False)
    assert floor.metrics() == {}
    assert floor.recipe is recipe
    monkeypatch.setattr(stages, "noise_floor", lambda *_, **__: 1e-3)
    floor.measure(None)
    assert floor.value is None  # before the others have said theirs
    floor.agree()
    assert floor.metrics() == {"noise_floor": 3e-3, "clip": -math.expm1(-6e-3)}
    without = NoiseFloor(recipe, config, Others(math.nan), lockstep=False)
    without.agree()
    assert without.value is None
    monkeypatch.setattr(stages, "noise_floor", lambda *_, **__: math.nan)
    with pytest.raises(FloatingPointError, match="noise floor must be finite, got nan"):
        without.measure(None)


def test_what_is_measured_in_an_iteration_given_up_is_measured_again(noisy, tmp_path):
    trainer = Trainer(
        noisy(torch.float32), PROMPTS, reward, dance(),
        dataclasses.replace(CONFIG, clip_floor=2.0, bad_updates=1), tmp_path / "run",
    )  # fmt: skip
    step = trainer.learner.optimizer_step
    with pytest.MonkeyPatch.context() as patch:
        bad = torch.tensor(math.nan)
        patch.setattr(trainer.learner.parallel, "grad_norm", lambda *_: bad)
        assert "must be finite" in trainer.step()["skipped"]
    assert step == trainer.learner.optimizer_step
    assert trainer.step()["noise_floor"] > 1e-4


@pytest.mark.parametrize(
    ("recipe", "lockstep", "wanted"),
    [
        (recipes.awm(SG, group=4, times=2, updates=2), False, "for awm, which clips no ratio"),
        (
            recipes.flow_dppo(SG, group=4, updates=2),
            False,
            "for flow_dppo without a clip range, got 2; try clip=1e-4",
        ),
        (dance(updates=1), False, "with one update per iteration, .* got 2; try updates=2"),
        (
            dataclasses.replace(dance(), sampler_decay=lambda iteration: 0.9),
            False,
            "where the policy that samples lags behind the trained one, got 2",
        ),
        (dance(), True, "where weights are gathered for every call, got 2; try reshard=False"),
    ],
)
def test_what_has_no_floor_to_clip_by_says_why(recipe, lockstep, wanted):
    config = dataclasses.replace(CONFIG, clip_floor=2.0)
    with pytest.raises(ValueError, match=f"TrainerConfig: clip_floor must be 0 {wanted}"):
        NoiseFloor(recipe, config, Ranks(), lockstep=lockstep)
    NoiseFloor(recipe, CONFIG, Ranks(), lockstep=lockstep)
    for wrong, error in ((-1.0, ValueError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(error, match="TrainerConfig: clip_floor must be"):
            dataclasses.replace(CONFIG, clip_floor=wrong)
