"""Credit inside trees: TreeGRPO, Multi-GRPO, d-TreeRPO, TreePO, VGPO and TempFlow's baselines.

Names say where a case comes from: tree_3_7 is section 3.7 of the notes on tree and pruning methods,
flow_5 section 5 of those on the Flow-GRPO family.
"""

import numpy as np
import pytest
from trees import SDE, SG, TOY, chains, near, of_depth, previews, take, trunks, two_level, uneven

from branchcore import credit
from branchcore.recipes import credits
from branchcore.steps import euler, renoise
from branchcore.tree import Tree


def whitened(*raw):
    raw = np.asarray(raw) - np.mean(raw)
    return tuple(raw / raw.std())


@pytest.mark.parametrize(
    ("builder", "inner", "outer"),
    [
        (credits.leaf_credit(ddof=0, eps=0), (-0.534522, 0.534522), whitened(*TOY)),
        (credits.depth_credit(ddof=0, eps=0), (-1, 1), whitened(*TOY)),
        (
            credits.depth_credit(columns=("prompt", "depth"), ddof=0, eps=0),
            (-1, 1),
            whitened(*TOY),
        ),
        (credits.depth_credit(columns=("parent",), ddof=0, eps=0), (-1, 1), (1, -1, -1, 1)),
        (credits.gain_credit(), (-1, 1), (1, -1, -2, 2)),
        (
            credits.ancestor_credit(ddof=0, eps=0),
            np.array([-0.5, 0.5]) / np.sqrt(2.75),
            whitened(0.5, -1.5, -1.5, 2.5),
        ),
        (
            credits.ancestor_credit(weights="size", ddof=0, eps=0),
            np.array([-2 / 3, 2 / 3]) / np.sqrt(106 / 36),
            whitened(1 / 3, -5 / 3, -4 / 3, 8 / 3),
        ),
    ],
    ids=["tree_grpo", "branch_grpo", "multi_grpo", "tree_rpo", "gain", "equal", "size"],
)
def test_tree_4_4_golden_toy(builder, inner, outer):
    plan = two_level()
    got = take(builder, plan, TOY).value
    near(of_depth(plan, got, 1), inner, 1e-6)
    near(of_depth(plan, got, 2), outer, 1e-12)


def test_tree_4_4_leaf_values_as_printed():
    near(whitened(*TOY), (0, -1.069, -0.535, 1.604), 5e-4)


def test_tree_3_7_probability_weighted_toy():
    plan = two_level()
    log_prob = np.log([1, 0.3, 0.7, 0.6, 0.4, 0.5, 0.5])
    got = take(credits.leaf_credit(beta=1.0, ddof=0, eps=0), plan, TOY, log_prob=log_prob).value
    near(of_depth(plan, got, 1), (-0.4276, 0.5345), 5e-5)
    size = plan.leaves_below
    assert abs((size * got)[1:3].sum()) > 0.2
    uniform = take(credits.leaf_credit(ddof=0, eps=0), plan, TOY).value
    near((size * uniform)[1:3].sum(), 0)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 5.0])
def test_tree_3_7_weights_of_siblings_sum_to_one(beta, local, rng):
    plan = uneven()
    weight = credit.mean_weight(plan, rng.normal(size=len(plan)), beta=beta, local=local)
    assert (weight >= 0).all()
    children = (plan.parent >= 0) & (plan.leaves_below > 0)
    sums = np.bincount(plan.parent[children], weight[children], minlength=len(plan))
    near(sums[np.unique(plan.parent[children])], 1.0)
    np.testing.assert_array_equal(weight[plan.matching], 0.0)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_tree_3_7_edges_stay_inside_their_leaves(beta, rng):
    plan = uneven()
    rewards = rng.normal(size=5)
    log_prob = rng.normal(size=len(plan))
    got = take(credits.leaf_credit(beta=beta), plan, rewards, log_prob=log_prob).value
    low, high = np.where(plan.leaf, got, np.inf), np.where(plan.leaf, got, -np.inf)
    for lo, hi in plan.levels()[:0:-1]:
        np.minimum.at(low, plan.parent[lo:hi], low[lo:hi])
        np.maximum.at(high, plan.parent[lo:hi], high[lo:hi])
    inner = plan.leaves_below > 0
    assert (got[inner] >= low[inner] - 1e-12).all()
    assert (got[inner] <= high[inner] + 1e-12).all()


