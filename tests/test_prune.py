"""Biased pruners: what they keep, and that they fail the check that unbiased ones pass."""

import itertools

import numpy as np
import pytest
from test_unbiased import SG, TERMS, A, is_unbiased, threshold
from trees import chains, granular, images, near, two_level

from branchcore import prune, recipes
from branchcore.credit import standardize
from branchcore.passes import concat


def leaf_values(plan, values):
    """Values of leaves on all nodes of their chains."""
    value = np.zeros(len(plan))
    value[plan.leaf] = values
    for lo, hi in plan.levels()[:0:-1]:
        value[plan.parent[lo:hi]] = value[lo:hi]
    return value


def test_cppo_fails_the_unbiasedness_check():
    plan = chains(4)
    kept = prune.cppo(plan, leaf_values(plan, A), 0.5)[plan.leaf]
    np.testing.assert_array_equal(kept, [1, 0, 0, 1])
    near((kept * TERMS).sum() / kept.sum(), -1.85)
    for estimate in (
        lambda w, z: (kept * TERMS).sum() / kept.sum(),
        lambda w, z: (kept * TERMS).mean(),
        lambda w, z: 2.0 * (kept * TERMS).mean(),
    ):
        assert not is_unbiased(np.ones(4), TERMS, estimate)
    assert is_unbiased(threshold(A, 0.5), TERMS, lambda w, z: (w * TERMS).mean())


def test_cppo_keeps_the_largest_of_each_prompt(rng):
    plan = concat([chains(8), chains(8), chains(8)])
    values = np.concatenate([rng.normal(size=16), np.zeros(8)])
    value = leaf_values(plan, values)
    for rate, left in ((0.0, 8), (0.3, 5), (0.5, 4), (0.75, 2), (0.875, 1)):
        weight = prune.cppo(plan, value, rate)
        kept = weight[plan.leaf] > 0
        for q in (0, 1):
            mine = kept[plan.prompt[plan.leaf] == q]
            size = np.abs(values[plan.prompt[plan.leaf] == q])
            assert mine.sum() == left
            assert size[mine].min() >= size[~mine].max(initial=0.0)
        assert not kept[16:].any()
        np.testing.assert_array_equal(weight, leaf_values(plan, kept))
        np.testing.assert_array_equal(weight, prune.cppo(plan, 3.0 * value, rate))
    ties = leaf_values(chains(8), [1.0, -1, 1, -1, 1, -1, 1, -1])
    kept = prune.cppo(chains(8), ties, 0.5)[chains(8).leaf]
    np.testing.assert_array_equal(kept, [1, 1, 1, 1, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"leave one of 8 leaves, got 0.9"):
        prune.cppo(plan, value, 0.9)


def test_cppo_top_two_can_be_one_sided():
    plan = chains(8)
    a = standardize(np.array([[1.0]] * 2 + [[0.0]] * 6), np.zeros(8, int), eps=0.0)[:, 0]
    near(a[[0, 2]], [1.62, -0.54], atol=5e-3)
    kept = prune.cppo(plan, leaf_values(plan, a), 0.75)[plan.leaf]
    near((kept * a).sum(), 3.24, atol=5e-3)


def test_leaf_pruners_keep_shared_trunks_and_re_noised_states_of_their_images():
    plan = two_level(2, 2)
    value = np.zeros(len(plan))
    value[plan.leaf] = [1.0, 5.0, 2.0, 3.0]
    weight = prune.cppo(plan, value, 0.75)
    np.testing.assert_array_equal(weight, [1, 1, 0, 0, 1, 0, 0])
    plan = images(3, (0.3, 0.7))
    value = np.zeros(len(plan))
    value[plan.leaf] = [1.0, 5.0, 2.0]
    weight = prune.cppo(plan, value, 0.6)
    image = np.flatnonzero(plan.leaf)[1]
    kept = plan.train & (weight > 0)
    np.testing.assert_array_equal(np.flatnonzero(kept), np.flatnonzero(plan.parent == image))


@pytest.mark.parametrize("name", ["cppo", "maximal_variance", "best_of_n"])
def test_leaf_pruners_find_the_value_above_a_deterministic_tail(name, rng):
    """Credit by depth leaves 0 on the Euler edges that end a tree."""
    recipe = recipes.branch_grpo(SG, splits=(0, 1, 2))
    plan = recipe.plan([0, 1], seed=0, iteration=0)
    rewards = rng.normal(size=(16, 1))
    value = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).value
    assert not value[plan.leaf].any()
    kept = prune.BIASED[name](plan, value, 0.5)[plan.leaf] > 0
    for q in (0, 1):
        mine = plan.prompt[plan.leaf] == q
        z = rewards[mine, 0] - rewards[mine].mean()
        wanted = np.abs(z) if name == "cppo" else z
        order = np.argsort(wanted)
        if name == "cppo":
            best = order[4:]
        elif name == "best_of_n":
            best = np.r_[order[:2], order[6:]]
        else:
            sets = [np.r_[order[:i], order[4 + i :]] for i in range(5)]
            best = max(sets, key=lambda chosen: z[chosen].var())
        np.testing.assert_array_equal(np.flatnonzero(kept[mine]), np.sort(best))


def test_leaves_that_share_their_last_stochastic_edge_keep_their_own_value():
    plan = granular(2, (1, 2), branches=1)
    value = np.zeros(len(plan))
    value[plan.leaf] = [1.0, -4.0, 2.0, 3.0]
    kept = prune.cppo(plan, value, 0.5)[plan.leaf]
    np.testing.assert_array_equal(kept, [0, 1, 0, 1])


def test_maximal_variance_against_all_subsets(rng):
    for _ in range(60):
        n = int(rng.integers(2, 9))
        values = rng.choice([rng.normal(size=n), rng.integers(0, 3, n).astype(float)])
        plan, k = chains(n), int(rng.integers(1, n + 1))
        weight = prune.maximal_variance(plan, leaf_values(plan, values), 1.0 - k / n)
        kept = weight[plan.leaf] > 0
        assert kept.sum() == k
        best = max(np.var(values[list(c)]) for c in itertools.combinations(range(n), k))
        assert np.var(values[kept]) == pytest.approx(best, abs=1e-12)


def test_zero_advantage_drops_nothing_else(rng):
    plan = chains(5)
    value = rng.normal(size=len(plan))
    value[[3, 7]] = 0.0
    np.testing.assert_array_equal(np.flatnonzero(prune.zero_advantage(plan, value) == 0), [3, 7])


def test_every_named_pruner_keeps_all_at_rate_0(rng):
    plan = recipes.branch_grpo(SG, splits=(0, 2)).plan([0, 1], seed=0, iteration=0)
    value = rng.normal(size=len(plan))
    for name, pruner in prune.BIASED.items():
        if name != "parent_top1":
            np.testing.assert_array_equal(pruner(plan, value, 0.0)[plan.train], 1.0, err_msg=name)
        assert (pruner(plan, value, 0.5)[plan.train] == 0).any() == (name != "zero_advantage")
