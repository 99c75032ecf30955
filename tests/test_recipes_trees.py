"""Tree recipes: credit, equal noise, one forward per state, presets, errors."""

import math

import numpy as np
import pytest
import torch

from branchcore import passes, recipes, schedule
from branchcore.gradient import gradient
from branchcore.recipes.branching import geometric_chances
from branchcore.rollout import rollout
from branchcore.trainer_config import TrainerConfig

F64 = {"dtype": torch.float64}
SD35, FLUX = schedule.flow_match_euler(10), schedule.shifted_linear(16, 3)
SMALL = schedule.shifted_linear(8, 3)
TREES = [
    "branch_grpo", "branch_mix", "branchcore", "dynamic_tree_rpo", "g2rpo", "instant_rewards",
    "multi_grpo", "tempflow_grpo", "tree_grpo", "vgpo",
]  # fmt: skip


def grown(name, sigmas=SMALL, uids=(0,), iteration=0, **options):
    recipe = recipes.build(name, sigmas, **options)
    return recipe, recipe.plan(list(uids), seed=0, iteration=iteration)


def advantages(recipe, plan, rewards, log_prob=None):
    rewards = np.asarray(rewards, dtype=np.float64).reshape(int(plan.leaf.sum()), -1)
    log_prob = np.zeros(len(plan)) if log_prob is None else log_prob
    plus, minus = recipe.credit(plan, rewards, np.ones(rewards.shape[1]), log_prob).advantage.T
    assert (plus * minus == 0.0).all()
    return plus - minus


def _z(values, ddof=1, eps=1e-8):
    return (values - values.mean()) / (values.std(ddof=ddof) + eps)


def _child_of_leaf(plan):
    """(L,) number of the stochastic child above every leaf, in the plan's order."""
    number = np.where(plan.stochastic, np.cumsum(plan.stochastic) - 1, -1)
    for lo, hi in plan.levels()[1:]:
        number[lo:hi] = np.maximum(number[lo:hi], number[plan.parent[lo:hi]])
    return number[plan.leaf]


def test_g2rpo_counts_an_image_once_per_stride_that_makes_it():
    """T = 7, strides 4 and 5: the same tail at k = 0 (to sigma_2, then 0) and 2 (straight to 0)."""
    recipe, plan = grown("g2rpo", schedule.shifted_linear(7), group=3, strides=(4, 5), steps=3)
    above, twins = np.unique(plan.parent[plan.leaf], return_counts=True)
    assert sorted(twins) == [1] * 6 + [2] * 6
    images = np.random.default_rng(0).normal(size=len(plan))
    a = advantages(recipe, plan, images[plan.parent[plan.leaf]])
    for depth, node in ((1, above[twins == 2][:3]), (3, above[twins == 2][3:])):
        edges = np.flatnonzero(plan.train & (plan.depth == depth))
        np.testing.assert_allclose(a[edges], 2 * _z(images[node]), atol=1e-12)


def test_g2rpo_invariants():
    """26: Lambda = {1} is the plain advantage, {1, 1} doubles it before the clip; sums are 0."""
    rewards = np.random.default_rng(1).normal(size=4 * 6)
    results = {}
    for strides in ((1,), (1, 1), (1, 2)):
        recipe, plan = grown("g2rpo", group=6, strides=strides)
        chosen = rewards[_child_of_leaf(plan)]
        if strides == (1, 2):
            chosen = chosen + np.random.default_rng(2).normal(size=len(chosen))
        a = advantages(recipe, plan, chosen)
        results[strides] = a[plan.train]
        for parent in np.unique(plan.parent[plan.train]):
            assert a[plan.train & (plan.parent == parent)].sum() == pytest.approx(0, abs=1e-12)
        assert plan.counts().trained_parents == 4
    plain = np.concatenate([_z(rewards[k : k + 6]) for k in range(0, 24, 6)])
    np.testing.assert_allclose(results[(1,)], plain, atol=1e-12)
    np.testing.assert_allclose(results[(1, 1)], 2 * plain, atol=1e-12)