def test_tree_3_7_leaf_sums_vanish_at_every_depth(rng):
    plan = two_level(3, 4)
    got = take(credits.leaf_credit(), plan, rng.normal(size=12)).value
    for depth in range(3):
        near(of_depth(plan, plan.leaves_below * got, depth).sum(), 0)


def test_tree_3_7_log_prob_shift_of_siblings(rng):
    plan, rewards = two_level(3, 3), rng.normal(size=9)
    log_prob = rng.normal(size=len(plan))
    shifted = log_prob + rng.normal(size=len(plan))[np.maximum(plan.parent, 0)]
    builder = credits.leaf_credit(beta=1.0)
    near(
        take(builder, plan, rewards, log_prob=shifted).value,
        take(builder, plan, rewards, log_prob=log_prob).value,
    )


def test_tree_3_7_permuted_children_permute_edges(rng):
    plan, rewards = two_level(3, 3), rng.normal(size=(3, 3))
    log_prob = rng.normal(size=len(plan))
    order = np.array([2, 0, 1])
    moved = log_prob.copy()
    moved[1:4] = log_prob[1:4][order]
    moved[4:] = log_prob[4:].reshape(3, 3)[order].ravel()
    builder = credits.leaf_credit(beta=1.0)
    a = take(builder, plan, rewards.ravel(), log_prob=log_prob).value
    b = take(builder, plan, rewards[order].ravel(), log_prob=moved).value
    near(b[1:4], a[1:4][order])
    near(b[4:].reshape(3, 3), a[4:].reshape(3, 3)[order])


def test_tree_3_3_one_leaf_gets_nothing():
    t = Tree()
    t.leaf(t.chain(t.roots(1), SG[1:], SDE))
    for builder in (
        credits.group_credit(ddof=1, eps=0),
        credits.depth_credit(floor=0.0),
        credits.leaf_credit(),
        credits.gain_credit(),
        credits.ancestor_credit(),
        credits.granular_credit(),
        credits.pair_credit(),
    ):
        np.testing.assert_array_equal(take(builder, t.plan(), [4.0]).advantage, 0.0)


@pytest.mark.parametrize(("kids", "wanted"), [(2, 0.651), (3, 0.583)])
def test_tree_3_5_probability_weights_count_twice(kids, wanted, rng):
    """A(a) = a^2 under N(0, 1): the mean is 1, the weighted mean far below."""
    parents = 20_000
    plan = two_level(parents, kids)
    a = rng.normal(size=parents * kids)
    log_prob = np.zeros(len(plan))
    log_prob[plan.leaf] = -(a**2) / 2
    for beta, mean in ((0.0, 1.0), (1.0, wanted)):
        weight = credit.mean_weight(plan, log_prob, beta=beta, local=True)
        value = of_depth(plan, credit.lift(plan, (a**2)[:, None], weight)[:, 0], 1)
        near(value.mean(), mean, 4 * value.std() / np.sqrt(parents) + 5e-4)


@pytest.mark.parametrize(
    ("elements", "beta", "effective"),
    [(1, 1, 2.67), (16, 16, 1.57), (1024, 1024, 1.05), (65536, 65536, 1.0), (65536, 1, 3.0)],
)
def test_tree_3_5_summed_log_prob_is_one_hot_and_its_mean_uniform(elements, beta, effective, rng):
    """The number of children that count, 1 / sum of squared weights; log-probs are means."""
    plan = two_level(2000, 3)
    log_prob = np.zeros(len(plan))
    log_prob[plan.leaf] = -0.5 * rng.chisquare(elements, size=6000) / elements
    weight = credit.mean_weight(plan, log_prob, beta=beta, local=True)[plan.leaf]
    number = 1 / (weight.reshape(-1, 3) ** 2).sum(1)
    near(number.mean(), effective, 4 * number.std() / np.sqrt(2000) + 6e-3)


