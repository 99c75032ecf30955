"""Stopping branches in the rollout: what runs, exact expectations, coins, whole runs, refusals."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
import torch
from test_recipes import small
from trees import SDE, chains, near, take, two_level, uneven

from branchcore import recipes, schedule, stopping
from branchcore.credit import lift, mean_weight, pooled_std, standardize
from branchcore.forest import Stop, stoppable
from branchcore.leaf_weights import edge_weight
from branchcore.noise import STOPPING_LANE
from branchcore.passes import concat
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.credits import (
    ancestor_credit,
    depth_credit,
    exponential_credit,
    gain_credit,
    gdpo_credit,
    granular_credit,
    group_credit,
    leaf_credit,
    noise_weight,
    pair_credit,
    weighted,
)
from branchcore.rollout import rollout
from branchcore.stages import Batch, accumulate
from branchcore.steps import euler
from branchcore.stopping import Stopping
from branchcore.tree import Tree
from branchcore.unbiased import node_coins, optimal_probability, unit_coins

SG = schedule.shifted_linear(6, 3)
PROMPTS = ["a", "b", "c", "d", "e"]
F64 = {"dtype": torch.float64}
CONFIG = PruningConfig(stop=(1, 3), stop_rate=0.5, floor=0.2)


def reward(images, prompts):
    shift = torch.tensor([ord(p) for p in prompts]) % 3
    flat = images.flatten(1).double()
    # other batch shapes round otherwise
    return {"mean": -(flat.mean(1) - 0.2 * shift).abs().round(decimals=9)}


def tree(**options):
    return recipes.branchcore(SG, splits=(0, 2), clip=0.5, kl=0.3, **options)


def grown(recipe, model, stop=None, uids=(4, 9), iteration=3, **options):
    plan = recipe.plan(list(uids), seed=5, iteration=iteration)
    view = model.with_prompts([PROMPTS[uid % 5] for uid in uids])
    where = {"seed": 5, "iteration": iteration}
    return rollout(plan, view, list(uids), stop=stop, **where, **options, **F64)


def every_other(depth, nodes, x0):
    """Ends the second, fourth, ... of those asked."""
    del depth, x0
    return np.arange(len(nodes)) % 2 == 0


def below(plan, ended):
    """(M,) descendants of the rows, themselves left out: the naive way."""
    gone = set(ended)
    for row in range(len(plan)):
        if int(plan.parent[row]) in gone:
            gone.add(row)
    return np.isin(np.arange(len(plan)), sorted(gone - set(ended)))


ROLLOUTS = {
    "splits": (tree, (1, 3), {"tape": 5}),
    "two levels up": (lambda: recipes.awm(SG, group=4, times=2, order=3), (2, 4), {}),
    "re-noised states": (
        lambda: recipes.diffusion_nft(SG, group=4),
        (2,),
        {"keep_velocity": True},
    ),
    "trunks": (lambda: recipes.tempflow_grpo(SG, trunks=2, children=2), (1, 2), {"tape": 99}),
    "later updates": (lambda: recipes.dance_grpo(SG, group=4, updates=2), (1, 3), {}),
    "previews are leaves": (lambda: recipes.vgpo(SG, group=4), (2, 3), {"tape": 99}),
}


@pytest.mark.parametrize("kind", ROLLOUTS)
def test_nothing_below_an_end_is_evaluated_and_nothing_else_moves(kind, toy):
    build, depths, options = ROLLOUTS[kind]
    recipe, asked = build(), []

    def choose(depth, nodes, x0):
        asked.append((depth, nodes, x0))
        return every_other(depth, nodes, x0)

    model = toy()
    whole = grown(recipe, toy(), keep_velocity=True, tape=0)
    part = grown(recipe, model, Stop(depths, choose), **options)
    plan = part.plan
    assert [depth for depth, _, _ in asked] == list(depths)
    ended = np.concatenate([nodes[1::2] for _, nodes, _ in asked])
    gone = below(plan, ended.tolist())
    np.testing.assert_array_equal(part.alive, ~gone & ~np.isin(np.arange(len(plan)), ended))
    assert not part.evaluated[gone].any()
    assert part.evaluated[ended].all()
    assert sum(model.rows) == part.evaluated.sum()
    assert sum(model.rows) < (plan.evaluated.sum() if "keep_velocity" not in options else 1e9)
    np.testing.assert_array_equal(part.evaluated[~gone] >= plan.evaluated[~gone], True)
    kept = np.flatnonzero((part.slot >= 0) & ~gone)
    near(part.states(kept), whole.states(kept))
    assert not part.states(np.flatnonzero((part.slot >= 0) & gone)).any()
    assert torch.equal(part.log_prob, whole.log_prob)
    if part.velocity is not None:
        slots = part.slot[np.flatnonzero(part.evaluated & (part.slot >= 0))]
        assert part.velocity[slots].any(1).all()
        near(part.velocity[slots], whole.velocity[slots])
    taped = [row for tape in part.tape for row in tape.nodes.tolist()]
    assert not gone[taped].any()
    assert bool(taped) == (options.get("tape", 0) > 0)
    for depth, nodes, _ in asked:
        assert (plan.depth[nodes] == depth).all()
        assert not plan.leaf[nodes].any()
        before = below(plan, [row for row in ended if plan.depth[row] < depth])
        inner = (plan.depth == depth) & plan.evaluated & (plan.leaves_below > plan.leaf)
        np.testing.assert_array_equal(nodes, np.flatnonzero(inner & ~before))


def test_the_preview_is_the_euler_edge_to_sigma_0(toy, all_states):
    recipe, seen = tree(), {}

    def choose(depth, nodes, x0):
        seen[depth] = (nodes, x0)
        return np.ones(len(nodes), dtype=bool)

    forest = grown(recipe, toy(), Stop((1, 3), choose), uids=(4,))
    x, v = all_states(forest.plan, toy().with_prompts(["e"]), forest.noise)
    for nodes, x0 in seen.values():
        near(x0, torch.stack([x[n] - forest.plan.sigma[n] * v[n] for n in nodes.tolist()]))
    assert [len(nodes) for nodes, _ in seen.values()] == [2, 4]


def test_going_on_everywhere_changes_no_bit(toy):
    for build, depths, options in ROLLOUTS.values():
        recipe, models = build(), (toy(), toy())
        plain = grown(recipe, models[0], **options)
        asked = Stop(depths, lambda _depth, nodes, _x0: np.ones(len(nodes), dtype=bool))
        forest = grown(recipe, models[1], asked, **options)
        assert torch.equal(plain.x, forest.x)
        assert torch.equal(plain.log_prob, forest.log_prob)
        assert models[0].rows == models[1].rows
        assert forest.alive.all()
        for one, other in zip(plain.tape, forest.tape, strict=True):
            assert torch.equal(one.velocity, other.velocity)
        assert (plain.velocity is None) == (forest.velocity is None)
        assert plain.velocity is None or torch.equal(plain.velocity, forest.velocity)


def test_everything_may_end_and_bad_answers_are_refused(toy):
    def nothing(_depth, nodes, _x0):
        return np.zeros(len(nodes), dtype=bool)

    model = toy()
    forest = grown(tree(), model, Stop((1, 3), nothing))
    plan = forest.plan
    assert sum(model.rows) == plan.evaluated[plan.depth <= 1].sum()
    assert not forest.leaves.any()
    with pytest.raises(ValueError, match=r"stop must choose \(4,\) of True or False, got \(4,\) f"):
        grown(tree(), toy(), Stop((1,), lambda _depth, nodes, _x0: np.ones(len(nodes))))
    for depth in (-1, 6, 99):
        with pytest.raises(ValueError, match=rf"stop must be at depths .* in 0\.\.4, got {depth}"):
            grown(tree(), toy(), Stop((depth,), nothing))
    with pytest.raises(ValueError, match=r"in 0\.\.5, got 6"):
        grown(recipes.awm(SG, group=2, times=2), toy(), Stop((6,), nothing))
    t = Tree()
    image = t.leaf(t.grow(t.roots(1), 0.5, SDE, children=2, train=True))
    t.leaf(t.grow(image, 0.0, euler))
    plan = t.plan(noisy_leaves=True)
    with pytest.raises(ValueError, match="whose nodes with leaves below are no leaves, got 1 with"):
        rollout(plan, toy(), [0], seed=0, stop=Stop((1,), nothing))


def test_a_velocity_that_is_not_finite_is_named_before_its_preview_is_judged(toy):
    class Broken(type(toy())):
        def velocity(self, x, sigma, prompt):
            v = super().velocity(x, sigma, prompt)
            return v * torch.nan if float(sigma[0]) < 0.93 else v

    def judge(depth, nodes, x0):
        raise AssertionError(depth)

    with pytest.raises(FloatingPointError, match="velocity must be finite, got NaN or Inf at node"):
        grown(tree(), Broken(), Stop((2,), judge))


def run_of(recipe, model, uids=(4, 9), config=CONFIG, coins=None, monkeypatch=None, **options):
    """One rollout with previews; returns what they know, the forest and the leaf weights."""
    plan = recipe.plan(list(uids), seed=5, iteration=3)
    texts = [PROMPTS[uid % 5] for uid in uids]
    previews = Stopping(config, recipe, reward, seed=5).previews(plan, model, texts, uids, 3)
    if coins is not None:
        monkeypatch.setattr(stopping, "node_coins", lambda _plan, nodes, *_a, **_k: coins[nodes])
    forest = grown(recipe, model, previews.stop, uids, **options)
    return previews, forest, previews.leaf_weight(forest.alive)


def draws(recipe, model, monkeypatch, uids=(4,)):
    """All outcomes of the coins with their chances, what they keep, and the probabilities used."""
    plan = recipe.plan(list(uids), seed=5, iteration=3)
    inner = plan.evaluated & (plan.leaves_below > plan.leaf) & np.isin(plan.depth, CONFIG.stop)
    nodes = np.flatnonzero(inner)
    for kept in map(np.array, itertools.product((True, False), repeat=len(nodes))):
        coins = np.zeros(len(plan))
        coins[nodes] = np.where(kept, 0.0, 1 - 2.0**-53)
        previews, forest, weight = run_of(recipe, model, uids, coins=coins, monkeypatch=monkeypatch)
        p, forced = previews.probability[nodes], previews.probability[nodes] == 1.0
        live = forest.alive[plan.parent[nodes]]
        # coins of those that nobody asked, or that go on for sure, do not matter: half each
        chance = np.where(live & ~forced, np.where(kept, p, 1 - p), 0.5)
        yield float(np.prod(chance)), forest, weight, previews


def gradient_of(forest, recipe, model, credit, weight):
    model.zero_grad()
    batch = Batch(forest, model, None, credit, weight)
    accumulate(batch, recipe)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.module.parameters()]
    return torch.cat([p.flatten() for p in parts])


def test_the_mean_over_all_coins_is_the_full_sum_and_the_full_gradient(toy, monkeypatch):
    """Two checkpoints, the second's probabilities depend on what the first left."""
    recipe, model = tree(), toy()
    full = grown(recipe, model, uids=(4,))
    plan, leaves = full.plan, np.flatnonzero(full.plan.leaf)
    rewards = reward(full.leaves, ["e"] * len(leaves))["mean"].numpy()
    credit = recipe.credit(plan, rewards[:, None], np.ones(1), full.log_prob.numpy())
    exact = gradient_of(full, recipe, model, credit, np.ones(len(plan)))
    scores = np.random.default_rng(0).normal(size=(len(leaves), 1))
    mean = mean_weight(plan)
    total = mass = chance_of_all = 0.0
    estimate, naive = torch.zeros_like(exact), torch.zeros_like(exact)
    lifted, edge, seen = np.zeros((len(plan), 1)), np.zeros(len(plan)), set()
    for chance, forest, weight, previews in draws(recipe, model, monkeypatch):
        chance_of_all += chance
        total += chance * float(np.where(weight > 0, weight * rewards, 0).sum()) / len(leaves)
        mass += chance * weight
        w = edge_weight(plan, weight)
        edge += chance * w
        lifted += chance * w[:, None] * lift(plan, scores, mean, weight)
        estimate += chance * gradient_of(forest, recipe, model, credit, w)
        naive += chance * gradient_of(forest, recipe, model, credit, np.sign(w))
        seen |= set(previews.probability.round(9))
    assert chance_of_all == pytest.approx(1.0, abs=1e-12)
    assert len(seen) > 3
    assert total == pytest.approx(rewards.mean(), rel=1e-12)
    near(mass, 1.0)
    near(edge, 1.0)
    near(lifted, lift(plan, scores, mean))
    assert float((estimate - exact).norm() / exact.norm()) <= 1e-12
    assert float((naive - exact).norm() / exact.norm()) > 1e-2