@pytest.mark.parametrize("k", range(4))
def test_tree_grpo_of_depth_1_is_a_step_of_g2rpo(k):
    rewards = np.random.default_rng(k).normal(size=24)
    g2, steps = grown("g2rpo", group=6, strides=(1,))
    tree, one = grown("tree_grpo", branching=6, depth=1, start=k)
    mine = np.flatnonzero(steps.train)[6 * k : 6 * (k + 1)]
    np.testing.assert_array_equal(one.row[one.train], steps.row[mine])
    a = advantages(tree, one, rewards[6 * k : 6 * (k + 1)])[one.train]
    b = advantages(g2, steps, rewards[_child_of_leaf(steps)])[mine]
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_tree_grpo_windows_follow_the_law_and_never_hold_the_last_step():
    recipe = recipes.tree_grpo(SMALL, branching=2)
    seen = []
    for iteration in range(400):
        plan = recipe.plan([3, 8], seed=0, iteration=iteration)
        depths = np.unique(plan.depth[plan.stochastic])
        assert len(depths) == 3
        assert depths[-1] <= 7
        split = [np.unique(plan.depth[plan.stochastic & (plan.prompt == p)]) for p in (0, 1)]
        np.testing.assert_array_equal(*split)
        seen.append(int(depths[0]) - 1)
    share = np.bincount(seen, minlength=5) / len(seen)
    chances = np.asarray(geometric_chances(0.5, 5))
    assert (np.abs(share - chances) < 4 * np.sqrt(chances * (1 - chances) / len(seen))).all()


def test_tree_grpo_credit_of_the_toy_and_its_invariants():
    """3.7, 4.4: leaves 3 1 | 2 6 (ddof 1 here, 0 there), weights of probability are not neutral."""
    recipe, plan = grown("tree_grpo", branching=(2, 2), start=1)
    scale = math.sqrt(3 / 4)
    a = advantages(recipe, plan, [3, 1, 2, 6])
    edges = np.flatnonzero(plan.train)
    np.testing.assert_allclose(a[edges[:2]] / scale, [-0.5345, 0.5345], atol=5e-5)
    np.testing.assert_allclose(a[edges[2:]] / scale, [0, -1.069, -0.5345, 1.6036], atol=5e-5)
    for depth in (2, 3):
        at = plan.train & (plan.depth == depth)
        assert (plan.leaves_below * a)[at].sum() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(
        advantages(recipe, plan, np.array([3, 1, 2, 6]) * 7 + 2), a, atol=1e-7
    )
    log_prob = np.zeros(len(plan))
    log_prob[edges[2:]] = np.log([0.6, 0.4, 0.5, 0.5])
    weighed = advantages(
        recipes.tree_grpo(SMALL, branching=(2, 2), beta=1.0), plan, [3, 1, 2, 6], log_prob
    )
    np.testing.assert_allclose(weighed[edges[:2]] / scale, [-0.4276, 0.5345], atol=5e-5)
    shifted = log_prob + np.where(plan.depth == 3, 5.0, 0.0)
    again = advantages(
        recipes.tree_grpo(SMALL, branching=(2, 2), beta=1.0), plan, [3, 1, 2, 6], shifted
    )
    np.testing.assert_allclose(again, weighed, atol=1e-12)
    np.testing.assert_array_equal(advantages(recipe, plan, [2, 2, 2, 2]), 0.0)


def test_several_trees_share_their_statistics():
    recipe, plan = grown("tree_grpo", branching=2, depth=1, trees=3, start=0)
    rewards = np.array([0.0, 1, 2, 3, 4, 8])
    np.testing.assert_allclose(
        advantages(recipe, plan, rewards)[plan.train], _z(rewards), atol=1e-12
    )
    assert len(np.unique(plan.tree)) == 3