def test_tree_4_3_levels_have_mean_zero_and_unit_variance(rng):
    t = Tree()
    x = t.grow(t.roots(2), 0.7, SDE, children=2, train=True)
    x = t.grow(x, 0.4, SDE, children=3, train=True)
    t.leaf(t.grow(x, 0.0, euler))
    plan, rewards = t.plan(), rng.normal(size=(12, 2))
    builder = credits.depth_credit(columns=("prompt", "depth"), ddof=0, eps=0)
    for r in range(2):
        got = take(builder, plan, rewards[:, r]).value
        for depth in (1, 2):
            near(of_depth(plan, got, depth).mean(), 0)
            near(of_depth(plan, got, depth).std(), 1)
    both = take(builder, plan, rewards, [0.7, 1.4]).value
    singles = [take(builder, plan, rewards[:, r]).value for r in range(2)]
    near(both, 0.7 * singles[0] + 1.4 * singles[1])
    near(take(builder, plan, rewards * [5, 0.1] + [3, -4], [0.7, 1.4]).value, both, 1e-9)


@pytest.mark.parametrize(("ddof", "wanted"), [(0, 1.0), (1, 0.707)])
def test_tree_4_3_toy_of_one_level(ddof, wanted):
    plan = two_level()
    builder = credits.depth_credit(columns=("prompt", "depth"), ddof=ddof)
    got = take(builder, plan, TOY).value
    near(of_depth(plan, got, 1), (-wanted, wanted), 2e-4)


def test_tree_4_3_a_single_node_of_a_level_gets_nothing():
    t = Tree()
    x = t.grow(t.roots(1), 0.7, SDE, train=True)
    t.leaf(t.grow(t.grow(x, 0.4, SDE, children=3, train=True), 0.0, euler))
    got = take(credits.depth_credit(columns=("prompt", "depth")), t.plan(), [1.0, 2.0, 6.0])
    np.testing.assert_array_equal(got.advantage[:2], 0.0)
    assert (got.advantage[2:5].sum(1) > 0.1).all()


def test_tree_4_3_without_branching_it_is_grpo_at_every_step(rng):
    plan, rewards = chains(6), rng.normal(size=6)
    multi = take(credits.depth_credit(columns=("prompt", "depth"), ddof=0), plan, rewards)
    group = take(credits.group_credit(ddof=0, eps=1e-8), plan, rewards)
    near(multi.advantage[plan.train], group.advantage[plan.train])


def test_tree_9_tree_rpo_filters_groups_of_little_spread():
    plan = two_level()
    rewards = [0.50, 0.52, 0.1, 0.9]
    got = take(credits.depth_credit(columns=("parent",), floor=0.1), plan, rewards).value
    np.testing.assert_array_equal(got[1:5], 0.0)
    near(got[5:], (-(0.5**0.5), 0.5**0.5), 1e-7)


def test_equal_siblings_are_exactly_zero_inside_an_unequal_prompt():
    """The means of 3, 11 and 13 rewards of 0.7 differ in their last bits."""
    t = Tree()
    x = t.grow(t.roots(1), 0.7, SDE, children=2, train=True)
    t.leaf(t.grow(x[0], 0.0, SDE, children=2, train=True))
    y = t.grow(x[1], 0.4, SDE, children=3, train=True)
    for node, kids in zip(y, (3, 11, 13), strict=True):
        t.leaf(t.grow(node, 0.0, SDE, children=kids, train=True))
    plan = t.plan()
    rewards = np.full(29, 0.7)
    rewards[:2] = 0.0, -1.0
    fused = credit.lift(plan, rewards[:, None], credit.mean_weight(plan))[2:, 0]
    below = (plan.depth == 3) | (plan.num_children > 2) & (plan.depth == 2)
    assert len(np.unique(fused[below[2:]])) > 1
    for builder in (credits.depth_credit(columns=("parent",), floor=0.0), credits.gain_credit()):
        got = take(builder, plan, rewards)
        np.testing.assert_array_equal(got.advantage[below], 0.0)
        assert got.advantage[~below].max() > 0.1


