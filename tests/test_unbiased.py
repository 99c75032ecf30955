"""Unbiased pruning: DPPO's toys by enumeration, optimal probabilities, coins; biased pruners."""

import itertools

import numpy as np
import pytest
from trees import chains, images, near, two_level

from branchcore import recipes, schedule, unbiased
from branchcore.credit import standardize
from branchcore.noise import PRUNING, host_generator
from branchcore.passes import concat
from branchcore.pruning_config import PruningConfig

A = np.array([1.5, 0.2, -0.4, -1.3])
TERMS = A * [1.0, 2.0, 3.0, 4.0]
SG = schedule.shifted_linear(8, 3)


def enumerated(p):
    """Yields weights and probability of every mask."""
    for mask in itertools.product((0.0, 1.0), repeat=len(p)):
        z = np.array(mask)
        chance = np.prod(np.where(z > 0, p, 1 - p))
        if chance > 0:
            # a coin of 0 keeps every unit, one of 1 - 2^-53 none that can be dropped
            yield unbiased.bernoulli(p, np.where(z > 0, 0.0, 1 - 2.0**-53)).weight, z, chance


def mean_of(p, estimate):
    return sum(chance * estimate(weight, z) for weight, z, chance in enumerated(p))


def is_unbiased(p, terms, estimate):
    return abs(mean_of(p, estimate) - terms.mean()) < 1e-12


def threshold(values, rate):
    return unbiased.threshold_probability(np.abs(values), np.zeros(len(values), int), rate)


def test_toy_1_only_the_inverse_probability_hits_the_full_gradient():
    p = threshold(A, 0.5)
    np.testing.assert_array_equal(p, [1.0, 0.5, 0.5, 1.0])
    ways = {
        "weighed": (lambda w, z: (w * TERMS).mean(), -1.125),
        "sum over G": (lambda w, z: (z * TERMS).mean(), -1.025),
        "mean of kept": (lambda w, z: (z * TERMS).sum() / z.sum(), -1.4271),
        "C / (1 - P), mean of kept": (lambda w, z: 0.75 * (w * TERMS).sum() / z.sum(), -1.1578),
    }
    for name, (estimate, wanted) in ways.items():
        assert mean_of(p, estimate) == pytest.approx(wanted, abs=5e-5), name
        assert is_unbiased(p, TERMS, estimate) == (name == "weighed"), name
    variance = mean_of(p, lambda w, z: ((w * TERMS).mean() + 1.125) ** 2)
    assert variance == pytest.approx(0.1, abs=1e-12)
    assert unbiased.added_variance(p, (TERMS / 4) ** 2) == pytest.approx(variance, abs=1e-15)
    estimates = sorted((w * TERMS).mean() for w, _, _ in enumerated(p))
    near(estimates, [-1.525, -1.325, -0.925, -0.725])


def test_toy_2_a_fixed_share_weighs_by_m_over_what_is_kept():
    terms, p = np.array([0.4, -1.2, 0.7]), np.full(3, 0.5)
    orders = [np.array(order) / 3 for order in itertools.permutations(range(3))]
    draws = [unbiased.fixed(p, coin, np.zeros(3, int)) for coin in orders]
    near(np.mean([d.weight @ terms for d in draws]), -0.1)
    for d in draws:
        assert sorted(d.weight) == [0.0, 1.5, 1.5]
        near(d.probability, 2 / 3)
    near(np.mean([2.0 * (d.weight > 0) @ terms for d in draws]), -0.1333, atol=5e-5)
    near(1.5 * terms[np.argsort(-np.abs(terms))[:2]].sum(), -0.75)
    variance = np.mean([(d.weight @ terms + 0.1) ** 2 for d in draws])
    sample = terms.var(ddof=1)
    near(variance, 3**2 / 2 * (1 - 2 / 3) * sample)