@pytest.mark.parametrize("grouping", ["parent", "prompt"])
def test_tempflow_groups_and_noise_weights(grouping):
    """16: 2.2522 s for SD3.5-M, mean 1 over the trained steps; the trunk takes part in no group."""
    options = {"trunks": 2, "children": 3, "grouping": grouping}
    recipe, plan = grown("tempflow_grpo", SD35, **options)
    rewards = np.random.default_rng(3).normal(size=2 * 3 * 9)
    plain = advantages(
        grown("tempflow_grpo", SD35, step_weights=False, **options)[0],
        plan,
        rewards[_child_of_leaf(plan)],
    )
    edges = np.flatnonzero(plan.train)
    groups = plan.parent[edges] if grouping == "parent" else plan.depth[edges]
    assert len(np.unique(groups)) == (18 if grouping == "parent" else 9)
    for group in np.unique(groups):
        mine = groups == group
        np.testing.assert_allclose(
            plain[edges[mine]], _z(rewards[mine], ddof=0, eps=1e-4), atol=1e-12
        )
    factor = advantages(recipe, plan, rewards[_child_of_leaf(plan)])[edges] / plain[edges]
    np.testing.assert_allclose(factor / plan.row[edges, 3], 2.2522, atol=5e-5)
    assert factor.mean() == pytest.approx(1.0, abs=1e-12)
    assert not plan.train[~plan.stochastic].any()


def test_tempflow_weight_of_flux():
    sigmas = schedule.flux_dynamic(10, 4096)
    recipe, plan = grown("tempflow_grpo", sigmas, trunks=1, children=2, noise_level=0.9)
    a = advantages(recipe, plan, np.tile([0.0, 1.0], 9)[_child_of_leaf(plan)])[plan.train]
    np.testing.assert_allclose(np.abs(a) / plan.row[plan.train, 3], 1.7260, rtol=3e-4)


def test_instant_rewards_are_the_euler_read_outs_of_the_children(toy, all_states):
    _, plan = grown("instant_rewards", trunks=2, children=2)
    forest = rollout(plan, toy(), [0], seed=0, **F64)
    x, v = all_states(plan, toy(), forest.noise)
    leaves = np.flatnonzero(plan.leaf)
    child = plan.parent[leaves]
    assert plan.train[child].all()
    wanted = torch.stack([x[int(c)] - plan.sigma[c] * v[int(c)] for c in child])
    assert (forest.leaves - wanted).abs().max() <= 1e-13


def test_instant_rewards_compare_siblings_only():
    recipe, plan = grown("instant_rewards", trunks=2, children=2, step_weights=False)
    a = advantages(recipe, plan, np.arange(28.0) ** 2)
    low, high = np.reshape(a[plan.train], (-1, 2)).T
    np.testing.assert_allclose(low, -high, atol=1e-15)
    np.testing.assert_allclose(high, 1.0, atol=3e-4)


def test_vgpo_scores_no_image_twice_and_reduces_to_grpo():
    """5.3: gamma 1, no anchor, rewards of the last projection only: Flow-GRPO's z at every step."""
    recipe, plan = grown("vgpo", group=5, anchor=0.0)
    assert len(np.unique(plan.parent[plan.leaf])) == plan.counts().decodes == 5 * 7
    ends = plan.sigma[plan.parent[plan.leaf]] == SMALL[-2]
    assert ends.sum() == 5
    rewards = np.random.default_rng(4).random(5)
    scores = np.zeros(35)
    scores[ends] = rewards
    a = advantages(recipe, plan, scores)
    for depth in range(1, 8):
        at = plan.train & (plan.depth == depth)
        np.testing.assert_allclose(a[at], _z(rewards, ddof=0), atol=1e-12)
    anchored = advantages(grown("vgpo", group=5, anchor=0.5)[0], plan, np.full(35, 2.0))
    now = anchored[plan.train & (plan.depth == 7)]
    np.testing.assert_allclose(now, 0.0, atol=1e-12)
    assert (anchored[plan.train & (plan.depth <= 5)] > 0).all()


