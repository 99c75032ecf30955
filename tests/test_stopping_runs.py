"""Stopping in a run: bits, resume, what is saved, rounds, overlap, metrics, settings, refusals."""

import copy
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from test_pruning_runs import CONFIG, PROMPTS, SG, rows, weights
from test_pruning_runs import reward as both_rewards
from test_pruning_runs import run as train
from trees import chains, near

from branchcore import recipes, stages
from branchcore.cli import main
from branchcore.credit import EdgeCredit
from branchcore.gradient import Statistics
from branchcore.metrics import iteration_metrics
from branchcore.model_commands import settings
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.rewards import Scores
from branchcore.stages import Batch
from branchcore.stopping import Stopping
from branchcore.trainer import Trainer

STOP = PruningConfig(stop=(1, 3), stop_rate=0.5, floor=0.3)


def recipe(**options):
    return recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7, kl=0.05, **options)


def test_a_run_that_stops_branches_resumes_bit_for_bit_and_saves_work(toy, tmp_path):
    whole = train(toy, tmp_path / "whole", STOP)
    logged = rows(tmp_path / "whole")
    for stop in (1, 3):
        out = tmp_path / str(stop)
        train(toy, out, STOP, stop_after=stop)
        rest = train(toy, out, STOP, resume=True)
        assert rows(out) == logged
        assert torch.equal(weights(rest), weights(whole))
    base = train(toy, tmp_path / "base", PruningConfig())
    assert sum(whole.model.rows) < 0.8 * sum(base.model.rows)
    plain = rows(tmp_path / "base")
    share = np.mean([row["stopped_share"] for row in logged])
    assert 0.5 < share < 0.95
    for row, other in zip(logged, plain, strict=True):
        assert row["leaves"] == round((1 - row["stopped_share"]) * other["leaves"])
        assert "stopped_share" not in other
        assert row["parents"] < other["parents"]
    assert not torch.equal(weights(whole), weights(base))
    other = dataclasses.replace(STOP, stop=(1,))
    with pytest.raises(ValueError, match="must be of a run with the same config"):
        train(toy, tmp_path / "whole", other, resume=True)


def test_rounds_ranks_and_later_updates(toy, tmp_path):
    """Rounds of any size stop the same branches; stored velocities and fast steps go on."""
    config = dataclasses.replace(CONFIG, iterations=2)
    known = {}
    for size in (None, 1, 3):
        one = dataclasses.replace(config, prompts_per_round=size, max_batch=size and 5)
        train(toy, tmp_path / str(size), STOP, config=one)
        known[size] = rows(tmp_path / str(size))
    for size in (1, 3):
        assert known[size][0]["stopped_share"] == known[None][0]["stopped_share"]
        assert known[size][0]["reward"] == pytest.approx(known[None][0]["reward"], rel=1e-5)
        assert known[size][0]["grad_norm"] == pytest.approx(known[None][0]["grad_norm"], rel=1e-3)
    both = dataclasses.replace(STOP, rule="optimal", rate=0.3, prompts=0.3)
    dance = recipes.dance_grpo(SG, group=6, clip=0.2, updates=2)
    train(toy, tmp_path / "updates", both, dance, config=config)
    row = rows(tmp_path / "updates")[-1]
    assert row["stopped_share"] > 0
    assert 0 < row["noise_floor"] < 1e-5
    fast = dataclasses.replace(config, fast_steps=2)
    train(toy, tmp_path / "fast", STOP, config=fast)
    assert rows(tmp_path / "fast")[0]["noise_floor"] < 1e-5


def test_overlapped_rewards_and_previews_take_turns(toy, tmp_path):
    """Same bits; the reward is never entered twice."""

    class Views(toy):
        def with_prompts(self, prompts):
            return copy.copy(super().with_prompts(prompts))

    inside, most = [], []

    def careful(images, prompts):
        inside.append(threading.get_ident())
        most.append(len(inside))
        result = both_rewards(images, prompts)
        time.sleep(0.02)
        inside.pop()
        return result

    config = dataclasses.replace(CONFIG, prompts_per_round=1, iterations=2, prune=STOP)
    done = {}
    for overlap in (False, True):
        one = dataclasses.replace(config, overlap_rewards=overlap)
        out = tmp_path / str(overlap)
        trainer = Trainer(Views(torch.float32), PROMPTS, careful, recipe(), one, out)
        trainer.run()
        done[overlap] = weights(trainer)
    assert max(most) == 1
    assert torch.equal(done[False], done[True])


