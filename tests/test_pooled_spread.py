"""A std over all prompts while prompts are dropped: from earlier iterations, not from survivors."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from test_pruning import PROMPTS, SG, gradient_of
from test_pruning_runs import CONFIG, reward, rows, run, weights
from trees import batch, near, take

from branchcore import recipes, schedule
from branchcore.pooled_spread import Moments, PooledSpread
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.recipes import credits
from branchcore.recipes.recipe import PooledCredit
from branchcore.rewards import Scores
from branchcore.rollout import rollout
from branchcore.stages import Batch
from branchcore.trainer import Trainer

LONG = schedule.shifted_linear(14, 3)
DROP = PruningConfig(prompts=0.6)


def flow():
    return recipes.flow_grpo(SG, group=4, kl=0.3, global_std=True)


def gdpo():
    return recipes.flow_dppo(SG, group=4, credit="gdpo")


POOLED = {
    "flow_grpo": flow,
    "gdpo": gdpo,
    "weighted": lambda: recipes.awm(SG, group=3, times=2, kl=0.1, global_std=True),
    "together": lambda: recipes.dgpo(SG, group=3, global_std=True),
}


def test_toy_3_by_the_credit_itself():
    """The second prompt is rolled out with probability 1/2, and then weighs 2."""
    groups = [[[0.0], [1.0]], [[0.4], [0.6]]]
    builder = credits.group_credit(ddof=0, eps=0.0, global_std=True)
    both, alone = batch(groups), batch(groups[:1])
    moments = Moments.of(builder.pool(*both, np.ones(1)), np.ones(4))
    frozen = np.sqrt(moments.variance(builder.ddof))
    near(frozen, 0.36056, atol=5e-6)

    def part(call, prompt, credit):
        plan, rewards = call
        value = take(credit, plan, rewards).value[plan.leaf & (plan.prompt == prompt)]
        return (value * [1.0, 3.0]).mean()

    def mean(credit):
        kept = (part(both, 0, credit) + 2.0 * part(both, 1, credit)) / 2.0
        return 0.5 * kept + 0.5 * part(alone, 0, credit) / 2.0

    full = (part(both, 0, builder) + part(both, 1, builder)) / 2.0
    near(full, 0.83205, atol=5e-6)
    near(mean(builder.by(frozen)), full)
    near(mean(builder), 0.73536, atol=5e-6)


def scored(recipe, model, uids):
    """A credited batch in float64 with two rewards, which gdpo needs."""
    plan = recipe.plan(list(uids), seed=5, iteration=3)
    view = model.with_prompts([PROMPTS[uid] for uid in uids])
    forest = rollout(plan, view, list(uids), seed=5, iteration=3, dtype=torch.float64)
    # other batch shapes round otherwise
    values = torch.stack([forest.leaves.mean(1), forest.leaves.std(1)], 1).numpy().round(9)
    credit = recipe.credit(plan, values, np.ones(2), forest.log_prob.numpy())
    scores = Scores(("mean", "spread"), values)
    return Batch(forest, view, scores, credit, np.ones(len(plan)), tuple(uids))


@pytest.mark.parametrize("kind", POOLED)
def test_the_mean_over_prompt_coins_is_the_full_gradient(kind, toy):
    """By all coins of two of three prompts; with the survivors' own std it is not."""
    model, pruning = toy(), Pruning(DROP, POOLED[kind](), seed=2)
    spread, own = pruning.spread, pruning.recipe
    assert spread.credited() is own
    whole = scored(own, model, (0, 1, 2))
    spread.remember(spread.moments([whole], dict.fromkeys((0, 1, 2), 1.0), None))
    error = {}
    for name, recipe in (("earlier", spread.credited()), ("own", own)):
        every = scored(recipe, model, (0, 1, 2))
        np.testing.assert_allclose(every.credit.advantage, whole.credit.advantage, atol=1e-12)
        full, _ = gradient_of(every, recipe, model, every.weight)
        planned, total = len(every.forest.plan.trained()), torch.zeros_like(full)
        for kept in itertools.chain.from_iterable(
            itertools.combinations((0, 2), n) for n in (0, 1, 2)
        ):
            uids = tuple(sorted((1, *kept)))
            part = scored(recipe, model, uids)
            part = pruning.weigh(part, {uid: 1.0 if uid == 1 else 2.5 for uid in uids})
            one, _ = gradient_of(part, recipe, model, part.weight, num_planned=planned)
            total += 0.4 ** len(kept) * 0.6 ** (2 - len(kept)) * one
        error[name] = float((total - full).norm() / full.norm())
    assert error["earlier"] <= 1e-12
    assert error["own"] > 1e-4