def test_credit_of_survivors_is_consistent_only_with_weights():
    """How much of the advantages the mean over the coins lacks: falls with G if weighted."""
    rng, lacking = np.random.default_rng(0), []
    for group in (4, 8, 32):
        plan, estimator = chains(group, sg=(1.0, 0.5, 0.0)), group_credit(ddof=0, eps=1e-4)
        rewards = np.array([NormalDist().inv_cdf((i + 0.5) / group) for i in range(group)])
        # previews tell: what is good is kept
        p = np.clip(0.6 + 0.3 * rewards, 0.3, 0.9)
        kept = rng.random((1000, group)) < p
        chance = np.full(len(kept), 1 / len(kept))
        if group < 9:
            kept = np.array(list(itertools.product((False, True), repeat=group)))
            chance = np.prod(np.where(kept, p, 1 - p), 1)
        truth = take(estimator, plan, rewards).value[plan.leaf]
        mean = np.zeros((2, group))
        for now, share in zip(kept, chance, strict=True):
            for j, w in enumerate((now / p, now.astype(float))):
                value = take(estimator, plan, rewards, leaf_weight=w).value
                mean[j] += share * (edge_weight(plan, w) * value)[plan.leaf]
        lacking.append(1 - mean @ truth / (truth @ truth))
    weighted, plain = np.array(lacking).T
    assert 0.25 > weighted[0] > 1.6 * weighted[1] > 0.15
    assert abs(weighted[2]) < 0.05
    assert (plain > 0.4).all()


