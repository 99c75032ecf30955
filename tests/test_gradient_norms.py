"""Measured gradient norms: unbiased by enumeration, and without a trace in training."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from test_pruning import SG, gradient_of, grown
from test_pruning_runs import CONFIG, dance, rows, run, weights

from branchcore import recipes, unbiased
from branchcore.gradient_norms import MOST, Measured, drawn_first, measure, norms2
from branchcore.masters import Masters
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig

EXTRA = {"added_variance_measured", "gradient_norm_correlation"}


def test_both_sums_are_unbiased_over_coins_and_draws():
    """All masks of five units, and of those kept all draws of at most two."""
    p, norm2 = np.array([1.0, 0.3, 0.5, 0.8, 0.1]), np.array([2.0, 0.5, 3.0, 0.1, 0.7])
    predicted2 = np.array([1.0, 0.2, 4.0, 0.3, 0.4])
    added = total = count = x = xy = chance = 0.0
    for mask in itertools.product((False, True), repeat=5):
        left = np.flatnonzero(mask)
        of_mask = np.prod(np.where(mask, p, 1.0 - p))
        if not of_mask:
            continue
        orders = list(itertools.permutations(range(len(left))))
        for order in orders:
            drawn = left[drawn_first(np.array(order, float), 2)]
            assert len(drawn) == min(2, len(left))
            share = len(drawn) / len(left)
            sums = Measured.of(predicted2[drawn], norm2[drawn], p[drawn], share)
            one = of_mask / len(orders)
            chance += one
            added += one * sums.added
            total += one * sums.norm2
            count += one * sums.weight
            x += one * sums.x
            xy += one * sums.xy
    assert chance == pytest.approx(1.0, abs=1e-14)
    assert added == pytest.approx(unbiased.added_variance(p, norm2), rel=1e-12)
    assert total == pytest.approx(norm2.sum(), rel=1e-12)
    assert count == pytest.approx(5.0, rel=1e-12)
    assert x == pytest.approx(np.sqrt(predicted2).sum(), rel=1e-12)
    assert xy == pytest.approx(np.sqrt(predicted2 * norm2).sum(), rel=1e-12)


def test_correlation_is_that_of_the_norms(rng):
    predicted2, measured2 = rng.uniform(0.1, 2.0, size=(2, 9))
    whole = Measured.of(predicted2, measured2, np.ones(9), 1.0)
    exact = np.corrcoef(np.sqrt(predicted2), np.sqrt(measured2))[0, 1]
    got = whole.metrics()
    assert got["gradient_norm_correlation"] == pytest.approx(exact, rel=1e-10)
    assert got["added_variance_measured"] == 0.0
    parts = [
        Measured.of(predicted2[i], measured2[i], np.ones(4), 1.0)
        for i in (slice(0, 4), slice(4, 8))
    ]
    both = parts[0].plus(parts[1])
    eight = Measured.of(predicted2[:8], measured2[:8], np.ones(8), 1.0)
    np.testing.assert_allclose(both, eight, rtol=1e-12)
    scaled = Measured.of(predicted2, 3.0 * predicted2, np.full(9, 0.5), 0.25).metrics()
    assert scaled["gradient_norm_correlation"] == pytest.approx(1.0, rel=1e-10)
    assert scaled["added_variance_measured"] == pytest.approx(1.0)
    # twice as likely, half the weight: the same as an element twice
    p = np.where(np.arange(9) < 4, 0.5, 1.0)
    again = np.r_[predicted2[:4], predicted2], np.r_[measured2[:4], measured2]
    got = Measured.of(predicted2, measured2, p, 1.0).metrics()["gradient_norm_correlation"]
    assert got == pytest.approx(np.corrcoef(*np.sqrt(again))[0, 1], rel=1e-10)
    assert Measured().metrics() == {}
    assert set(Measured.of(np.ones(5), measured2[:5], np.ones(5), 1.0).metrics()) == {
        "added_variance_measured"
    }
    assert set(Measured.of(np.ones(1), np.ones(1), np.ones(1), 1.0).metrics()) == {
        "added_variance_measured"
    }


def tree(**options):
    return recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5, kl=0.1, **options)


@pytest.mark.parametrize("tape", [0, 10**6, 3])
def test_norms_are_those_of_each_unit_and_leave_no_trace(toy, tape):
    class Dice(toy):
        def velocity(self, x, sigma, prompt):
            torch.rand(3)
            return super().velocity(x, sigma, prompt)

    recipe, model = tree(), Dice()
    batch = grown(recipe, model, tape=tape)
    units = unbiased.trained_units(batch.forest.plan)
    parameters = [*model.module.parameters()]
    for p in parameters[1:]:
        p.grad = torch.randn_like(p)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    kept = [p.grad for p in parameters]
    chosen = np.arange(0, len(units.node), 2)
    taped, random = list(batch.forest.tape), torch.random.get_rng_state()
    got = norms2(batch, recipe, units, chosen, parameters)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert batch.forest.tape == taped
    assert len(taped) > 0 or tape == 0
    for p, grad, value in zip(parameters, kept, before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    exact = []
    for unit in chosen:
        one = np.zeros_like(batch.weight)
        one[units.edges[units.owner == unit]] = 1.0
        fresh = grown(recipe, model)
        exact.append(float(gradient_of(fresh, recipe, model, one)[0].square().sum()))
    np.testing.assert_allclose(got, exact, rtol=1e-10)
    half = batch._replace(weight=0.5 * batch.weight)
    np.testing.assert_allclose(
        norms2(half, recipe, units, chosen, parameters), 0.25 * got, rtol=1e-10
    )
    packed = norms2(batch, recipe, units, chosen, parameters, max_batch=1, num_planned=1)
    planned = len(batch.forest.plan.trained())
    np.testing.assert_allclose(packed, planned**2 * got, rtol=1e-10)


def test_a_failing_call_puts_the_gradients_back(toy, monkeypatch):
    recipe, model = tree(), toy()
    batch = grown(recipe, model)
    parameters = [*model.module.parameters()]
    parameters[0].grad = torch.ones_like(parameters[0])
    kept = parameters[0].grad
    monkeypatch.setattr(model, "velocity", lambda *_: 1 / 0)
    units = unbiased.trained_units(batch.forest.plan)
    with pytest.raises(ZeroDivisionError):
        norms2(batch, recipe, units, np.arange(1), parameters)
    assert parameters[0].grad is kept


def test_gradients_of_masters_are_measured_there(toy):
    """bf16 weights hand their gradients over; those that wait on the masters stay."""

    class Short(toy):
        def _call(self, net, x, sigma, prompt):
            return super()._call(net, x.bfloat16(), sigma.bfloat16(), prompt)

    recipe, model = tree(), Short(torch.bfloat16)
    batch = grown(recipe, model)
    units = unbiased.trained_units(batch.forest.plan)
    masters = Masters(model.module)
    with masters.receiving():
        for p in masters.parameters:
            p.grad = torch.ones_like(p)
        got = norms2(batch, recipe, units, np.arange(3), masters.parameters)
        assert all(p.grad is None for p in model.module.parameters())
        assert all(bool((p.grad == 1).all()) for p in masters.parameters)
    exact = norms2(batch, recipe, units, np.arange(3), [*model.module.parameters()])
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    assert (got > 0).all()


def test_a_measurement_is_of_kept_units_and_repeats(toy):
    recipe, model = tree(), toy()
    batch = grown(recipe, model)
    pruning = Pruning(PruningConfig(rule="optimal", rate=0.5), recipe, 5)
    coins = pruning.coins(batch, iteration=3)
    parameters = [*model.module.parameters()]
    where = {"seed": 5, "iteration": 3}
    left = np.flatnonzero(coins.kept.weight > 0)
    assert 4 < len(left) < len(coins.kept.weight)
    every = measure(batch, recipe, coins, parameters, **where)
    exact = norms2(batch, recipe, coins.units, left, parameters)
    p = coins.kept.probability[left]
    np.testing.assert_allclose(every, Measured.of(coins.norm2[left], exact, p, 1.0), rtol=1e-10)
    model.rows.clear()
    some = measure(batch, recipe, coins, parameters, most=4, **where)
    assert len(model.rows) == 4
    assert some == measure(batch, recipe, coins, parameters, most=4, **where)
    others = {
        measure(batch, recipe, coins, parameters, most=4, seed=5, iteration=i) for i in range(6)
    }
    assert len(others) >= 3
    nothing = coins._replace(paid=np.zeros_like(coins.paid))
    assert measure(batch, recipe, nothing, parameters, **where) == Measured()


def test_the_mean_of_many_measurements_is_the_added_variance(toy):
    """Coins and draws of the engine: numerator and denominator within 4 standard errors."""
    recipe, model = tree(), toy()
    batch = grown(recipe, model)
    pruning = Pruning(PruningConfig(rule="threshold", rate=0.7), recipe, 5)
    coins = pruning.coins(batch, iteration=0)
    parameters = [*model.module.parameters()]
    every = norms2(batch, recipe, coins.units, np.arange(len(coins.kept.weight)), parameters)
    exact = unbiased.added_variance(coins.kept.probability, every), every.sum()
    found = []
    for iteration in range(1500):
        coins = pruning.coins(batch, iteration=iteration)
        left = np.flatnonzero(coins.kept.weight > 0)
        order = unbiased.unit_coins(
            batch.forest.plan,
            coins.units.node[left],
            batch.uids,
            seed=5,
            iteration=iteration,
            inner=2**40,
        )
        drawn = left[drawn_first(order, 5)]
        p = coins.kept.probability[drawn]
        sums = Measured.of(coins.norm2[drawn], every[drawn], p, len(drawn) / len(left))
        found.append((sums.added, sums.norm2))
    found = np.array(found)
    error = found.std(0) / math.sqrt(len(found))
    assert (np.abs(found.mean(0) - exact) < 4 * error).all()
    assert (error < 0.05 * np.array(exact)).all()


def lagging():
    return dataclasses.replace(dance(), sampler_decay=lambda iteration: 0.9)


RUNS = {
    "late": ({"rule": "optimal", "rate": 0.5}, None, {}),
    "taped": ({"rule": "optimal", "rate": 0.5}, None, {"tape": 10**6}),
    "ahead": ({"rule": "uniform", "rate": 0.5}, None, {}),
    "nothing dropped": ({"rule": "optimal"}, None, {}),
    "updates": ({"rule": "threshold", "rate": 0.5}, dance, {}),
    "lagging": ({"rule": "threshold", "rate": 0.5}, lagging, {}),
    "fast": ({"rule": "threshold", "rate": 0.5}, None, {"fast_steps": 2}),
    "rounds": ({"rule": "optimal", "rate": 0.5, "prompts": 0.5}, None, {"prompts_per_round": 1}),
    "together": ({"rule": "uniform", "rate": 0.4}, lambda: recipes.dgpo(SG, group=3), {}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_training_is_the_same_to_the_bit(toy, tmp_path, kind):
    options, build, fields = RUNS[kind]
    config = dataclasses.replace(CONFIG, checkpoint_every=9, **fields)
    recipe = None if build is None else build()
    plain = run(toy, tmp_path / "plain", PruningConfig(**options), recipe, config=config)
    prune = PruningConfig(**options, measure=2)
    measured = run(toy, tmp_path / "measured", prune, recipe, config=config)
    assert torch.equal(weights(plain), weights(measured))
    logged = rows(tmp_path / "measured")
    assert [{k: v for k, v in row.items() if k not in EXTRA} for row in logged] == rows(
        tmp_path / "plain"
    )
    assert ["added_variance_measured" in row for row in logged] == [False, True, False, True]
    for row in logged[1::2]:
        assert -1.0 <= row["gradient_norm_correlation"] <= 1.0
        assert (row["added_variance_measured"] > 0.0) == (kind != "nothing dropped")
    extra = sum(measured.model.rows) - sum(plain.model.rows)
    most = 2 * MOST * (3 if kind == "together" else 1)
    assert 0 < extra <= most


def test_settings_of_measuring():
    assert PruningConfig(rule="uniform", measure=3).measure == 3
    with pytest.raises(ValueError, match="measure must be left out for rule 'none'"):
        PruningConfig(prompts=0.5, measure=3)
    with pytest.raises(ValueError, match="measure must be left out for rule 'cppo'"):
        PruningConfig(rule="cppo", rate=0.5, measure=3)
    with pytest.raises(ValueError, match="measure must be at least 0, got -1"):
        PruningConfig(rule="uniform", measure=-1)
    for wrong in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="measure must be int"):
            PruningConfig(rule="uniform", measure=wrong)