def test_flow_5_tempflow_baselines_of_one_state_and_of_the_prompt(rng):
    plan = trunks(4, 6)
    rewards = rng.normal(size=48)
    builder = credits.depth_credit(columns=("parent",), ddof=0, eps=1e-4, floor=0.0)
    states = take(builder, plan, rewards).value
    wide = credits.depth_credit(columns=("prompt", "depth"), ddof=0, eps=1e-4, floor=0.0)
    prompt = take(wide, plan, rewards).value
    reward = credit.lift(plan, rewards[:, None])[:, 0]
    for parent in np.unique(plan.parent[plan.train]):
        kids = np.flatnonzero(plan.train & (plan.parent == parent))
        assert len(kids) == 6
        values = reward[kids]
        near(states[kids], (values - values.mean()) / (values.std() + 1e-4))
    for depth in (1, 2):
        kids = np.flatnonzero(plan.train & (plan.depth == depth))
        assert len(kids) == 24
        values = reward[kids]
        near(prompt[kids], (values - values.mean()) / (values.std() + 1e-4))


def test_tree_4_4_gains_telescope(rng):
    plan, rewards = uneven(), rng.normal(size=5)
    got = take(credits.gain_credit(), plan, rewards).value
    value = credit.lift(plan, rewards[:, None], credit.mean_weight(plan))[:, 0]
    total = got.copy()
    for lo, hi in plan.levels()[1:]:
        total[lo:hi] += total[plan.parent[lo:hi]]
    near(total[plan.leaf], rewards - value[plan.tree[plan.leaf]])


@pytest.mark.parametrize("by_size", [False, True])
def test_tree_9_ancestors_of_an_uneven_forest(by_size, rng):
    """By hand: a leaf's ancestors are the prompt (5), its root (4) and its split (3)."""
    plan, rewards = uneven(), rng.normal(size=5)
    depth, tree = plan.depth[plan.leaf], plan.tree[plan.leaf]
    single = plan.leaves_below[plan.tree[plan.leaf]] == 1
    long = (depth == 3) & (plan.num_children[plan.leaf] == 0)
    triple = rewards[long]
    assert [single.sum(), long.sum()] == [1, 3]
    first = rewards[tree == tree[long][0]]
    wanted = np.zeros(5)
    for i, reward in enumerate(rewards):
        groups = [rewards] + ([] if single[i] else [first]) + ([triple] if long[i] else [])
        weights = [len(g) if by_size else 1 for g in groups]
        wanted[i] = np.average([reward - g.mean() for g in groups], weights=weights)
    builder = credits.ancestor_credit(weights="size" if by_size else "equal", ddof=0, eps=0)
    near(take(builder, plan, rewards).value[plan.leaf], whitened(*wanted))


def test_tree_9_ancestors_of_chains_are_the_group(rng):
    plan, rewards = chains(6), rng.normal(size=6)
    near(
        take(credits.ancestor_credit(), plan, rewards).value,
        take(credits.group_credit(ddof=1, eps=1e-8), plan, rewards).value,
    )


def test_tree_5_2_lift_with_gamma_is_the_discounted_sum(rng):
    plan, rewards, gamma = previews(4), rng.uniform(size=(3, 4)), 0.8
    q = credit.lift(plan, rewards.reshape(-1, 1), np.where(plan.stochastic, gamma, 1.0))[:, 0]
    wanted = rewards.copy()
    for t in (1, 0):
        wanted[t] += gamma * wanted[t + 1]
    near(q[plan.stochastic].reshape(3, 4), wanted)


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_tree_5_2_anchor_stays_as_the_spread_vanishes(scale):
    q = 0.8 + scale * np.array([1.0, -1.0, 0.5, -0.5])
    plan = previews(4, sg=(1.0, 0.5, 0.0))
    got = take(credits.value_credit(gamma=1.0, anchor=1.0), plan, q).value[plan.train]
    near(got, (2.065, -0.465, 1.432, 0.168), 1e-3 + 2 * scale)
    near(got.mean(), 0.8, 2e-3)