def test_moments_add_up_and_stand_for_what_was_dropped(rng):
    values, weight = rng.normal(3.0, 2.0, size=(12, 2)), np.r_[np.ones(8), np.full(4, 2.5)]
    whole = Moments.of(values, weight)
    parts = [Moments.of(values[lo:hi], weight[lo:hi]) for lo, hi in ((0, 5), (5, 6), (6, 12))]
    added = parts[0].plus(parts[1]).plus(parts[2])
    for a, b in zip(whole, added, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    mean = weight @ values / weight.sum()
    near(whole.variance(), weight @ (values - mean) ** 2 / weight.sum())
    plain = Moments.of(values, np.ones(12))
    near(plain.variance(), values.var(0))
    near(plain.variance(ddof=1), values.var(0, ddof=1))
    # E over coins of the weighted sums is the full sum
    kept = [Moments.of(values, np.r_[np.ones(8), np.full(4, w)]) for w in (0.0, 2.5)]
    near(0.6 * kept[0].square + 0.4 * kept[1].square, plain.square, atol=1e-10)
    nothing = np.where(weight[:, None] > 1.0, np.nan, values)
    near(Moments.of(nothing, np.r_[np.ones(8), np.zeros(4)]).variance(), values[:8].var(0))
    for constant in (0.1, 1e6 / 3):
        flat = Moments.of(np.full((7, 1), constant), weight[:7] * 2.5)
        np.testing.assert_array_equal(flat.variance(), 0.0)
    small = Moments.of(1e3 + 1e-2 * values, np.ones(12)).variance()
    np.testing.assert_allclose(small, 1e-4 * values.var(0), rtol=1e-4)


def test_ten_variances_are_averaged_and_then_forgotten():
    spread = PooledSpread(flow(), 0.5)
    variances = np.random.default_rng(1).uniform(0.5, 2.0, 14)

    def remember(variance):
        spread.remember(Moments(2.0, np.zeros(1), np.array([2.0 * variance])))

    for i, variance in enumerate(variances[:10]):
        remember(variance)
        near(spread.variance, variances[: i + 1].mean())
    exact = variances[:10].mean()
    for variance in variances[10:]:
        remember(variance)
        exact = 0.9 * exact + 0.1 * variance
        near(spread.variance, exact)
    again = PooledSpread(flow(), 0.5)
    again.load(json.loads(json.dumps(spread.state())), "state.json")
    np.testing.assert_array_equal(again.variance, spread.variance)
    assert again.iterations == 14
    plan, rewards = batch([[[0.0], [1.0]], [[0.4], [0.9]]])
    wanted = credits.group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=True)
    got = take(again.credited().credit, plan, rewards).value
    np.testing.assert_array_equal(
        got, take(wanted.by(np.sqrt(again.variance)), plan, rewards).value
    )
    again.load(PooledSpread(flow(), 0.5).state(), "state.json")
    assert again.variance is None


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"variance": [-1.0], "iterations": 1},
        {"variance": [float("nan")], "iterations": 1},
        {"variance": [1.0], "iterations": 0},
        {"variance": [], "iterations": 2},
        {"variance": [], "iterations": -1},
        {"variance": 1.0, "iterations": 1},
        {"variance": [1.0], "iterations": "1"},
    ],
)
def test_a_damaged_state_is_refused(state):
    with pytest.raises(
        ValueError, match=re.escape(f"must hold variances >= 0 and their iterations, got {state}")
    ):
        PooledSpread(flow(), 0.5).load(state, "state.json")