def test_multi_grpo_groups_steps_over_all_trees():
    """4.3: without branching it is GRPO at every step; toy 3 1 | 2 6 as two trees gives -1, +1."""
    recipe, plan = grown("multi_grpo", roots=6, splits=(0,), branching=1)
    rewards = np.random.default_rng(5).normal(size=6)
    a = advantages(recipe, plan, rewards)
    for depth in range(1, 8):
        at = plan.train & (plan.depth == depth)
        np.testing.assert_allclose(a[at], _z(rewards, ddof=0, eps=1e-4), atol=1e-12)
    recipe, plan = grown("multi_grpo", roots=2, splits=(1,), branching=2)
    a = advantages(recipe, plan, [3, 1, 2, 6])
    np.testing.assert_allclose(a[plan.depth == 1], [-1, 1], atol=2e-4)
    last = a[plan.train & (plan.depth == 7)]
    np.testing.assert_allclose(last, _z(np.array([3.0, 1, 2, 6]), ddof=0, eps=1e-4), atol=1e-12)


def test_dynamic_tree_gets_noisier_with_depth_and_slides():
    levels = (0.4, 0.6, 0.9)
    recipe = recipes.dynamic_tree_rpo(SMALL, branching=(2, 2, 2), noise_levels=levels, interval=10)
    for iteration, first in ((0, 0), (9, 0), (10, 1), (49, 4), (50, 0)):
        plan = recipe.plan([0], seed=0, iteration=iteration)
        assert set(plan.depth[plan.train]) == {first + 1, first + 2, first + 3}
        for j, level in enumerate(levels):
            alone = grown("tree_grpo", branching=2, depth=1, start=first + j, noise_level=level)[1]
            rows = plan.row[plan.train & (plan.depth == first + j + 1)]
            np.testing.assert_array_equal(rows, alone.row[alone.train][[0]].repeat(len(rows), 0))
    rising, same = (grown("dynamic_tree_rpo", growth=g)[1].row[[1, 3, 7, 15], 3] for g in (0.5, 0))
    np.testing.assert_allclose(rising / same, [1, 7 / 6, 8 / 6, 1.5], atol=1e-12)


OPTIONS = {
    "tempflow_grpo": {"trunks": 2, "children": 2},
    "instant_rewards": {"trunks": 2, "children": 2},
    "g2rpo": {"group": 3},
    "vgpo": {"group": 3},
    "tree_grpo": {"branching": (3, 2), "trees": 2},
    "dynamic_tree_rpo": {"depth": 2},
    "multi_grpo": {"roots": 2, "branching": 2},
}


@pytest.mark.parametrize("name", TREES)
def test_children_of_a_shared_parent_are_independent_runs_on_their_noise(name, toy):
    """22: images and log-probs of a shared plan are its chains', one by one or batched."""
    _, plan = grown(name, uids=(4, 9), iteration=3, **OPTIONS.get(name, {}))
    shared = rollout(plan, toy(), [4, 9], seed=5, iteration=3, **F64)
    apart = passes.unshare(plan)
    rank = torch.from_numpy((np.cumsum(plan.leaf) - 1)[apart.origin[apart.plan.leaf]])
    for max_batch in (1, None):
        chains = rollout(apart.plan, toy(), [4, 9], seed=5, iteration=3, max_batch=max_batch, **F64)
        assert (chains.leaves - shared.leaves[rank]).abs().max() <= 1e-13
        assert torch.equal(chains.log_prob, shared.log_prob[torch.from_numpy(apart.origin)])
    assert passes.share(apart.plan).counts() == plan.counts()


@pytest.mark.parametrize("name", ["tempflow_grpo", "g2rpo", "tree_grpo", "multi_grpo", "vgpo"])
def test_one_forward_per_state_is_the_sum_over_its_children(name, toy, naive, all_states):
    """23: the node's gradient is the sum of its children's, each with a forward of its own."""
    recipe, plan = grown(name, uids=(4, 9), **OPTIONS[name])
    rewards = np.random.default_rng(6).random((int(plan.leaf.sum()), 1))
    advantage = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
    weight, model = np.ones(len(plan)), toy()
    forest = rollout(plan, model, [4, 9], seed=5, **F64)
    x, v = all_states(plan, model, forest.noise)
    naive(forest, model, advantage, weight, recipe.objective.clip, x, v)
    exact = model.gradient()
    model.zero_grad()
    model.rows.clear()
    objective = type(recipe.objective)(clip=recipe.objective.clip)
    gradient(forest, model, advantage, weight, objective)
    assert float((model.gradient() - exact).norm() / exact.norm()) <= 1e-12
    assert sum(model.rows) <= plan.counts().trained_parents


