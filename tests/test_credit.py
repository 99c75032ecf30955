"""Credit and pruning against the golden cases of BranchGRPO and the published estimators."""

import numpy as np
import pytest

from branchcore import credit, packing, prune, recipes, schedule
from branchcore.recipes.credits import depth_credit
from branchcore.steps import dance_sde, euler
from branchcore.tree import Tree

SG20 = schedule.shifted_linear(20, 3)


def dense(**options):
    return recipes.branch_grpo(SG20, **options).plan([0], seed=0, iteration=0)


def depth_advantages(plan, rewards):
    fused = credit.lift(plan, np.asarray(rewards, float)[:, None], credit.mean_weight(plan))
    group = plan.group(("tree", "depth"))
    return credit.standardize(fused, group, floor=1e-6, among=plan.stochastic)[:, 0]


def at_depth(plan, values, depth):
    lo, hi = plan.levels()[depth]
    return values[lo:hi]


def test_golden_case_10_advantages_of_rewards_0_to_15():
    plan = dense(last_step="sde")
    a = depth_advantages(plan, np.arange(16))
    for depth in (1, 2, 3):
        np.testing.assert_allclose(at_depth(plan, a, depth), [-0.7071068, 0.7071068], atol=1e-6)
    four = [-1.161895, -0.387298, 0.387298, 1.161895]
    eight = [0.204124, 0.612372, 1.020621, 1.428869]
    sixteen = [0.105021, 0.315063, 0.525105, 0.735147, 0.945189, 1.155231, 1.365273, 1.575315]
    for depths, half in ((range(7, 10), eight), (range(10, 21), sixteen)):
        for depth in depths:
            wanted = [-h for h in half[::-1]] + half
            np.testing.assert_allclose(at_depth(plan, a, depth), wanted, atol=1e-6)
    for depth in (4, 5, 6):
        np.testing.assert_allclose(at_depth(plan, a, depth), four, atol=1e-6)


def test_golden_case_10_invariants(rng):
    plan = dense()
    rewards = rng.normal(size=16)
    a = depth_advantages(plan, rewards)
    for depth in range(1, 20):
        values = at_depth(plan, a, depth)
        n = len(values)
        assert values.sum() == pytest.approx(0, abs=1e-9)
        assert (values**2).sum() == pytest.approx(n - 1, rel=1e-6)
        assert np.abs(values).max() <= (n - 1) / np.sqrt(n) + 1e-9
    np.testing.assert_allclose(depth_advantages(plan, 3 * rewards + 2), a, atol=1e-6)
    np.testing.assert_allclose(depth_advantages(plan, -rewards), -a, atol=1e-12)
    np.testing.assert_array_equal(depth_advantages(plan, np.full(16, 0.3)), 0.0)


def test_equal_rewards_are_exactly_zero_whatever_their_rounding():
    values = np.full((7, 1), 0.1) * 3
    np.testing.assert_array_equal(credit.standardize(values, np.zeros(7)), 0.0)


def test_golden_case_9_one_split_is_chain_grpo(rng):
    sg = schedule.shifted_linear(6)
    plan = recipes.branch_grpo(sg, splits=(0,), branching=5).plan([0], seed=0, iteration=0)
    rewards = rng.normal(size=5)
    a = depth_advantages(plan, rewards)
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-8)
    for depth in range(1, 6):
        np.testing.assert_allclose(at_depth(plan, a, depth), wanted, atol=1e-12)


@pytest.fixture
def case_11():
    """T = 3, splits (0, 1), K = 2, the last edges stochastic too; edge log-probs of the case."""
    t = Tree()
    sde = dance_sde(0.3)
    x = t.grow(t.roots(1), 0.7, sde, children=2)
    x = t.grow(x, 0.4, sde, children=2)
    t.leaf(t.grow(x, 0.0, sde))
    plan = t.plan()
    log_prob = np.array([0.0, 0.0, 1.0, 0.0, 2.0, 0.5, 0.0, 0.1, -0.3, 0.0, 0.2])
    return plan, log_prob, np.array([[1.0], [2.0], [3.0], [5.0]])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (2.75, 1.5, 4.0)),
        ({"beta": 1.0}, (2.92739998, 1.83201839, 3.85111497)),
        ({"beta": 1.0, "local": True}, (3.25100866, 1.88079708, 3.75508134)),
    ],
)
def test_golden_case_11_fusion(case_11, options, wanted):
    plan, log_prob, rewards = case_11
    fused = credit.lift(plan, rewards, credit.mean_weight(plan, log_prob, **options))[:, 0]
    np.testing.assert_allclose(fused[:3], wanted, atol=5e-9)
    group = plan.group(("tree", "depth"))
    a = credit.standardize(fused[:, None], group)[:, 0]
    np.testing.assert_allclose(
        at_depth(plan, a, 2), [-1.024695, -0.439155, 0.146385, 1.317465], atol=1e-6
    )
    assert (fused >= 1).all()
    assert (fused <= 5).all()


