"""Credit of every published estimator: invariants and toys of the two families of methods.

Names say where a case comes from: tree_3_7 is section 3.7 of the notes on tree and pruning methods,
flow_15_11 item 11 of section 15 of those on the Flow-GRPO family. Trees are in test_tree_credits.
"""

import itertools

import numpy as np
import pytest
from trees import (
    SDE,
    TOY,
    batch,
    chains,
    granular,
    images,
    near,
    per_prompt,
    previews,
    take,
    two_level,
    uneven,
)

from branchcore import credit, schedule
from branchcore.passes import concat
from branchcore.recipes import credits
from branchcore.steps import euler, flow_sde
from branchcore.tree import Tree

SD3 = schedule.flow_match_euler(10)
# What every estimator must get right, with the rewards kept non-negative for VGPO.
BUILDERS = {
    "group": (credits.group_credit(ddof=1, eps=1e-8), "tree"),
    "reward_first": (credits.group_credit(ddof=0, eps=1e-4, reward_first=True), "tree"),
    "separate": (credits.group_credit(ddof=1, eps=1e-8, separate=True), "tree"),
    "trimmed": (credits.group_credit(ddof=1, eps=1e-8, trimmed=0.3), "tree"),
    "branch_grpo": (credits.depth_credit(), "tree"),
    "branch_grpo_softmax": (credits.depth_credit(beta=2.0), "tree"),
    "multi_grpo": (credits.depth_credit(columns=("prompt", "depth"), floor=0.0), "tree"),
    "tree_rpo": (credits.depth_credit(columns=("parent",), floor=0.0), "tree"),
    "tree_grpo": (credits.leaf_credit(), "tree"),
    "tree_grpo_softmax": (credits.leaf_credit(beta=1.0), "tree"),
    "d_tree_rpo": (credits.gain_credit(), "tree"),
    "tree_po": (credits.ancestor_credit(), "tree"),
    "tree_po_size": (credits.ancestor_credit(weights="size"), "tree"),
    "g2rpo": (credits.granular_credit(), "tree"),
    "vgpo": (credits.value_credit(gamma=0.9, anchor=0.0), "previews"),
    "flow_dpo": (credits.pair_credit(), "tree"),
}


def example(kind, rng):
    plan = {"tree": uneven, "previews": lambda: previews(4)}[kind]()
    return plan, rng.uniform(1.0, 2.0, size=(int(plan.leaf.sum()), 1))


@pytest.mark.parametrize("name", BUILDERS)
def test_constant_rewards_contribute_exactly_zero(name, rng):
    builder, kind = BUILDERS[name]
    plan, rewards = example(kind, rng)
    log_prob = rng.normal(-3e4, 1.0, size=len(plan))
    for constant in (0.1, 1 / 3, 7.77e5):
        flat = np.full_like(rewards, constant)
        alone = take(builder, plan, flat, log_prob=log_prob)
        np.testing.assert_array_equal(alone.advantage, 0.0)
        np.testing.assert_array_equal(alone.value, 0.0)
        one = take(builder, plan, rewards, [0.7], log_prob)
        two = take(builder, plan, np.hstack([rewards, flat]), [0.7, 1.3], log_prob)
        np.testing.assert_array_equal(two.advantage, one.advantage)
        np.testing.assert_array_equal(two.value, one.value)
    assert (one.advantage[plan.train] > 0).any()


@pytest.mark.parametrize("global_std", [False, True])
def test_constant_rewards_leave_no_trace_in_sums_over_rewards(global_std, rng):
    builder = credits.group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std)
    plan, rewards = batch(rng.normal(size=(2, 7, 1)))
    one = take(builder, plan, rewards, [0.7])
    levels = (1e6 / 3, 1e6 / 3) if global_std else (1e6 / 3, 0.1)
    flat = np.array(levels)[plan.prompt[plan.leaf], None]
    two = take(builder, plan, np.hstack([flat, rewards]), [1.3, 0.7])
    np.testing.assert_array_equal(two.value, one.value)