def test_a_reward_that_fails_on_a_preview_ends_the_iteration(toy, tmp_path):
    def broken(images, prompts):
        return {"mean": torch.full((len(prompts),), torch.nan)}

    config = dataclasses.replace(CONFIG, prune=STOP)
    trainer = Trainer(toy(torch.float32), PROMPTS, broken, recipe(), config, tmp_path / "run")
    with pytest.raises(ValueError, match="reward: mean must be finite, got nan for image 0"):
        trainer.run()
    assert sum(trainer.model.rows) < 4 * 15


def grow(toy, plan_of, config, uids=(0, 1), reward=both_rewards, **options):
    method = plan_of()
    plan = method.plan(list(uids), seed=3, iteration=0)
    stopping = Stopping(config, method, reward, seed=3)
    texts = [PROMPTS[uid] for uid in uids]
    model = toy(torch.float32)
    where = {"seed": 3, "iteration": 0, "stopping": stopping}
    return method, stages.grow(plan, model, method, texts, list(uids), **where, **options)


def test_only_what_is_left_is_decoded_scored_and_credited(toy, monkeypatch):
    decoded, scored = [], []

    class Counting(toy):
        def decode(self, latents):
            decoded.append(len(latents))
            return super().decode(latents)

    def counting(images, prompts):
        scored.append(len(prompts))
        return both_rewards(images, prompts)

    method, grown = grow(Counting, recipe, STOP, reward=counting, max_batch=3)
    plan, alive = grown.forest.plan, grown.forest.alive
    left = int((plan.leaf & alive).sum())
    assert scored[0] == (plan.depth == 1).sum()
    assert len(grown.images) == len(grown.prompts) == left < plan.leaf.sum()
    assert max(decoded) <= 3
    assert sum(decoded) == sum(scored) + left
    leaves = np.flatnonzero(plan.leaf & alive)
    assert torch.equal(grown.images.flatten(1), grown.forest.states(leaves))
    assert grown.prompts == [PROMPTS[i] for i in plan.prompt[leaves]]
    got = counting(grown.images, grown.prompts)
    scores = Scores(tuple(got), torch.stack(list(got.values()), 1).double().numpy())
    batch = stages.finish(grown, scores, method, iteration=0)
    near(batch.scores.values[alive[plan.leaf]], scores.values)
    assert np.isnan(batch.scores.values[~alive[plan.leaf]]).all()
    np.testing.assert_array_equal(batch.leaf_weight > 0, alive[plan.leaf])
    seen = np.zeros(len(plan), dtype=bool)
    seen[leaves] = True
    for row in range(len(plan) - 1, -1, -1):
        seen[plan.parent[row]] |= seen[row] & (plan.parent[row] >= 0)
    np.testing.assert_array_equal(batch.weight > 0, seen)
    assert not batch.credit.advantage[~seen].any()
    stats = stages.accumulate(batch, method)
    assert 0 < stats.parents < plan.counts().trained_parents


def test_where_nothing_is_left_no_reward_is_called_and_nothing_is_learnt(toy, tmp_path):
    calls = []

    def counting(images, prompts):
        calls.append(len(prompts))
        return both_rewards(images, prompts)

    config = dataclasses.replace(CONFIG, iterations=1, prompts_per_iteration=3)
    config = dataclasses.replace(config, prompts_per_round=1, prune=STOP, tape=0)
    model = toy(torch.float32)
    trainer = Trainer(model, PROMPTS, counting, recipe(), config, tmp_path / "run")
    trainer.learner.stopping.previews = never = Never(trainer.learner.stopping.previews)
    before = weights(trainer)
    metrics = trainer.step()
    assert never.count == 3
    assert len(calls) == 3
    assert metrics["leaves"] == 0
    assert metrics["stopped_share"] == 1.0
    assert metrics["edges"] == metrics["parents"] == metrics["grad_norm"] == 0
    assert np.isnan(metrics["reward"])
    assert np.isnan(metrics["reward_std/mean"])
    # AdamW only decays
    assert (weights(trainer) - before).abs().max() <= 1e-6