def test_golden_case_11_limits(case_11):
    plan, log_prob, rewards = case_11
    uniform = credit.lift(plan, rewards, credit.mean_weight(plan))
    flat = credit.mean_weight(plan, np.full(len(plan), 3.0), beta=1.0)
    np.testing.assert_allclose(credit.lift(plan, rewards, flat), uniform, atol=1e-12)
    shifted = log_prob + np.where(plan.depth == 2, 7.0, 0.0)
    for local in (False, True):
        a = credit.mean_weight(plan, log_prob, beta=1.0, local=local)
        b = credit.mean_weight(plan, shifted, beta=1.0, local=local)
        np.testing.assert_allclose(a, b, atol=1e-12)
    flat_local = credit.mean_weight(plan, np.zeros(len(plan)), beta=1.0, local=True)
    np.testing.assert_allclose(credit.lift(plan, rewards, flat_local), uniform, atol=1e-12)


def test_unbalanced_trees_average_leaves_not_children():
    t = Tree()
    x = t.grow(t.roots(1), 0.5, dance_sde(0.3), children=2)
    y = t.grow(x[:1], 0.2, dance_sde(0.3), children=3)
    t.leaf(t.grow(y, 0.0, euler))
    t.leaf(t.grow(x[1:], 0.0, euler))
    plan = t.plan()
    rewards = np.zeros((4, 1))
    rewards[plan.depth[plan.leaf] == 2] = 8.0
    assert credit.lift(plan, rewards, credit.mean_weight(plan))[0, 0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("estimator", "inner", "outer"),
    [
        ("tree_grpo", (-0.535, 0.535), (0, -1.069, -0.535, 1.604)),
        ("branch_grpo", (-1, 1), (0, -1.069, -0.535, 1.604)),
        ("d_tree_rpo", (-1, 1), (1, -1, -2, 2)),
    ],
)
def test_estimators_side_by_side_on_one_toy(estimator, inner, outer):
    """Leaves [3, 1 | 2, 6]; one table of published estimators out of two verbs."""
    t = Tree()
    x = t.grow(t.roots(1), 0.5, dance_sde(0.3), children=2)
    t.leaf(t.grow(x, 0.0, dance_sde(0.3), children=2))
    plan = t.plan()
    r = np.array([[3.0], [1.0], [2.0], [6.0]])
    mean = credit.mean_weight(plan)
    group = plan.group(("prompt",))[plan.leaf]
    value = credit.lift(plan, r, mean)
    got = {
        "tree_grpo": credit.lift(plan, credit.standardize(r, group, ddof=0), mean),
        "branch_grpo": credit.standardize(value, plan.group(("tree", "depth")), ddof=0),
        "d_tree_rpo": value - value[np.maximum(plan.parent, 0)],
    }[estimator][:, 0]
    np.testing.assert_allclose(got[1:3], inner, atol=5e-4)
    np.testing.assert_allclose(got[3:7], outer, atol=5e-4)


def test_statistics_ignore_deterministic_siblings():
    """A trunk's own continuation takes no part in the statistics of its stochastic siblings."""
    t = Tree()
    root = t.roots(1)
    kids = t.grow(root, 0.5, dance_sde(0.3), children=2, train=True)
    trunk = t.grow(root, 0.5, euler)
    t.leaf(t.grow(np.append(kids, trunk), 0.0, euler))
    plan = t.plan()
    rewards = np.zeros((3, 1))
    rewards[:, 0] = [1.0, 3.0, 50.0]
    got = depth_credit()(plan, rewards, np.ones(1), np.zeros(len(plan)))
    advantage = got.advantage
    np.testing.assert_allclose(advantage[plan.train], [[0, 0.70710677], [0.70710677, 0]], atol=1e-6)
    assert not advantage[~plan.train].any()