def test_tree_5_3_without_anchor_and_previews_it_is_grpo(rng):
    plan, final = previews(5), rng.uniform(size=5)
    rewards = np.concatenate([np.zeros(10), final])
    got = take(credits.value_credit(gamma=1.0, anchor=0.0), plan, rewards).value
    wanted = (final - final.mean()) / (final.std() + 1e-8)
    near(got[plan.train].reshape(3, 5), np.tile(wanted, (3, 1)))


def test_tree_5_3_gamma_0_takes_each_reward_alone(rng):
    plan, rewards = previews(4), rng.uniform(0.5, 1, size=(3, 4))
    got = take(credits.value_credit(gamma=0.0, anchor=0.3), plan, rewards.ravel()).value
    z = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-8)
    omega = rewards / rewards.mean(0)
    near(omega.mean(0), 1.0)
    near(got[plan.train].reshape(3, 4), omega * (z + 0.3 * rewards))


def test_tree_5_3_ties_leave_the_anchor_for_the_first_steps():
    plan = previews(4)
    rewards = np.repeat([0.2, 0.5, 0.8], 4)
    builder = credits.value_credit(gamma=0.0, anchor=2.0, anchored_steps=2)
    got = take(builder, plan, rewards).value[plan.train].reshape(3, 4)
    near(got, np.repeat([[0.4 * 2.0 * 0.2], [1.0 * 2.0 * 0.5], [0.0]], 4, axis=1))
    np.testing.assert_array_equal(got[2], 0.0)
    none = take(builder, plan, np.zeros(12))
    np.testing.assert_array_equal(none.advantage, 0.0)


def test_tree_5_3_a_chain_of_zeros_keeps_its_score():
    """Its omega would be 0 / 0; it is the worst of its group all the same."""
    plan, rewards = previews(3), np.tile([0.0, 1.0, 2.0], 3)
    got = take(credits.value_credit(gamma=0.5, anchor=1.0), plan, rewards).value
    near(got[plan.train].reshape(3, 3)[:, 0], -(1.5**0.5), 1e-7)


def test_tree_5_3_the_anchor_pushes_every_sample_up(rng):
    plan, rewards = previews(4), np.tile(rng.uniform(0.5, 1, size=4), 3)
    got = take(credits.value_credit(gamma=0.0, anchor=0.3), plan, rewards).value
    near(got[plan.train].reshape(3, 4).sum(1), 0.3 * rewards.sum() / 3)


def test_previews_are_means_for_the_other_estimators(rng):
    """A node with a preview and a chain that goes on: its value is the mean of both."""
    plan, rewards = previews(3), rng.normal(size=9)
    value = credit.lift(plan, rewards[:, None], credit.mean_weight(plan))[:, 0]
    steps = rewards.reshape(3, 3)
    near(of_depth(plan, value, 1), steps.mean(0))
    near(of_depth(plan, value, 2)[plan.stochastic[plan.depth == 2]], steps[1:].mean(0))


def test_a_leaf_with_leaves_below_has_no_mean_but_a_lift():
    t = Tree()
    image = t.leaf(t.chain(t.roots(2), SG[1:], SDE))
    again = t.grow(image[:1], 0.5, renoise)
    t.leaf(t.grow(again, 0.0, SDE, children=2, train=True))
    plan = t.plan()
    with pytest.raises(ValueError, match="leaves must have no leaf below them, got row"):
        credit.mean_weight(plan)
    near(credit.lift(plan, np.ones((4, 1)))[plan.parent < 0, 0], (3.0, 1.0))