PUBLISHED = [(name, preset) for name in TREES for preset in recipes.PRESETS[name]]


@pytest.mark.parametrize(("name", "preset"), PUBLISHED)
def test_presets_build_and_their_settings_exist(name, preset):
    chosen = recipes.preset_of(name, preset)
    recipe = recipes.build_preset(name, preset)
    plan = recipe.plan([0, 1], seed=0, iteration=0)
    assert plan.num_updates == recipe.updates
    settings = {"prompts_per_iteration": 1, "iterations": 1, **chosen.trainer}
    config = TrainerConfig(**settings)
    assert all(getattr(config, field) == value for field, value in chosen.trainer.items())
    known = recipes.options_of(name)
    assert all(value != known[option].default for option, value in chosen.options.items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: recipes.tempflow_grpo(SD35, grouping="tree"), "grouping must be from .*'tree'"),
        (lambda: recipes.tempflow_grpo(SD35, children=1), "groups of at least 2 by parent, got 1"),
        (lambda: recipes.tempflow_grpo(SD35, updates=5), r"updates must be in 1..4, got 5"),
        (lambda: recipes.tempflow_grpo(SD35, sde="ode"), "name must be from .*'ode'"),
        (lambda: recipes.instant_rewards(SD35, children=1), "children must be at least 2, got 1"),
        (lambda: recipes.g2rpo(FLUX, strides=(1, 15)), r"strides must be in 1..14, .*\(1, 15\)"),
        (lambda: recipes.g2rpo(FLUX, strides=(0,)), r"strides must be in 1..14, .*\(0,\)"),
        (lambda: recipes.g2rpo(FLUX, strides=()), r"strides must be in 1..14, .*\(\)"),
        (lambda: recipes.g2rpo(FLUX, steps=16), r"g2rpo: steps must be in 1..15, got 16"),
        (lambda: recipes.g2rpo(FLUX, group=1), "group must be at least 2"),
        (lambda: recipes.tree_grpo(SD35, start=7), r"start must be in 0..6, .* got 7"),
        (lambda: recipes.tree_grpo(SD35, start=-1), r"start must be in 0..6, .* got -1"),
        (lambda: recipes.tree_grpo(SD35, depth=10), r"depth must be in 1..9, .* got 10"),
        (lambda: recipes.tree_grpo(SD35, branching=()), r"depth must be in 1..9, .* got 0"),
        (lambda: recipes.tree_grpo(SD35, branching=1), r"at least 2 leaves, got \[1, 1, 1\]"),
        (lambda: recipes.tree_grpo(SD35, ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (lambda: recipes.multi_grpo(SD35, splits=(0, 9), branching=2), r"distinct steps in 0..8"),
        (lambda: recipes.multi_grpo(SD35, roots=1, branching=1), r"2 leaves, got \[1, 1\]"),
        (lambda: recipes.vgpo(SD35, group=1), "group must be at least 2"),
        (lambda: recipes.vgpo(SD35, gamma=1.5), "gamma must be in"),
        (lambda: recipes.dynamic_tree_rpo(SD35, noise_levels=(0.7, 0.8)), r"depth \(4\), got 2"),
        (lambda: recipes.dynamic_tree_rpo(SD35, depth=10), r"depth must be in 1..9, .* got 10"),
        (lambda: recipes.dynamic_tree_rpo(SD35, start=6), r"start must be in 0..5, got 6"),
        (lambda: recipes.branchcore(SD35, tail=0.0), r"tail must be in \(0, 1\], got 0.0"),
        (lambda: recipes.branchcore(SD35, order=3), "order must be 1 or 2, got 3"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_clear_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()