def test_a_fixed_draw_groups_by_prompt_and_leaves_the_certain_alone():
    p = np.array([1.0, 0.3, 0.3, 0.3, 0.3, 0.3])
    kept = unbiased.fixed(p, np.array([0.9, 0.1, 0.5, 0.3, 0.8, 0.2]), np.array([0, 0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(kept.weight, [1, 3, 0, 0, 0, 2])
    near(kept.probability, [1, 1 / 3, 1 / 3, 1 / 3, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"one value among a prompt's candidates, got 0.2 to 0.5"):
        unbiased.fixed(np.array([0.2, 0.5]), np.zeros(2), np.zeros(2, int))


def test_toy_3_a_spread_of_the_survivors_is_biased():
    rewards, score = np.array([[0.0], [1.0], [0.4], [0.6]]), np.array([1.0, 3.0])
    prompt = np.array([0, 0, 1, 1])

    def part(q, spread):
        a = standardize(rewards, prompt, ddof=0, eps=0.0, spread=spread)[prompt == q, 0]
        return (a * score).mean()

    frozen = rewards.std(0)
    near(frozen, 0.36056, atol=5e-6)
    full = (part(0, frozen) + part(1, frozen)) / 2
    near(full, 0.83205, atol=5e-6)
    near(0.5 * part(0, frozen) / 2 + 0.5 * (part(0, frozen) + 2 * part(1, frozen)) / 2, full)
    alone = part(0, rewards[:2].std(0)) / 2
    both = (part(0, frozen) + 2 * part(1, frozen)) / 2
    near(0.5 * alone + 0.5 * both, 0.73536, atol=5e-6)


def test_toy_4_prompt_and_parent_weights_multiply():
    other = np.array([0.3, -0.1, 0.2, -0.6])
    first, second = threshold(A, 0.5), np.array([1.0, 0.5, 0.5, 1.0])

    def estimate(weight, _z):
        gate, w1, w2 = weight[0], weight[1:5], weight[5:]
        return ((w1 * TERMS).mean() + gate * (w2 * other).mean()) / 2

    p = np.concatenate([[0.5], first, second])
    assert len(list(enumerated(p))) == 32
    near(mean_of(p, estimate), -0.5875)
    near((TERMS.mean() + other.mean()) / 2, -0.5875)


def test_toy_5_the_weight_goes_outside_the_clip():
    ratio = np.array([1.3, 0.9, 1.1, 0.6])
    terms = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A)
    near(terms.mean(), 0.125)
    assert is_unbiased(threshold(A, 0.5), terms, lambda w, z: (w * terms).mean())
    clipped = mean_of(
        threshold(A, 0.5),
        lambda w, z: np.minimum(w * ratio * A, np.clip(w * ratio, 0.8, 1.2) * A).mean(),
    )
    assert abs(clipped - 0.125) > 0.01


def test_ties_and_equal_scores_make_no_candidates():
    group = np.array([0, 0, 0, 1, 1, 1, 2])
    score = np.array([1.0, 1.0 + 1e-9, 1.0, 0.0, 0.0, 0.0, 3.0])
    np.testing.assert_array_equal(unbiased.threshold_probability(score, group, 0.7), 1.0)
    score[0] = 0.5
    near(unbiased.threshold_probability(score, group, 0.7), [0.3, 1, 1, 1, 1, 1, 1])


def test_planning_figures_of_a_normal_advantage(rng):
    score = np.abs(rng.normal(size=200_000))
    p = unbiased.threshold_probability(score, np.zeros(len(score), int), 0.7)
    assert p.mean() == pytest.approx(0.597, abs=0.003)
    assert unbiased.added_variance(p, score**2) / (score**2).sum() == pytest.approx(0.261, abs=5e-3)


def test_optimal_probabilities_spend_the_budget_and_are_least(rng):
    for _ in range(50):
        n = int(rng.integers(2, 9))
        g, cost = rng.exponential(size=n) ** 2, rng.uniform(0.5, 3.0, n)
        floor = 0.05
        share = float(rng.uniform(0.1, 0.95))
        p = unbiased.optimal_probability(g, cost, share, floor)
        assert p @ cost == pytest.approx(share * cost.sum(), rel=1e-12)
        assert ((p >= floor) & (p <= 1.0)).all()
        inner = (p > floor * (1 + 1e-9)) & (p < 1 - 1e-9)
        price = g**2 / p**2 / cost
        if inner.any():
            level = price[inner].mean()
            near(price[inner] / level, 1.0, atol=1e-9)
            assert (price[p >= 1 - 1e-9] >= level * (1 - 1e-9)).all()
            assert (price[p <= floor * (1 + 1e-9)] <= level * (1 + 1e-9)).all()
        least = unbiased.added_variance(p, g**2)
        for _ in range(20):
            i, j = rng.choice(n, 2, replace=False)
            other = p.copy()
            step = 1e-3 * rng.normal()
            other[i], other[j] = p[i] + step / cost[i], p[j] - step / cost[j]
            if ((other >= floor) & (other <= 1.0)).all():
                assert unbiased.added_variance(other, g**2) >= least * (1 - 1e-9)


def test_optimal_probabilities_at_their_bounds():
    ask = unbiased.optimal_probability
    near(ask(np.array([1.0, 2.0]), np.ones(2), 0.6, 0.1), [0.4, 0.8])
    near(ask(np.array([1.0, 1.0]), np.array([1.0, 4.0]), 0.6, 0.1), [1.0, 0.5])
    near(ask(np.array([3.0, 0.0]), np.ones(2), 0.75, 0.1), [1.0, 0.5])
    near(ask(np.array([3.0, 0.0]), np.ones(2), 0.5, 0.1), [0.9, 0.1])
    near(ask(np.zeros(3), np.ones(3), 0.5, 0.1), 0.5)
    near(ask(np.array([1.0, 5.0]), np.ones(2), 0.2, 0.2), 0.2)
    np.testing.assert_array_equal(ask(np.array([1.0, 5.0]), np.ones(2), 1.0, 0.2), 1.0)


def test_optimal_beats_the_threshold_at_equal_cost(rng):
    ratios = []
    for _ in range(30):
        a = np.abs(rng.normal(size=12))
        g = a * rng.uniform(0.5, 2.0, 12)
        p = unbiased.threshold_probability(a, np.zeros(12, int), 0.7)
        best = unbiased.optimal_probability(g, np.ones(12), p.mean(), 0.05)
        ratios.append(unbiased.added_variance(best, g**2) / unbiased.added_variance(p, g**2))
    assert max(ratios) <= 1.0


def test_units_are_parents_or_what_an_objective_couples():
    plan = concat([two_level(3, 2), two_level(2, 2)])
    units = unbiased.trained_units(plan)
    np.testing.assert_array_equal(units.node, np.unique(plan.parent[plan.train]))
    np.testing.assert_array_equal(units.node[units.owner], plan.parent[units.edges])
    np.testing.assert_array_equal(units.prompt, plan.prompt[units.node])
    near(units.cost, 1.0)
    plan = concat([images(4, (0.3, 0.7)), images(2, (0.5,))])
    groups = unbiased.trained_units(plan, together=("prompt", "label"))
    near(np.sort(groups.cost), [2, 4, 4])
    for unit in range(3):
        mine = groups.edges[groups.owner == unit]
        assert len(np.unique(plan.group(("prompt", "label"))[mine])) == 1
        assert groups.node[unit] == mine.min()


def test_scores_come_from_the_whole_group():
    plan = two_level(2, 3)
    units = unbiased.trained_units(plan)
    advantage = np.zeros((len(plan), 2))
    advantage[units.edges, 0] = [1, 3, 0, 6, 3, 2, 2, 5]
    near(unbiased.unit_scores(units, advantage), [2, 3, 3])
    near(unbiased.unit_scores(units, advantage, "max"), [3, 6, 5])
    advantage[units.edges[4]] = np.nan
    with pytest.raises(ValueError, match=r"must be of all planned edges, got nan at row 5; stat"):
        unbiased.unit_scores(units, advantage)


def test_the_norm_of_a_row_is_that_of_its_noise(rng):
    """Mean |sum_e slope_e eps_e|^2 per element, siblings sharing a stream."""
    recipe = recipes.branch_grpo(SG, splits=(0, 2), correlate=1.0)
    plan = recipe.plan([0], seed=0, iteration=0)
    units = unbiased.trained_units(plan)
    slope = rng.normal(size=len(units.edges))
    streams = rng.normal(size=(plan.stream.max() + 1, 50_000))
    eps = sum(plan.mix[units.edges, i, None] * streams[plan.stream[units.edges, i]] for i in (0, 1))
    direct = np.zeros((len(units.node), 50_000))
    np.add.at(direct, units.owner, slope[:, None] * eps)
    got = unbiased.gradient_norm2(plan, units, slope)
    near(got / (direct**2).mean(1), 1.0, atol=0.05)
    assert (plan.mix[units.edges, 1] > 0.5).any()


def test_coins_are_of_seed_iteration_uid_node_and_pass_alone():
    recipe = recipes.dance_grpo(SG, group=4, fraction=0.5)

    def of(uids, seed=3, iteration=7, inner=0):
        plan = recipe.plan(uids, seed=3, iteration=7)
        nodes = unbiased.trained_units(plan).node
        coins = unbiased.unit_coins(plan, nodes, uids, seed=seed, iteration=iteration, inner=inner)
        return [coins[plan.prompt[nodes] == i] for i in range(len(uids))]

    alone = {uid: of([uid])[0] for uid in (2, 5, 11)}
    for order in ([2, 5, 11], [11, 2, 5], [5, 2]):
        for uid, coins in zip(order, of(order), strict=True):
            np.testing.assert_array_equal(coins, alone[uid])
    for other in (of([2], seed=4), of([2], iteration=8), of([2], inner=1)):
        assert (other[0] != alone[2]).all()
    assert len(set(np.concatenate(list(alone.values())))) == sum(map(len, alone.values()))
    prompt = host_generator(3, 7, 2, PRUNING).random(100)
    assert not np.isin(alone[2], prompt).any()


def test_coins_are_uniform_and_independent():
    plan = chains(60)
    node = unbiased.trained_units(plan).node
    draws = np.stack(
        [unbiased.unit_coins(plan, node, [0], seed=1, iteration=i) for i in range(400)]
    )
    assert draws.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * draws.size))
    assert draws.var() == pytest.approx(1 / 12, rel=0.02)
    correlation = np.corrcoef(draws[:, :20].T) - np.eye(20)
    assert np.abs(correlation).max() < 5 / np.sqrt(400)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, np.nan])