class Never:
    """Ends all branches, with probabilities as they are."""

    def __init__(self, previews):
        self.made, self.count = previews, 0

    def __call__(self, *args):
        self.count += 1
        made = self.made(*args)
        ask = made.choose
        made.choose = lambda *given: np.zeros_like(ask(*given))
        return made


def test_metrics_weigh_the_rewards_of_those_left():
    plan = chains(4)

    class Forest:
        calls = 1

    Forest.plan = plan
    values = np.array([[1.0], [np.nan], [4.0], [np.nan]])
    weight = np.array([2.0, 0.0, 6.0, 0.0])
    total = Statistics.zero(torch.device("cpu"))
    credit = EdgeCredit(np.zeros((len(plan), 2)), np.zeros(len(plan)))
    batch = Batch(Forest, None, Scores(("r",), values), credit, np.ones(len(plan)))
    got = iteration_metrics([batch._replace(leaf_weight=weight)], total, {"r": 2.0})
    assert got["reward/r"] == pytest.approx((2 * 1 + 6 * 4) / 8)
    assert got["reward"] == 2 * got["reward/r"]
    assert got["reward_std/r"] == pytest.approx(np.sqrt(0.25 * 0.75) * 3)
    assert (got["leaves"], got["stopped_share"], got["zero_std_share"]) == (2, 0.5, 0.0)
    plain = batch._replace(scores=Scores(("r",), np.arange(4.0)[:, None]))
    both = [plain, batch._replace(leaf_weight=weight)]
    got = iteration_metrics(both, total, None)
    assert got["reward"] == pytest.approx((0 + 1 + 2 + 3 + 2 + 24) / 12)
    assert got["stopped_share"] == 0.25
    got = iteration_metrics([plain], total, None)
    assert got["reward"] == 1.5
    assert "stopped_share" not in got


def test_the_history_of_prompts_counts_what_was_stopped(toy):
    method, grown = grow(toy, recipe, STOP)
    plan = grown.forest.plan
    rewards = both_rewards(grown.images, grown.prompts)
    scores = Scores(tuple(rewards), torch.stack(list(rewards.values()), 1).double().numpy())
    batch = stages.finish(grown, scores, method, iteration=0)
    pruning = Pruning(dataclasses.replace(STOP, prompts=0.5), method, seed=3)
    pruning.remember(np.array([7, 8]), [batch])
    size = batch.weight * batch.credit.advantage.sum(1)
    for prompt, index in ((0, 7), (1, 8)):
        edges = plan.train & (plan.prompt == prompt)
        assert pruning.past.means["prompts"][index] == pytest.approx(
            size[edges].sum() / edges.sum()
        )