def test_fused_constants_are_zero_without_a_floor(rng):
    """Softmax weights of summed log-probabilities add up to one but for 1e-10."""
    builder = credits.depth_credit(beta=1.0, columns=("prompt", "depth"), floor=0.0)
    plan = uneven()
    got = take(builder, plan, np.full(5, 0.7), log_prob=rng.normal(-3e6, 1.0, size=len(plan)))
    np.testing.assert_array_equal(got.advantage, 0.0)


def test_a_spread_of_zero_gives_nothing():
    got = credit.standardize(np.eye(2), np.zeros(2, dtype=int), spread=np.array([0.0, 1.0]), eps=0)
    near(got, [[0, -0.5], [0, 0.5]])


@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_do_not_see_each_other(name, rng):
    builder, kind = BUILDERS[name]
    plan, rewards = example(kind, rng)
    other = rng.uniform(1.0, 2.0, size=rewards.shape) * 10
    both = concat([plan, plan])
    joined = np.zeros((2 * len(rewards), 1))
    for prompt, part in enumerate((rewards, other)):
        joined[both.prompt[both.leaf] == prompt] = part
    got = take(builder, both, joined)
    for prompt, part in enumerate((rewards, other)):
        alone = take(builder, plan, part)
        near(got.advantage[both.prompt == prompt], alone.advantage)
        near(got.value[both.prompt == prompt], alone.value)


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ("vgpo", "d_tree_rpo")])
def test_flow_15_13_shift_and_positive_scale_change_nothing(name, rng):
    builder, kind = BUILDERS[name]
    plan, rewards = example(kind, rng)
    base = take(builder, plan, rewards).value
    near(take(builder, plan, 3.0 * rewards + 2.0).value, base, 1e-3 if "first" in name else 1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_negated_rewards_swap_the_columns(name, rng):
    if name in ("trimmed", "vgpo"):
        return
    builder, kind = BUILDERS[name]
    plan, rewards = example(kind, rng)
    a, b = take(builder, plan, rewards), take(builder, plan, -rewards)
    near(b.advantage, a.advantage[:, ::-1])


@pytest.mark.parametrize("name", ["group", "tree_grpo", "tree_po", "g2rpo", "flow_dpo"])
def test_renoised_states_take_the_value_of_their_image(name, rng):
    plan = images(5, (0.3, 0.6, 0.9))
    rewards = rng.normal(size=5)
    got = take(BUILDERS[name][0], plan, rewards)
    edges = plan.trained()
    assert len(edges) == 15
    np.testing.assert_array_equal(got.value[edges], got.value[plan.parent[edges]])
    assert got.value[edges].max() > 0.5


def test_renoised_states_in_groups_of_depth(rng):
    plan, rewards = images(5, (0.3, 0.6)), rng.normal(size=5)
    got = take(credits.depth_credit(columns=("prompt", "depth"), ddof=0), plan, rewards).value
    wanted = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    near(got[plan.train], wanted[plan.parent[plan.train] - np.flatnonzero(plan.leaf)[0]])


def test_tree_6_2_two_wins_count_more_than_one():
    plan, rewards = batch([[(0, 0), (0, 1)], [(0, 0), (1, 1)]])
    summed = credits.group_credit(ddof=1, eps=0, reward_first=True)
    for got in per_prompt(plan, take(summed, plan, rewards).value):
        near(got, (-(0.5**0.5), 0.5**0.5))
    one, two = per_prompt(plan, take(credits.gdpo_credit(eps=0), plan, rewards).value)
    total = np.array([-1, 1, -2, 2]) / 2**0.5
    near(np.append(one, two), total / total.std(ddof=1))


@pytest.mark.parametrize(("num_rewards", "first", "decoupled"), [(2, 7, 14), (3, 14, 45)])
def test_tree_6_2_distinct_advantages_of_binary_rewards(num_rewards, first, decoupled):
    rows = list(itertools.product((0, 1), repeat=num_rewards))
    groups = list(itertools.combinations_with_replacement(rows, 4))
    plan, rewards = batch(groups)
    for builder, count in (
        (credits.group_credit(ddof=1, eps=0, reward_first=True), first),
        (credits.gdpo_credit(eps=0), decoupled),
    ):
        got = per_prompt(plan, take(builder, plan, rewards).value)
        assert len({tuple(np.sort(g).round(9) + 0.0) for g in got}) == count


def test_tree_6_2_scale_toy():
    r1, r2 = np.array([1.0, 1, 0, 0]), np.array([10.0, 0, 10, 0])
    plan, rewards = batch([np.stack([r1, r2], axis=1)])
    summed = credits.group_credit(ddof=1, eps=0, reward_first=True)
    got = take(summed, plan, rewards).value[plan.leaf]
    near(got, (0.948, -0.776, 0.776, -0.948), 1e-3)
    got = take(credits.gdpo_credit(eps=0), plan, rewards).value[plan.leaf]
    total = np.array([3**0.5, 0, 0, -(3**0.5)])
    near(got, total / total.std(ddof=1))
    near(take(credits.gdpo_credit(eps=0), plan, rewards * [1, 7]).value[plan.leaf], got)


def test_tree_6_2_the_batch_step_is_one_positive_factor(rng):
    groups = [rng.normal(size=(5, 3)) * s + 4 for s in (1.0, 10.0, 0.1)] + [np.ones((2, 3))]
    plan, rewards = batch(groups)
    weights = np.array([0.5, 1.0, 2.0])
    got = take(credits.gdpo_credit(eps=0), plan, rewards, weights).value
    total = take(credits.group_credit(ddof=1, eps=0), plan, rewards, weights).value
    factor = 1 / total[plan.leaf].std(ddof=1)
    near(got, factor * total)
    for part in per_prompt(plan, got):
        near(part.sum(), 0)
    np.testing.assert_array_equal(per_prompt(plan, got)[3], 0.0)
    scaled = take(credits.gdpo_credit(eps=0), plan, rewards * [3, 0.2, 9] - 5, weights).value
    near(scaled, got, 1e-9)
    doubled = np.hstack([rewards, rewards[:, :1]])
    near(
        take(credits.gdpo_credit(eps=0), plan, doubled, [0.25, 1, 2, 0.25]).value,
        got,
    )


def test_tree_6_2_constant_rewards_and_groups_of_one():
    plan, rewards = batch([[(1, 0.3), (2, 0.3), (4, 0.3)], [(5, 0.7)]])
    one, alone = per_prompt(plan, take(credits.gdpo_credit(), plan, rewards).value)
    np.testing.assert_array_equal(alone, 0.0)
    other, _ = per_prompt(plan, take(credits.gdpo_credit(), plan, rewards * [1, 9]).value)
    np.testing.assert_array_equal(one, other)
    flat = take(credits.gdpo_credit(), plan, np.full((4, 2), 0.1))
    np.testing.assert_array_equal(flat.advantage, 0.0)


def test_tree_6_1_conditions_gate_a_reward_behind_another():
    plan, rewards = batch([[(1, 0.2), (0, 0.9), (1, 0.6), (0, 0.1)]])
    before = rewards.copy()
    gated = take(credits.gdpo_credit(conditions=((1, 0, 1.0),)), plan, rewards)
    wanted = take(credits.gdpo_credit(), plan, rewards * [[1, 1], [1, 0], [1, 1], [1, 0]])
    np.testing.assert_array_equal(gated.value, wanted.value)
    np.testing.assert_array_equal(rewards, before)
    assert np.argmax(gated.value[plan.leaf]) == 2
    assert np.argmax(take(credits.gdpo_credit(), plan, rewards).value[plan.leaf]) == 2
    shut = take(credits.gdpo_credit(conditions=((1, 0, 2.0),)), plan, rewards).value
    alone = take(credits.gdpo_credit(), plan, rewards * [1, 0]).value
    np.testing.assert_array_equal(shut, alone)


def test_tree_8_3_granularities_sum_to_zero_and_add_up(rng):
    plan = granular(5, (1, 2))
    rewards = rng.normal(size=int(plan.leaf.sum()))
    got = take(credits.granular_credit(), plan, rewards).value
    labels = plan.label[plan.leaf]
    scores = np.zeros(len(rewards))
    for label in range(4):
        mine = labels == label
        values = rewards[mine]
        scores[mine] = (values - values.mean()) / (values.std(ddof=1) + 1e-8)
        near(scores[mine].sum(), 0)
    near(got[plan.leaf], scores)
    for k in range(2):
        actions = np.flatnonzero(plan.train & (plan.update == k))
        assert len(actions) == 5
        near(got[actions].sum(), 0)
    near(got[plan.train], credit.lift(plan, scores[:, None])[plan.train, 0])


def test_flow_15_26_one_granularity_is_the_plain_advantage_and_two_double_it(rng):
    one, two = granular(6, (1,), branches=1), granular(6, (1, 1), branches=1)
    rewards = rng.normal(size=6)
    plain = take(credits.group_credit(ddof=1, eps=1e-8), one, rewards)
    got = take(credits.granular_credit(), one, rewards)
    np.testing.assert_array_equal(got.advantage[one.train], plain.advantage[one.train])
    both = np.zeros(12)
    both[two.label[two.leaf] == 0] = both[two.label[two.leaf] == 1] = rewards
    double = take(credits.granular_credit(), two, both)
    near(double.value[two.train], 2 * got.value[one.train])
    assert len(np.unique(two.label[two.leaf])) == 2
    tree = take(credits.leaf_credit(), one, rewards)
    near(tree.value[one.train], got.value[one.train])


def test_flow_15_26_the_clip_comes_after_the_sum():
    plan = granular(40, (1, 1, 1), branches=1)
    rewards = np.zeros(120)
    rewards[:3] = 1.0
    assert plan.label[plan.leaf][:3].tolist() == [0, 1, 2]
    got = take(credits.granular_credit(), plan, rewards)
    winner = np.argmax(np.where(plan.train, got.value, -np.inf))
    near(got.value[winner], 3 * 39 / 40**0.5, 1e-5)
    assert got.advantage[winner].tolist() == [5.0, 0.0]


def test_tree_10_pairs_are_the_best_and_the_worst():
    plan = concat([images(4, (0.3, 0.6))] * 3)
    rewards = np.zeros((12, 2))
    rewards[:, 0] = [1, 4, 2, 0, 5, 5, 5, 5, 2, 0, 0, 2]
    rewards[:, 1] = 0.1
    got = take(credits.pair_credit(), plan, rewards, [2.0, 1.0])
    other = np.stack([rewards[:, 0], np.tile([9.0, 0, 0, 0], 3)], axis=1)
    flipped = take(credits.pair_credit(), plan, other, [1.0, 1.0]).advantage
    assert not np.array_equal(flipped, got.advantage)
    np.testing.assert_array_equal(
        take(credits.pair_credit(), plan, other, [1.0, 0.0]).advantage, got.advantage
    )
    image = np.searchsorted(np.flatnonzero(plan.leaf), plan.parent[plan.train])
    plus, minus = got.advantage[plan.train].T
    assert set(image[plus == 1]) == {1, 8}
    assert set(image[minus == 1]) == {3, 9}
    assert [plus.sum(), minus.sum()] == [4, 4]
    near(got.value[plan.train], plus - minus)


def test_tree_10_weights_grow_exponentially_to_the_cap():
    plan = images(4, (0.5,))
    rewards = np.array([1.0, 2.0, 3.0, 10.0])
    z = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    got = take(credits.exponential_credit(temperature=0.5, cap=4.0), plan, rewards)
    near(got.advantage[plan.train, 0], np.minimum(np.exp(z / 0.5), 4.0))
    assert got.advantage[plan.train, 0].max() == 4.0
    np.testing.assert_array_equal(got.advantage[:, 1], 0.0)
    near(got.value[plan.train], z)
    tied = take(credits.exponential_credit(cap=4.0), plan, np.full(4, 0.1))
    np.testing.assert_array_equal(tied.advantage[plan.train], [[1.0, 0.0]] * 4)
    steep = take(credits.exponential_credit(temperature=1e-4, cap=4.0), plan, rewards)
    assert steep.advantage.max() == 4.0
    assert np.exp(np.log(10.0)) > 10.0
    steep = take(credits.exponential_credit(temperature=1e-4, cap=10.0), plan, rewards)
    assert steep.advantage.max() == 10.0


@pytest.mark.parametrize(("ddof", "wanted"), [(0, 1.0), (1, 0.5**0.5)])
def test_flow_15_11_pairs_and_moments(ddof, wanted, rng):
    builder = credits.group_credit(ddof=ddof, eps=1e-8)
    plan = chains(2)
    near(take(builder, plan, [0.2, 0.9]).value[plan.leaf], (-wanted, wanted), 1e-6)
    plan = chains(9)
    got = take(builder, plan, rng.normal(size=9)).value[plan.leaf]
    near([got.mean(), got.std(ddof=ddof)], (0, 1), 1e-6)


def test_flow_15_12_global_std(rng):
    plan, rewards = batch([rng.normal(size=(6, 1)) * s for s in (1.0, 10.0, 0.0)])
    got = take(credits.group_credit(ddof=0, eps=0, global_std=True), plan, rewards).value
    for mine, raw in zip(per_prompt(plan, got), np.split(rewards, 3), strict=True):
        near(mine.sum(), 0)
        near(mine.std(), raw.std() / rewards.std())
    np.testing.assert_array_equal(per_prompt(plan, got)[2], 0.0)


@pytest.mark.parametrize("reward_first", [False, True])
def test_flow_15_12_global_std_of_constant_rewards_is_zero_not_an_error(reward_first):
    plan, _ = batch([np.zeros((3, 2)), np.zeros((3, 2))])
    builder = credits.group_credit(ddof=0, eps=0, global_std=True, reward_first=reward_first)
    got = take(builder, plan, np.tile([0.1, 1 / 3], (6, 1)))
    np.testing.assert_array_equal(got.advantage, 0.0)


def test_flow_15_12_global_std_sees_rewards_that_are_constant_in_groups_alone():
    """A component that differs between prompts widens the spread, but has no advantage."""
    plan, rewards = batch([[(1, 0), (3, 0)], [(2, 8), (2, 8)]])
    builder = credits.group_credit(ddof=0, eps=0, global_std=True, reward_first=True)
    got = per_prompt(plan, take(builder, plan, rewards).value)
    near(got[0], np.array([-1, 1]) / np.array([1, 3, 10, 10]).std())
    np.testing.assert_array_equal(got[1], 0.0)


def test_flow_15_12_summing_rewards_or_advantages(rng):
    plan, weights = chains(6), np.array([0.7, 1.4])
    z = (rng.normal(size=(6, 2)) - 0.1) * [1.0, 1.0]
    z = (z - z.mean(0)) / z.std(0)
    advantages = credits.group_credit(ddof=0, eps=0)
    rewards = credits.group_credit(ddof=0, eps=0, reward_first=True)
    summed = take(advantages, plan, z, weights).value[plan.leaf]
    near(take(rewards, plan, z, weights).value[plan.leaf], summed / summed.std())
    scaled = z * [1.0, 50.0] + [4.0, -1.0]
    near(take(advantages, plan, scaled, weights).value[plan.leaf], summed, 1e-9)
    moved = take(rewards, plan, scaled, weights).value[plan.leaf]
    assert np.abs(moved - summed / summed.std()).max() > 0.1


@pytest.mark.parametrize("separate", [False, True])
def test_flow_15_14_a_sample_at_the_mean_has_exactly_no_term(separate):
    plan = chains(3)
    got = take(credits.group_credit(ddof=1, eps=1e-8, separate=separate), plan, [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(got.advantage[plan.leaf][1], 0.0)
    assert (got.advantage[plan.leaf].sum(1) > 0.9).tolist() == [True, False, True]


def test_flow_3_separate_losses_keep_both_columns(rng):
    plan, rewards, weights = chains(5), rng.normal(size=(5, 2)), np.array([0.7, 1.4])
    got = take(credits.group_credit(ddof=1, eps=1e-8, separate=True), plan, rewards, weights)
    z = (rewards - rewards.mean(0)) / (rewards.std(0, ddof=1) + 1e-8)
    near(got.advantage[plan.leaf, 0], np.maximum(z, 0) @ weights)
    near(got.advantage[plan.leaf, 1], np.maximum(-z, 0) @ weights)
    assert (got.advantage[plan.leaf].min(1) > 0).any()


def test_flow_15_25_trimming_nothing_changes_nothing(rng):
    plan, rewards = chains(12), rng.normal(size=(12, 2))
    plain = take(credits.group_credit(ddof=1, eps=1e-8), plan, rewards)
    trimmed = take(credits.group_credit(ddof=1, eps=1e-8, trimmed=0.0), plan, rewards)
    small = take(credits.group_credit(ddof=1, eps=1e-8, trimmed=0.08), plan, rewards)
    np.testing.assert_array_equal(trimmed.value, plain.value)
    np.testing.assert_array_equal(small.value, plain.value)


def test_flow_4_1_trimmed_statistics_leave_out_the_lowest_of_each_reward(rng):
    plan, rewards = batch([rng.normal(size=(12, 2)), rng.normal(size=(12, 2)) + 5])
    got = take(credits.group_credit(ddof=1, eps=1e-8, trimmed=0.3), plan, rewards, [1, 10]).value
    wanted = np.zeros(24)
    for prompt in range(2):
        mine = plan.prompt[plan.leaf] == prompt
        for weight, column in zip((1, 10), rewards[mine].T, strict=True):
            kept = np.sort(column)[3:]
            wanted[mine] += weight * (column - kept.mean()) / (kept.std(ddof=1) + 1e-8)
    near(got[plan.leaf], wanted, 1e-11)
    ties = [0.0, 0.1, 0.1, 0.1]
    tied = take(credits.group_credit(ddof=1, eps=1e-8, trimmed=0.25), chains(4), ties)
    np.testing.assert_array_equal(tied.advantage, 0.0)


def step_factors(plan, weight):
    """Weight times |b| / s, the gradient of one edge, by step."""
    rows = plan.trained()
    gain = -plan.row[rows, 1]
    return (weight[rows] * gain / plan.row[rows, 3]).reshape(len(SD3) - 2, -1)


def test_flow_15_16_tempflow_constants():
    for sg, level, constant, rounded, mean in (
        (SD3, 0.7, 2.2522, 2.25, 0.9990),
        (schedule.flux_dynamic(10, 4096), 0.9, 1.7260, 1.73, 1.0023),
    ):
        plan = chains(3, sg=sg.tolist(), sde=flow_sde(level, sg[1]))
        weight = credits.noise_weight(plan)
        s = plan.row[plan.train, 3]
        near(weight[plan.train].mean(), 1)
        near(weight[plan.train] / s, constant, 5e-5)
        near((rounded * s).mean(), mean, 5e-5)
        np.testing.assert_array_equal(weight[~plan.train], 0.0)


def test_flow_15_17_spreads_over_steps():
    plan = chains(2, sg=SD3.tolist(), sde=flow_sde(0.7, SD3[1]))
    plain = step_factors(plan, np.ones(len(plan)))
    tempflow = step_factors(plan, credits.noise_weight(plan))
    for factors, spread, tolerance in ((plain, 26.1, 0.05), (tempflow, 8.40, 0.01)):
        near(factors.max() / factors.min(), spread, tolerance)
    guard = (credits.inverse_step_weight(plan) * -plan.row[:, 1])[plan.train].reshape(9, 2)
    near(guard[0], 1.0, 1e-9)
    near(guard[1:], 1.245, 1e-9)


def test_flow_5_step_weights_do_not_cross_prompts():
    early, late = chains(2), two_level()
    both = concat([early, late])
    for weight in (credits.noise_weight, credits.inverse_step_weight):
        near(weight(both)[both.prompt == 0], weight(early))
        near(weight(both)[both.prompt == 1], weight(late))


def test_flow_5_weighted_advantages_weigh_the_clipped_loss(rng):
    plan, rewards = chains(5, sg=SD3.tolist()), rng.normal(size=5)
    plain = credits.group_credit(ddof=0, eps=1e-4)
    base = take(plain, plan, rewards)
    got = take(credits.weighted(plain, credits.noise_weight), plan, rewards)
    weight = credits.noise_weight(plan)
    np.testing.assert_array_equal(got.value, base.value)
    ratio = np.exp(0.3 * rng.normal(size=len(plan)))
    clipped = ratio.clip(0.8, 1.2)

    def loss(advantage):
        plus, minus = advantage.T
        return -plus * np.minimum(ratio, clipped) + minus * np.maximum(ratio, clipped)

    near(loss(got.advantage), weight * loss(base.advantage))
    assert weight[plan.train].std() > 0.01


def forked():
    """Nodes with a preview each, of which the first has two successors."""
    t = Tree()
    x = t.grow(t.roots(1), 0.8, SDE)
    t.leaf(t.grow(x, 0.0, euler))
    t.leaf(t.grow(t.grow(x, 0.6, SDE, children=2, train=True), 0.0, euler))
    return t.plan()


def rewards_of(plan, count=1):
    return np.arange(1.0, 1 + plan.leaf.sum() * count).reshape(-1, count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: take(credits.gdpo_credit(), chains(3), rewards_of(chains(3))),
            "gdpo_credit: rewards must have at least 2 components, got 1; try group_credit",
        ),
        (
            lambda: take(
                credits.gdpo_credit(conditions=((1, 2, 0.0),)), chains(3), rewards_of(chains(3), 2)
            ),
            r"conditions must name rewards in 0..1, got \(1, 2\)",
        ),
        (
            lambda: credits.gdpo_credit(conditions=((1, 1, 0.0),)),
            r"conditions must name two different rewards from 0, got \(1, 1\)",
        ),
        (lambda: credits.gdpo_credit(conditions=((-1, 0, 0.0),)), r"got \(-1, 0\)"),
        *(
            (
                lambda s=s: credit.standardize(np.eye(2), np.zeros(2, int), spread=np.array([s])),
                "standardize: spread must be finite and >= 0, got",
            )
            for s in (-1.0, np.nan, np.inf)
        ),
        *(
            (
                lambda f=f: credit.standardize(np.eye(2), np.zeros(2, int), trimmed=f),
                rf"standardize: trimmed must be in \[0, 1\), got {f}",
            )
            for f in (1.0, -0.1, np.nan)
        ),
        (
            lambda: credits.group_credit(ddof=1, eps=0, trimmed=1.0),
            r"group_credit: trimmed must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: credits.group_credit(ddof=1, eps=0, trimmed=0.1, global_std=True),
            "trimmed must be 0 with global_std, got 0.1",
        ),
        (
            lambda: credits.group_credit(ddof=1, eps=0, reward_first=True, separate=True),
            "separate must be False with reward_first",
        ),
        (
            lambda: credits.depth_credit(columns=("depth",)),
            r"columns must have prompt, tree or parent, got \('depth',\)",
        ),
        (
            lambda: credits.ancestor_credit(weights="leaves"),
            "weights must be 'equal' or 'size', got 'leaves'",
        ),
        (
            lambda: take(credits.leaf_credit(beta=1.0), images(2, ()), [1.0, 2.0, 3.0]),
            r"values_nR must be \(n, R\) and group_n \(n,\), got \(3, 1\) and \(2,\)",
        ),
        (
            lambda: take(credits.value_credit(gamma=1, anchor=0), chains(2), [0.1, 0.2]),
            "must have one preview leaf and at most one stochastic step below it, got 0 and 1",
        ),
        (
            lambda: take(credits.value_credit(gamma=1, anchor=0), forked(), [0.1, 0.2, 0.3]),
            "must have one preview leaf and at most one .*, got 1 and 2 at row 1",
        ),
        (
            lambda: take(credits.value_credit(gamma=1, anchor=0), images(2, (0.5,)), [1.0, 2.0]),
            "must have one preview leaf and at most one stochastic step below it, got 0 and 0",
        ),
        (
            lambda: take(credits.value_credit(gamma=1, anchor=0), previews(1), [0.1, -0.2, 0.3]),
            r"value_credit: rewards must be >= 0, got -0.2; try a larger shift",
        ),
        *(
            (lambda k=k: credits.value_credit(**k), r"value_credit: gamma must be in \[0, 1\]")
            for k in (
                {"gamma": 1.1, "anchor": 0},
                {"gamma": 1, "anchor": -1},
                {"gamma": 1, "anchor": 0, "anchored_steps": -1},
                {"gamma": np.nan, "anchor": 0},
            )
        ),
        *(
            (
                lambda k=k: credits.exponential_credit(**k),
                "exponential_credit: temperature and cap must be positive",
            )
            for k in ({"cap": 0}, {"cap": np.inf}, {"cap": 1, "temperature": 0})
        ),
        *(
            (
                lambda w=w: take(
                    credits.weighted(credits.gain_credit(), lambda _: w), two_level(), TOY
                ),
                r"weighted: weight must return \(7,\) finite numbers >= 0, got",
            )
            for w in (np.ones(3), np.full(7, -1.0), np.full(7, np.nan))
        ),
        *(
            (lambda w=w: w(images(2, (0.5,))), "trained edges must be sampling steps, got b = 0")
            for w in (credits.noise_weight, credits.inverse_step_weight)
        ),
    ],
)
def test_errors_name_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rewards_that_tie_but_for_rounding_are_worth_nothing():
    """.1 + .2 and .3 differ by 5e-17: no pair, and no advantage however rewards are summed."""
    plan = chains(4)
    rewards = np.array([[0.1 + 0.2], [0.3], [0.3], [0.1 + 0.2]])
    for build in (
        credits.pair_credit(),
        credits.group_credit(ddof=0, eps=1e-4, reward_first=True),
        credits.group_credit(ddof=0, eps=1e-4),
    ):
        assert not build(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage.any()


def test_flow_4_1_mixgrpo_averages_its_rewards():
    """Weights count by their share: twice all weights changes nothing, three equal ones average."""
    plan, rng = chains(6), np.random.default_rng(2)
    rewards = rng.normal(size=(6, 3))
    build = credits.group_credit(ddof=1, eps=1e-8, average=True)
    alone = credits.group_credit(ddof=1, eps=1e-8)
    each = [take(alone, plan, rewards[:, [r]]).value for r in range(3)]
    for scale in (1.0, 2.0):
        got = build(plan, rewards, np.full(3, scale), np.zeros(len(plan))).advantage
        near(got[:, 0] - got[:, 1], np.mean(each, axis=0))
        assert np.ptp(each, axis=0).max() > 1.0