def test_separate_losses_collapse_into_two_columns(rng):
    advantage, weight = rng.normal(size=(50, 3)) * 3, np.array([0.7, 1.4, 0.2])
    both = credit.split_sign(advantage, weight, separate=True)
    ratio = np.exp(rng.normal(size=50) * 0.3)
    clipped = ratio.clip(0.8, 1.2)
    separate = sum(
        w * np.maximum(-a.clip(-5, 5) * ratio, -a.clip(-5, 5) * clipped)
        for w, a in zip(weight, advantage.T, strict=True)
    )
    plus, minus = both.advantage.T
    collapsed = -plus * np.minimum(ratio, clipped) + minus * np.maximum(ratio, clipped)
    np.testing.assert_allclose(collapsed, separate, atol=1e-14)
    summed = credit.split_sign(advantage, weight)
    plus, minus = summed.advantage.T
    np.testing.assert_allclose(plus - minus, (advantage @ weight).clip(-5, 5))
    np.testing.assert_array_equal(summed.value, advantage @ weight)
    assert (summed.advantage.min(1) == 0).all()


def test_flow_grpo_normalises_the_weighted_sum(rng):
    plan = recipes.flow_grpo(schedule.flow_match_euler(4), group=6).plan([0], seed=0, iteration=0)
    rewards, weight = rng.normal(size=(6, 2)), np.array([1.0, 3.0])
    got = recipes.flow_grpo(schedule.flow_match_euler(4), group=6).credit(
        plan, rewards, weight, np.zeros(len(plan))
    )
    total = rewards @ weight
    wanted = (total - total.mean()) / (total.std() + 1e-4)
    np.testing.assert_allclose(got.value[plan.leaf], wanted, atol=1e-12)


def test_flow_grpo_global_std_is_the_whole_calls(rng):
    recipe = recipes.flow_grpo(schedule.flow_match_euler(4), group=3, global_std=True)
    plan = recipe.plan([0, 1], seed=0, iteration=0)
    rewards = rng.normal(size=(6, 1)) * np.repeat([1.0, 10.0], 3)[plan.prompt[plan.leaf], None]
    got = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).value[plan.leaf]
    owner = plan.prompt[plan.leaf]
    means = np.array([rewards[owner == p].mean() for p in (0, 1)])
    np.testing.assert_allclose(got, (rewards[:, 0] - means[owner]) / (rewards.std() + 1e-4))


def test_spread_replaces_the_groups_own_std():
    values, group = np.array([[1.0], [3.0], [10.0], [30.0]]), np.array([0, 0, 1, 1])
    got = credit.standardize(values, group, spread=np.array([2.0]), eps=0.0)
    np.testing.assert_allclose(got[:, 0], [-0.5, 0.5, -5, 5])


KEPT_TOP1 = 58 + 80


@pytest.mark.parametrize(
    ("pruning", "kept"),
    [
        ("none", 218),
        ("parent_top1", KEPT_TOP1),
        ("extremes", KEPT_TOP1),
        ("depth", 138),
        ("first_steps", 138),
    ],
)
def test_golden_case_12_kept_edges(pruning, kept, rng):
    recipe = recipes.branch_grpo(SG20, last_step="sde", pruning=pruning)
    plan = recipe.plan([0], seed=0, iteration=0)
    rewards = rng.normal(size=16)
    value = depth_advantages(plan, rewards)
    weight = recipe.prune(plan, value, 1)
    assert set(np.unique(weight)) <= {0.0, 1.0}
    assert (weight[plan.train] > 0).sum() == kept
    survivors = weight[plan.leaf] > 0
    if pruning == "parent_top1":
        pairs = rewards.reshape(8, 2)
        np.testing.assert_array_equal(survivors.reshape(8, 2).argmax(1), pairs.argmax(1))
        assert (survivors.reshape(8, 2).sum(1) == 1).all()
    if pruning == "extremes":
        assert survivors[rewards.argmax()]
        assert survivors[rewards.argmin()]


def test_golden_case_12_depth_windows():
    plan = dense(last_step="sde")
    for depths, removed in (((12, 13, 14, 15), 64), ((11, 12, 13, 14, 15), 80), ((9,), 8)):
        weight = prune.depth_window(plan, np.array(depths))
        assert (weight[plan.train] == 0).sum() == removed
    base = np.array([15, 16, 17, 18])
    for official, first in ((1, 15), (29, 15), (30, 14), (60, 13), (150, 10), (180, 9), (999, 9)):
        got = prune.slide(base, official - 1, interval=30, stop=9)
        np.testing.assert_array_equal(got, np.arange(first, first + 4))
    later = prune.slide(np.array([10, 11]), 45, interval=30, stop=20, towards_leaves=True)
    np.testing.assert_array_equal(later, [11, 12])