def test_settings_of_the_command_line(capsys):
    for text in ("4,6", "[4,6]", "4, 6"):
        _, fields = settings([f"prune_stop={text}", "prune_stop_rate=0.5"], "branch_grpo")
        assert fields == {"prune": PruningConfig(stop=(4, 6), stop_rate=0.5)}
    _, fields = settings(["prune_stop=4", "prune_stop_rate=0.5", "prune=optimal"], "branch_grpo")
    assert fields == {"prune": PruningConfig(stop=(4,), stop_rate=0.5, rule="optimal")}
    with pytest.raises(ValueError, match="prune_stop must be depths like 4,6, got 'four'"):
        settings(["prune_stop=four", "prune_stop_rate=0.5"], "branch_grpo")
    words = ["plan", "branch_grpo", "--steps", "6", "--set", "splits=[0,1]"]
    stop = ["--set", "prune_stop=1,2", "--set", "prune_stop_rate=0.25"]
    main([*words, *stop])
    # 1 + 2 + 4 x 4 forwards; 2 are asked, then 4 x 0.75
    last = capsys.readouterr().out.splitlines()[-1]
    forwards = 3 + 4 * 0.75 + 3 * 4 * 0.75**2
    assert f"runs {forwards:.1f} of 19 forwards" in last
    assert f"decodes {4 * 0.75**2:.1f} of 4 leaves on average, for 5.0 previews" in last
    with pytest.raises(SystemExit, match=r"stop must be \(\) with dgpo, whose loss is no sum"):
        main(["plan", "dgpo", *stop])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop": (2,)}, r"stop and stop_rate must be given together, got \(2,\) and 0.0"),
        ({"stop_rate": 0.5}, r"stop and stop_rate must be given together, got \(\) and 0.5"),
        ({"stop": (3, 2), "stop_rate": 0.5}, r"stop must be ascending depths >= 0, got \(3, 2\)"),
        ({"stop": (2, 2), "stop_rate": 0.5}, r"stop must be ascending depths >= 0, got \(2, 2\)"),
        ({"stop": (-1,), "stop_rate": 0.5}, r"stop must be ascending depths >= 0, got \(-1,\)"),
        ({"stop": (2,), "stop_rate": 1.0}, r"stop_rate must be in \[0, 1\), got 1.0"),
        (
            {"stop": (2,), "stop_rate": 0.5, "floor": 0.6},
            r"floor must be in \(0, 1 - stop_rate\] = \(0, 0.5\], got 0.6",
        ),
        (
            {"stop": (2,), "stop_rate": 0.5, "rule": "cppo", "rate": 0.5},
            "stop must be .* for rule 'cppo', which ranks all branches",
        ),
    ],
)
def test_what_a_config_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        PruningConfig(**options)


def test_types_of_a_config():
    for stop in ([2], 2, (2.0,), (True,), "2"):
        with pytest.raises(TypeError, match="stop must be a tuple of int"):
            PruningConfig(stop=stop, stop_rate=0.5)
    with pytest.raises(TypeError, match="stop_rate must be float"):
        PruningConfig(stop=(2,), stop_rate="0.5")
    PruningConfig(stop=(2,), stop_rate=0.5, floor=0.5)
    with pytest.raises(ValueError, match="floor must be left out"):
        PruningConfig(floor=0.5)


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (lambda: recipes.dgpo(SG, group=4), {}, "dgpo, whose loss .* equal prompt and label"),
        (lambda: recipes.flow_dpo(SG, group=4), {}, "flow_dpo, whose loss is no sum"),
        (
            lambda: recipes.branch_grpo(SG, splits=(0, 1), pruning="parent_top1"),
            {},
            "pruning='parent_top1' of branch_grpo",
        ),
        (lambda: recipes.dance_grpo(SG, group=6, best_of=4), {}, "best_of=4 of dance_grpo"),
        (recipe, {"stop": (9,)}, r"stop must be at depths .* in 0\.\.5, got 9"),
        (
            recipe,
            {"stop": (0,)},
            r"stop_rate must leave one of a prompt's 1 branches at depth 0 on average, got 0.5",
        ),
        (recipe, {"stop": (1, 2), "stop_rate": 0.7}, "one of a prompt's 2 branches at depth 1"),
        (recipe, {"stop": (2, 3), "stop_rate": 0.6}, "one of a prompt's 4 branches at depth 3"),
    ],
)
def test_what_a_run_refuses_before_it_starts(build, options, said, toy, tmp_path):
    prune = PruningConfig(**({"stop": (2,), "stop_rate": 0.5} | options))
    config = dataclasses.replace(CONFIG, prune=prune)
    with pytest.raises(ValueError, match=said):
        Trainer(toy(torch.float32), PROMPTS, both_rewards, build(), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    allowed = recipes.dance_grpo(SG, group=6, best_of=6)
    Stopping(STOP, allowed, both_rewards, seed=0)


def test_a_plan_with_too_few_branches_is_refused_where_it_is_met(toy):
    """The window has moved: its prefix is shared beyond the checkpoint."""
    method = recipes.mix_grpo(SG, group=4, window=2, interval=1)
    stopping = Stopping(dataclasses.replace(STOP, stop=(2,)), method, both_rewards, seed=0)
    late = method.plan([0], seed=0, iteration=3)
    with pytest.raises(ValueError, match="1 branches at depth 2"):
        stopping.previews(late, toy(), ["a"], [0], 3)