GROUPS = {
    "vgpo": ({"group": 32}, (2, 4)),
    "tempflow_grpo": ({"trunks": 2, "children": 12}, (2,)),
    "g2rpo": ({"group": 16, "strides": (1, 2)}, (3,)),
    "tree_grpo": ({"branching": 6, "depth": 2}, (2, 3)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_credit_of_whole_steps_is_nearly_kept_in_large_groups(name):
    """Above the checkpoints as below them; survivors alone, not weighted, lose a third."""
    options, depths = GROUPS[name]
    recipe, rng = recipes.build(name, SG, **options), np.random.default_rng(0)
    plan = recipe.plan([0], seed=0, iteration=0)
    size = rng.normal(size=len(plan))
    for lo, hi in plan.levels()[1:]:
        size[lo:hi] = 0.8 * size[plan.parent[lo:hi]] + 0.6 * size[lo:hi]
    rewards = np.exp(size[plan.leaf])[:, None]
    args = np.ones(1), np.zeros(len(plan))
    truth = recipe.credit(plan, rewards, *args).value * plan.train
    got = np.zeros((2, len(plan)))
    for _ in range(150):
        p, alive = np.ones(len(plan)), np.ones(len(plan), dtype=bool)
        for depth in depths:
            nodes = stoppable(plan, depth)
            p[nodes] = np.clip(0.6 + 0.25 * size[nodes], 0.3, 0.95)
            alive[nodes] = rng.random(len(nodes)) < p[nodes]
        for lo, hi in plan.levels()[1:]:
            alive[lo:hi] &= alive[plan.parent[lo:hi]]
            p[lo:hi] *= p[plan.parent[lo:hi]]
        weight = np.where(alive, 1 / p, 0.0)[plan.leaf]
        known = np.where(weight[:, None] > 0, rewards, np.nan)
        for j, w in enumerate((weight, np.sign(weight))):
            value = recipe.credit(plan, known, *args, leaf_weight=w).value
            got[j] += edge_weight(plan, w) * value * plan.train / 150
    for edges in (plan.depth <= max(depths), plan.depth >= 0):
        share = got[:, edges] @ truth[edges] / (truth[edges] @ truth[edges])
        assert 0.88 < share[0] < 1.08
        assert share[1] < 0.7


def credits_of(name):
    """A small recipe's plan of two prompts, rewards (L, 2) above 0 and log-probabilities."""
    more = {"credit": "gdpo"} if name == "gdpo" else {}
    recipe = small("flow_dppo" if name == "gdpo" else name, **more)
    plan = recipe.plan([4, 9], seed=5, iteration=3)
    rng = np.random.default_rng(1)
    rewards = np.exp(rng.normal(size=(int(plan.leaf.sum()), 2)))
    log_prob = np.where(plan.stochastic, rng.normal(size=len(plan)), 0.0)
    return recipe.credit, plan, rewards, log_prob, rng


NAMED = {
    "granular": granular_credit(),
    "leaf softmax": leaf_credit(beta=1.0),
    "depth softmax": depth_credit(beta=1.0, columns=("prompt", "depth")),
    "gain": gain_credit(),
    "ancestors": ancestor_credit(),
    "ancestors by size": ancestor_credit(weights="size"),
    "global": group_credit(ddof=1, eps=1e-4, reward_first=True, global_std=True),
    "trimmed": group_credit(ddof=1, eps=1e-8, trimmed=0.3, separate=True),
    "conditions": gdpo_credit(conditions=((0, 1, 0.9),)),
    "pairs": pair_credit(),
    "exponential": exponential_credit(cap=3.0),
    "weighed": weighted(group_credit(ddof=0, eps=1e-4), noise_weight),
}
CREDITS = [*recipes.RECIPES, "gdpo", *NAMED]


def setting(name):
    if name in NAMED:
        _, plan, rewards, log_prob, rng = credits_of("branchcore")
        return NAMED[name], plan, rewards, log_prob, rng
    return credits_of(name)


@pytest.mark.parametrize("name", CREDITS)
def test_a_missing_leaf_influences_nothing(name):
    credit, plan, rewards, log_prob, rng = setting(name)
    args = np.array([1.0, 0.5]), log_prob
    weight = rng.choice([0.0, 1.0, 1.0, 2.0, 5.0], len(rewards))
    weight[:2] = 0.0, 2.0
    gone = weight == 0
    known = []
    for junk in (np.nan, 1e9, -np.inf, 0.0):
        held = rewards.copy()
        held[gone] = junk
        before = held.copy()
        known.append(credit(plan, held, *args, leaf_weight=weight))
        np.testing.assert_array_equal(held, before)
    for other in known[1:]:
        np.testing.assert_array_equal(known[0].advantage, other.advantage)
        np.testing.assert_array_equal(known[0].value, other.value)
    assert np.isfinite(known[0].advantage).all()
    assert known[0].advantage.any()
    unseen = edge_weight(plan, weight) == 0
    assert unseen.any()
    assert not known[0].advantage[unseen].any()
    assert not known[0].value[unseen].any()
    nothing = credit(plan, np.full_like(rewards, np.nan), *args, leaf_weight=0 * weight)
    assert not nothing.advantage.any()
    # a whole prompt may be missing
    weight[plan.prompt[plan.leaf] == 0] = 0.0
    held = np.where(weight[:, None] > 0, rewards, np.nan)
    one = credit(plan, held, *args, leaf_weight=weight)
    assert np.isfinite(one.advantage).all()
    assert not one.advantage[plan.prompt == 0].any()


@pytest.mark.parametrize("name", CREDITS)
def test_equal_weights_are_none(name):
    credit, plan, rewards, log_prob, _ = setting(name)
    args = plan, rewards, np.array([1.0, 0.5]), log_prob
    plain = credit(*args)
    for scale in (1.0, 3.0):
        same = credit(*args, leaf_weight=np.full(len(rewards), scale))
        np.testing.assert_array_equal(same.advantage, plain.advantage)
        np.testing.assert_array_equal(same.value, plain.value)
    if name in ("global", "gdpo", "conditions"):
        return
    # equal within a prompt, but not over the call: the weighted formulas, the plain numbers
    per_prompt = np.array([1.0, 3.0])[plan.prompt[plan.leaf]]
    near(credit(*args, leaf_weight=per_prompt).advantage, plain.advantage)


@pytest.mark.parametrize("name", ["trimmed", "pairs", "exponential", "global", "conditions"])
def test_a_chain_that_is_missing_is_like_a_smaller_group(name):
    """Groups of 5 with one missing are groups of 4, prompt by prompt."""
    rng, whole, part = np.random.default_rng(3), chains(5), chains(4)
    plans = [concat([plan, plan]) for plan in (whole, part)]
    rewards = np.exp(rng.normal(size=(10, 2)))
    weight = np.ones(10)
    weight[[1, 5]] = 0.0
    got = take(NAMED[name], plans[0], rewards, leaf_weight=weight)
    there = edge_weight(plans[0], weight) > 0
    near(got.advantage[there], take(NAMED[name], plans[1], rewards[weight > 0]).advantage)


def test_whole_numbers_are_copies():
    """Biased statistics of weights 1, 2, 3 are those of rows repeated; ddof 1 is as documented."""
    rng = np.random.default_rng(4)
    values, group = rng.normal(size=(8, 2)), np.array([0, 0, 0, 1, 1, 1, 1, 2])
    weight = np.array([1.0, 2, 3, 1, 0, 2, 3, 2])
    values[4] = np.nan
    again = np.repeat(np.arange(8), weight.astype(int))
    wanted = standardize(values[again], group[again], ddof=0, eps=0.1)
    got = standardize(values, group, ddof=0, eps=0.1, weight_n=weight)
    near(got[again], wanted)
    assert not got[4].any()
    near(pooled_std(values, 0, weight), values[again].std(0))
    w, r = weight[:3], values[:3]
    mean = w @ r / w.sum()
    size = w.sum() ** 2 / (w @ w)
    var = w @ (r - mean) ** 2 / w.sum() * size / (size - 1)
    got = standardize(values, group, ddof=1, eps=0.0, weight_n=weight)[:3]
    near(got, (r - mean) / np.sqrt(var))
    scaled = standardize(values, group, ddof=1, eps=0.0, weight_n=7.3 * weight)[:3]
    near(scaled, got)
    trimmed = standardize(values[:3, :1], group[:3], ddof=0, trimmed=0.4, weight_n=w)
    order = np.argsort(r[:, 0])
    # a third of 3 rows is cut; the row that straddles the cut stays
    filled = np.cumsum(w[order]) * 3 / w.sum()
    left = order[filled > 1 + 1e-9]
    mean = w[left] @ r[left, 0] / w[left].sum()
    spread = np.sqrt(w[left] @ (r[left, 0] - mean) ** 2 / w[left].sum())
    near(trimmed[:, 0], (r[:, 0] - mean) / (spread + 1e-8))


def test_weights_of_leaves_lift_and_weigh_by_hand():
    plan = two_level()
    weight = np.array([2.0, 0.0, 0.0, 0.0])
    near(edge_weight(plan, weight), [0.5, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    values = np.array([[3.0], [np.nan], [np.nan], [np.nan]])
    near(lift(plan, values, mean_weight(plan), weight)[:, 0], [3, 3, 0, 3, 0, 0, 0])
    near(lift(plan, values, None, weight)[:, 0], [12, 6, 0, 3, 0, 0, 0])
    weight = np.array([2.0, 1.0, 4.0, 0.0])
    values = np.array([[3.0], [6.0], [1.0], [np.nan]])
    near(lift(plan, values, mean_weight(plan), weight)[:3, 0], [16 / 7, 4, 1])
    near(edge_weight(plan, weight), [7 / 4, 1.5, 2, 2, 1, 4, 0])
    image = uneven()
    near(edge_weight(image, None), 1.0)
    weight = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    got = edge_weight(image, weight)
    renoised = np.flatnonzero(image.matching)
    assert len(renoised) == 2
    of_leaf = dict(zip(np.flatnonzero(image.leaf).tolist(), weight, strict=True))
    assert [of_leaf[i] for i in image.parent[renoised].tolist()] == got[renoised].tolist()
    own = np.flatnonzero(image.leaf & (image.tree == 0)).tolist()
    assert got[0] == np.mean([of_leaf[i] for i in own])


def test_leaf_weights_are_checked():
    plan, rewards = two_level(), np.ones((4, 1))
    for weight, said in (
        (np.ones(3), r"leaf_weight must be \(4,\), got \(3,\)"),
        (np.array([1.0, -1.0, 1.0, 1.0]), r"finite and >= 0, got -1\.0 at 1"),
        (np.array([1.0, 1.0, np.nan, 1.0]), "finite and >= 0, got nan at 2"),
    ):
        with pytest.raises(ValueError, match=said):
            take(gain_credit(), plan, rewards, leaf_weight=weight)


def test_probabilities_are_the_cheapest_for_what_is_at_stake(toy):
    """Equal scores: all alike; else the floor, the share and what an earlier coin made heavier."""
    recipe, model = tree(), toy()
    previews, forest, weight = run_of(recipe, model, config=CONFIG)
    plan, p = forest.plan, previews.probability
    asked = np.flatnonzero(p < 1)
    assert set(plan.depth[asked]) <= {1, 3}
    assert p.min() >= CONFIG.floor
    first = np.flatnonzero((plan.depth == 1) & plan.evaluated)
    for prompt in (0, 1):
        mine = first[plan.prompt[first] == prompt]
        assert p[mine] @ plan.leaves_below[mine] == pytest.approx(
            0.5 * plan.leaves_below[mine].sum()
        )
    reach = np.ones(len(plan))
    for row in range(len(plan)):
        up = int(plan.parent[row])
        reach[row] = p[row] * (reach[up] if up >= 0 else 1.0)
    near(previews.reach(), reach)
    np.testing.assert_array_equal(weight, np.where(forest.alive, 1 / reach, 0.0)[plan.leaf])
    assert previews.components == ("mean",)
    size = np.array([2.0, 1.0, 0.5, 0.5])
    nodes = first
    previews.probability[:] = 1.0
    near(
        previews._probability(nodes, size),
        np.concatenate([optimal_probability(size[:2], np.ones(2), 0.5, 0.2),
                        optimal_probability(size[2:], np.ones(2), 0.5, 0.2)]),
    )  # fmt: skip
    near(previews._probability(nodes, np.zeros(4)), 0.5)
    below_one = np.flatnonzero((plan.depth == 3) & (plan.prompt == 0) & plan.evaluated)
    previews.probability[first[0]] = 0.25
    got = previews._probability(below_one, np.full(4, 0.3))
    heavy = plan.parent[plan.parent[below_one]] == first[0]
    assert heavy.sum() == 2
    near(got[heavy], 4 * got[~heavy])


def test_branches_of_unequal_size_count_by_their_leaves(toy):
    recipe = recipes.tempflow_grpo(SG, trunks=2, children=2)
    config = PruningConfig(stop=(2,), stop_rate=0.5, floor=0.01)
    previews, forest, _ = run_of(recipe, toy(), config=config)
    plan = forest.plan
    nodes = np.flatnonzero((plan.depth == 2) & (plan.prompt == 0) & plan.evaluated)
    cost = plan.leaves_below[nodes]
    assert set(cost) == {1, 6}
    previews.probability[:] = 1.0
    got = previews._probability(nodes, np.ones(len(nodes)))
    assert got @ cost == pytest.approx(cost.sum() / 2)
    near(got[cost == 6], np.sqrt(6) * got[cost == 1][0])


def test_coins_are_of_the_prompt_and_the_iteration_alone(toy):
    recipe = tree()

    def alive(uids, iteration=3, seed=5):
        plan = recipe.plan(list(uids), seed=5, iteration=3)
        nodes = np.flatnonzero(plan.depth == 3)
        where = {"seed": seed, "iteration": iteration, "lane": STOPPING_LANE}
        coins = node_coins(plan, nodes, uids, **where)
        _, forest, weight = run_of(recipe, toy(), uids)
        owner = plan.prompt
        return {
            uid: (coins[owner[nodes] == i], forest.alive[owner == i], weight[owner[plan.leaf] == i])
            for i, uid in enumerate(uids)
        }

    whole = alive((4, 9, 12))
    for uids in ((12, 4, 9), (9,), (12, 9)):
        for uid, (coins, live, weight) in alive(uids).items():
            np.testing.assert_array_equal(coins, whole[uid][0])
            np.testing.assert_array_equal(live, whole[uid][1])
            near(weight, whole[uid][2], atol=1e-6)
    assert len({live.tobytes() for _, live, _ in whole.values()}) > 1
    for other in ({"iteration": 4}, {"seed": 6}):
        assert (alive((9,), **other)[9][0] != whole[9][0]).all()
    plan = recipe.plan([9], seed=5, iteration=3)
    nodes = np.flatnonzero(plan.depth == 3)
    for inner in range(3):
        assert (unit_coins(plan, nodes, [9], seed=5, iteration=3, inner=inner) != whole[9][0]).all()