def test_extremes_pool_over_prompts_can_empty_one():
    recipe = recipes.branch_grpo(SG20)
    plan = recipe.plan([0, 1], seed=0, iteration=0)
    spread = np.where(np.arange(len(plan)) % 2 == 0, 10.0, -10.0)
    value = np.where(plan.prompt == 0, 0.0, spread) + 1e-3 * np.arange(len(plan)) / len(plan)
    kept = {}
    for pool in ("tree", "call"):
        leaves = prune.extremes(plan, value, pool=pool)[plan.leaf] > 0
        kept[pool] = [int(leaves[plan.prompt[plan.leaf] == p].sum()) for p in (0, 1)]
    assert kept == {"tree": [8, 8], "call": [0, 16]}
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        prune.extremes(plan, value, share=0.0)


def test_pruning_ranks_what_clipping_would_tie():
    """Siblings beyond the advantage clip still differ: 256 leaves, rewards 9 and 10 among zeros."""
    recipe = recipes.branch_grpo(SG20, branching=4, pruning="parent_top1")
    plan = recipe.plan([0], seed=0, iteration=0)
    rewards = np.zeros((256, 1))
    rewards[4:6, 0] = 9.0, 10.0
    credited = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan)))
    assert credited.advantage.max() == 5.0
    kept = recipe.prune(plan, credited.value, 0)[plan.leaf]
    np.testing.assert_array_equal(kept[4:8], [0, 1, 0, 0])


@pytest.mark.parametrize("pruner", [prune.parent_top1, prune.extremes])
def test_trees_without_a_split_keep_everything(pruner, rng):
    plan = recipes.flow_grpo(SG20, group=3).plan([0, 1], seed=0, iteration=0)
    assert pruner(plan, rng.normal(size=len(plan))).all()
    assert prune.first_steps(plan).all()


def test_depth_window_slides_as_the_paper_and_as_released():
    paper = recipes.branch_grpo(SG20, pruning="depth", slide_interval=30)
    released = recipes.branch_grpo(
        SG20, pruning="depth", slide_interval=30, slide_towards="root", last_step="sde",
        prune_depths=(15, 16, 17, 18),
    )  # fmt: skip
    for recipe, iteration, first in (
        (paper, 0, 11),
        (paper, 59, 13),
        (paper, 9999, 15),
        (released, 59, 13),
        (released, 9999, 9),
    ):
        plan = recipe.plan([0], seed=0, iteration=0)
        dropped = plan.depth[recipe.prune(plan, np.zeros(len(plan)), iteration) == 0]
        assert dropped.min() == first, (iteration, first)


@pytest.mark.parametrize(
    ("count", "max_batch", "sizes"),
    [(24, 16, [12, 12]), (5, 2, [1, 2, 2]), (0, 4, []), (7, None, [7]), (3, 1, [1, 1, 1])],
)
def test_balanced_chunks(count, max_batch, sizes):
    chunks = packing.balanced_chunks(count, max_batch)
    assert [hi - lo for lo, hi in chunks] == sizes
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        packing.balanced_chunks(count, 0)


def test_pack_parents_keeps_every_edge_once(rng):
    plan = recipes.branch_grpo(SG20).plan([0, 1], seed=0, iteration=0)
    edges = rng.choice(plan.trained(), 150, replace=False)
    edges.sort()
    parts = [np.arange(10, 30), np.arange(100, 160)]
    batches = packing.pack_parents(plan, edges, 16, parts)
    np.testing.assert_array_equal(np.sort(np.concatenate([b.edges for b in batches])), edges)
    for batch in batches:
        owner = np.repeat(batch.nodes, np.diff(batch.child_start))
        np.testing.assert_array_equal(owner, plan.action[batch.edges])
        if batch.part >= 0:
            np.testing.assert_array_equal(parts[batch.part][batch.local], batch.nodes)
        else:
            assert len(batch.nodes) <= 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: credit.lift(p, np.zeros((3, 1))), r"leaf_values_LR must be \(L, R\) with L=16"),
        (lambda p: credit.mean_weight(p, beta=1.0), "log_prob_M must be given when beta is not 0"),
        (
            lambda p: credit.split_sign(np.zeros((4, 2)), np.ones(3)),
            r"must be \(R,\) >= 0 with R=2",
        ),
        (
            lambda _: credit.standardize(np.zeros((3, 1)), np.zeros(2)),
            r"group_n \(n,\), got \(3, 1\)",
        ),
        (lambda p: p.select([0, 0]), r"prompts must be distinct in 0..0, got \[0, 0\]"),
        (lambda p: p.select([5]), r"prompts must be distinct in 0..0, got \[5\]"),
        (lambda p: p.group(("step",)), "columns must be from .*got 'step'"),
    ],
)
def test_credit_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(dense())