def test_every_recipe_over_all_prompts_has_its_pool():
    """The std that a credit takes by itself is that of its pool."""
    plan, rewards = batch(np.random.default_rng(2).normal(size=(3, 4, 2)))
    found = set()
    for name in recipes.RECIPES:
        if "global_std" not in recipes.options_of(name):
            continue
        recipe = recipes.build(name, LONG, global_std=True)
        pool = recipe.credit.pool(plan, rewards, np.array([0.7, 1.3]))
        near(pool, (rewards @ [0.7, 1.3])[:, None])
        assert recipe.credit.ddof == 0
        found.add(name)
        assert not isinstance(recipes.build(name, LONG).credit, PooledCredit)
    assert {"flow_grpo", "awm", "dgpo", "diffusion_nft", "flash_grpo"} <= found
    for builder in (
        credits.group_credit(ddof=1, eps=1e-8, global_std=True),
        credits.group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=True),
        credits.gdpo_credit(conditions=[(0, 1, 0.2)]),
    ):
        weight = np.array([0.7, 1.3])
        pool = builder.pool(plan, rewards, weight)
        own = builder.by(pool.std(0, ddof=builder.ddof))
        for got, wanted in zip(
            take(own, plan, rewards, weight), take(builder, plan, rewards, weight), strict=True
        ):
            near(got, wanted)
        half = take(builder.by(pool.std(0) / 2), plan, rewards, weight).value
        assert np.abs(half - take(builder, plan, rewards, weight).value).max() > 0.1


@pytest.mark.parametrize("build", [flow, gdpo])
def test_a_run_takes_its_own_std_first_and_then_that_of_the_past(toy, tmp_path, build):
    """Resumed at every iteration bit for bit; the first iteration is that of an unpruned run."""
    prune = PruningConfig(rule="threshold", rate=0.5, prompts=0.7)
    whole = run(toy, tmp_path / "whole", prune, build())
    logged = rows(tmp_path / "whole")
    assert min(row["prompts_share"] for row in logged) < 1.0
    for stop in (1, 2, 3):
        out = tmp_path / str(stop)
        run(toy, out, prune, build(), stop_after=stop)
        rest = run(toy, out, prune, build(), resume=True)
        assert rows(out) == logged
        assert torch.equal(weights(rest), weights(whole))
        assert rest.learner.pruning.spread.state() == whole.learner.pruning.spread.state()
    plain = PruningConfig(rule="threshold", rate=0.5)
    other = run(toy, tmp_path / "plain", plain, build())
    assert rows(tmp_path / "plain")[0] == logged[0]
    assert other.learner.pruning.spread.state() == {"variance": [], "iterations": 0}
    assert other.learner.pruning.spread.credited() is other.learner.pruning.recipe


def test_a_run_remembers_the_variance_of_what_it_was_given(toy, tmp_path):
    """Over all rounds of an iteration, each prompt by its weight."""
    seen = []

    def spy(images, prompts):
        seen.append(sum(value.double().numpy() for value in reward(images, prompts).values()))
        return reward(images, prompts)

    config = dataclasses.replace(CONFIG, prompts_per_round=2, prune=PruningConfig(prompts=0.7))
    model = toy(torch.float32)
    trainer = Trainer(model, PROMPTS, spy, flow(), config, tmp_path / "run")
    mean, dropped = 0.0, 0
    for iteration in range(4):
        seen.clear()
        trainer.step()
        draw = trainer.learner.ledger.draw
        dropped += len(draw.indices) - len(draw.weight)
        assert len(seen) == len(draw.rounds)
        values, weight = np.concatenate(seen), np.repeat([*draw.weight.values()], 4)
        variance = np.cov(values, aweights=weight, ddof=0)
        mean += (variance - mean) / (iteration + 1)
        assert trainer.learner.pruning.spread.variance == pytest.approx(mean, rel=1e-6)
    assert dropped > 0