def test_probabilities_outside_0_1_are_refused(bad):
    p = np.array([0.5, bad])
    for ask in (
        lambda: unbiased.bernoulli(p, np.zeros(2)),
        lambda: unbiased.fixed(p, np.zeros(2), np.zeros(2, int)),
        lambda: unbiased.added_variance(p, np.ones(2)),
    ):
        with pytest.raises(
            ValueError, match=r"keep probabilities must be in \(0, 1\], got .* at 1"
        ):
            ask()
    with pytest.raises(ValueError, match="floor and share must be 0 < floor <= share <= 1"):
        unbiased.optimal_probability(np.ones(2), np.ones(2), 0.05, 0.1)
    with pytest.raises(ValueError, match="norm_U must be finite and >= 0"):
        unbiased.optimal_probability(np.array([-1.0, 1.0]), np.ones(2), 0.5, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "dppo"}, "rule must be from .*'optimal'.*'cppo'.*got 'dppo'"),
        ({"rule": "uniform", "rate": 1.0}, r"rate must be in \[0, 1\), got 1.0; 1 leaves nothing"),
        ({"prompts": 1.0}, r"prompts must be in \[0, 1\), got 1.0"),
        ({"rule": "uniform", "rate": float("nan")}, r"rate must be in \[0, 1\), got nan"),
        ({"rate": 0.5}, "rate must be left out for rule 'none'"),
        ({"rule": "parent_top1", "rate": 0.5}, "rate must be left out for rule 'parent_top1'"),
        ({"rule": "optimal", "rate": 0.95}, r"floor must be in \(0, 1 - rate\] = \(0, 0.05\], got"),
        ({"rule": "optimal", "rate": 0.5, "floor": 0.0}, r"floor must be in \(0, 1 - rate\]"),
        ({"rule": "uniform", "floor": 0.2}, "floor must be left out for rule 'uniform'"),
        ({"rule": "optimal", "rate": 0.5, "draw": "fixed"}, "draw must be left out for rule 'opt"),
        ({"rule": "uniform", "draw": "coin"}, "draw must be from .*got 'coin'"),
        ({"rule": "optimal", "rate": 0.5, "score": "max"}, "score must be left out"),
        (
            {"rule": "optimal", "rate": 0.5, "cap": 4.0},
            "cap must be None, or .* biased=True, got 4",
        ),
        ({"rule": "uniform", "biased": True}, "biased must be left out"),
    ],
)
def test_config_refuses_what_is_biased_or_without_effect(options, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**options)
    with pytest.raises(TypeError, match=r"rate must be float, got '0\.5'"):
        PruningConfig(rule="uniform", rate="0.5")
