"""The rollout: shared equals naive, chunking, noise by name, history, given roots, bad models."""

import numpy as np
import pytest
import torch

import branchcore
from branchcore import forest as forests
from branchcore import passes, recipes, schedule
from branchcore.rollout import rollout
from branchcore.steps import dance_sde, dpmpp, euler
from branchcore.tree import Tree

F64 = {"dtype": torch.float64}
SG = schedule.shifted_linear(8, 3)
RECIPES = {
    "branch_grpo": lambda: recipes.branch_grpo(SG, splits=(0, 2, 4)),
    "branch_mix": lambda: recipes.branch_mix(SG, splits=(0, 2), window=2),
    "branchcore": lambda: recipes.branchcore(SG, splits=(1, 3), branching=(3, 2)),
    "dance_grpo": lambda: recipes.dance_grpo(SG, group=5),
    "flow_grpo": lambda: recipes.flow_grpo(SG, group=4),
}


def plan_of(name, uids=(4, 9), iteration=3):
    return RECIPES[name]().plan(list(uids), seed=5, iteration=iteration)


@pytest.mark.parametrize("name", RECIPES)
def test_every_state_equals_the_row_by_row_computation(name, toy, all_states):
    plan, model = plan_of(name), toy()
    forest = rollout(plan, model, [4, 9], seed=5, iteration=3, **F64)
    x, _ = all_states(plan, model, forest.noise)
    kept = np.flatnonzero(forest.slot >= 0)
    exact = torch.stack([x[int(i)] for i in kept])
    assert (forest.states(kept) - exact).abs().max() <= 1e-13
    np.testing.assert_array_equal(
        kept, np.unique([*np.flatnonzero(plan.leaf), *plan.action[plan.trained()]])
    )


@pytest.mark.parametrize("name", RECIPES)
def test_shared_equals_independent_chains_on_the_same_noise(name, toy):
    plan = plan_of(name)
    apart = passes.unshare(plan)
    shared = rollout(plan, toy(), [4, 9], seed=5, iteration=3, **F64)
    chains = rollout(apart.plan, toy(), [4, 9], seed=5, iteration=3, **F64)
    rank = np.cumsum(plan.leaf) - 1
    same = rank[apart.origin[apart.plan.leaf]]
    assert (chains.leaves - shared.leaves[torch.from_numpy(same)]).abs().max() <= 1e-13
    assert (
        sum(toy_rows(plan, toy)) == plan.counts().forwards < apart.plan.counts().forwards
        or name == "flow_grpo"
    )


def toy_rows(plan, toy):
    model = toy()
    rollout(plan, model, [4, 9], seed=5, iteration=3, **F64)
    return model.rows


def test_one_call_per_wave_and_one_row_per_node(toy):
    plan = plan_of("branch_grpo", uids=(0, 1, 2))
    model = toy()
    forest = rollout(plan, model, [0, 1, 2], seed=0, **F64)
    assert model.rows == [int(plan.evaluated[lo:hi].sum()) for lo, hi in plan.levels()][:8]
    assert forest.calls == 8
    assert sum(model.rows) == plan.counts().forwards


@pytest.mark.parametrize("max_batch", [1, 2, 5, 7, None])
def test_noise_and_leaves_do_not_depend_on_chunks(max_batch, toy):
    plan = plan_of("branch_grpo")
    whole = rollout(plan, toy(), [4, 9], seed=5, **F64)
    part = rollout(plan, toy(), [4, 9], seed=5, max_batch=max_batch, tape=6, **F64)
    torch.testing.assert_close(part.noise, whole.noise, rtol=0, atol=0)
    assert (part.leaves - whole.leaves).abs().max() <= 1e-13
    assert torch.equal(part.log_prob, whole.log_prob)


@pytest.mark.parametrize("name", RECIPES)
def test_noise_is_a_function_of_uid_not_of_order_or_process(name, toy):
    """Two simulated ranks and a permuted batch draw what the whole batch draws, bit for bit."""
    uids = [4, 9, 2]
    recipe = RECIPES[name]()

    def leaves(chosen):
        plan = recipe.plan(chosen, seed=5, iteration=3)
        still = toy()
        still.velocity = lambda x, sigma, prompt: 0.1 * x
        forest = rollout(plan, still, chosen, seed=5, iteration=3, **F64)
        owner = plan.prompt[plan.leaf]
        return {u: forest.leaves[torch.from_numpy(owner == i)] for i, u in enumerate(chosen)}

    whole, permuted = leaves(uids), leaves([2, 4, 9])
    ranks = leaves([4]) | leaves([9, 2])
    for uid in uids:
        assert torch.equal(whole[uid], permuted[uid])
        assert torch.equal(whole[uid], ranks[uid])
    assert not torch.equal(whole[4], whole[9])


def test_reference_and_cpp_grow_the_same_tree(toy):
    pytest.importorskip("branchcore._C", reason="the native library is not built")
    plan = plan_of("branch_grpo")
    trees = []
    for name in ("reference", "cpp"):
        with branchcore.use(name):
            trees.append(rollout(plan, toy(torch.float32), [4, 9], seed=5))
    assert (trees[0].x - trees[1].x).abs().max() <= 1e-5


def test_one_plan_of_mixed_methods_equals_each_alone(toy):
    plans = [plan_of(name, uids=(i,)) for i, name in enumerate(RECIPES)]
    plan = passes.concat(plans)
    uids = list(range(len(plans)))
    model = toy()
    model.velocity = lambda x, sigma, prompt: toy().velocity(x, sigma, 0 * prompt)
    together = rollout(plan, model, uids, seed=5, max_batch=9, **F64)
    for i, alone in enumerate(plans):
        forest = rollout(alone, model, [i], seed=5, **F64)
        mine = torch.from_numpy(plan.prompt[plan.leaf] == i)
        assert (together.leaves[mine] - forest.leaves).abs().max() <= 1e-13


@pytest.mark.parametrize("order", [2, 3])
def test_history_reaches_up_and_is_shared_by_siblings(order, toy, all_states):
    t = Tree()
    x = t.grow(t.roots(1), SG[1], euler)
    kids = t.grow(x, SG[2], dance_sde(0.3), children=3, train=True)
    t.leaf(t.chain(kids, SG[3:], dpmpp(order)))
    plan, model = t.plan(), toy()
    assert plan.history.sum() == 15
    assert (plan.older != 0).sum() == (12 if order == 3 else 0)
    forest = rollout(plan, model, [0], seed=1, **F64)
    exact, _ = all_states(plan, model, forest.noise)
    leaves = torch.stack([exact[int(i)] for i in np.flatnonzero(plan.leaf)])
    assert (forest.leaves - leaves).abs().max() <= 1e-12


def test_split_rollout_with_given_roots_equals_the_whole(toy):
    whole = Tree()
    mid = whole.chain(whole.roots(2), SG[1:4], dance_sde(0.3))
    end = whole.chain(mid, SG[4:], euler)
    whole.leaf(end)
    first = Tree()
    first.leaf(first.chain(first.roots(2), SG[1:4], dance_sde(0.3)))
    second = Tree()
    second.leaf(second.chain(second.given(2, SG[3]), SG[4:], euler))
    exact = rollout(whole.plan(), toy(), [3], seed=2, **F64)
    start = rollout(first.plan(noisy_leaves=True), toy(), [3], seed=2, **F64)
    rest = rollout(second.plan(), toy(), [3], seed=2, given=start.leaves[None], **F64)
    assert torch.equal(rest.leaves, exact.leaves)
    with pytest.raises(ValueError, match=r"given must be \(1, 2, 15\) or more rows, got None"):
        rollout(second.plan(), toy(), [3], seed=2, **F64)
    with pytest.raises(ValueError, match=r"given must be None without given roots, got \(2, 15\)"):
        rollout(first.plan(noisy_leaves=True), toy(), [3], seed=2, given=start.leaves, **F64)


def test_given_roots_keep_their_rows_when_some_are_dead_or_unshared(toy):
    def tree(children):
        t = Tree()
        x = t.given(3, 0.5)
        t.leaf(t.grow(t.grow(x[1:], 0.2, dance_sde(0.3), children=children), 0.0, euler))
        return t.plan()

    plan = passes.concat([tree(1), tree(2)])
    given = torch.arange(2 * 3 * 15.0, dtype=torch.float64).view(2, 3, 15)
    forest = rollout(plan, toy(), [0, 1], seed=0, given=given, **F64)
    apart = passes.unshare(plan)
    chains = rollout(apart.plan, toy(), [0, 1], seed=0, given=given, **F64)
    rank = torch.from_numpy((np.cumsum(plan.leaf) - 1)[apart.origin[apart.plan.leaf]])
    assert (chains.leaves - forest.leaves[rank]).abs().max() <= 1e-12
    still = toy()
    still.velocity = lambda x, sigma, prompt: 0 * x
    t = Tree()
    t.leaf(t.grow(t.given(3, 0.5)[1:], 0.0, euler))
    quiet = rollout(t.plan(), still, [0], seed=0, given=given[:1], **F64)
    assert torch.equal(quiet.leaves, given[0, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_velocities_of_any_float_dtype_run_on_fp32_states(dtype, toy):
    plan = plan_of("branchcore")
    whole = rollout(plan, toy(torch.float32), [4, 9], seed=5)
    model = toy(torch.float32)
    exact = model.velocity
    model.velocity = lambda x, sigma, prompt: exact(x, sigma, prompt).to(dtype)
    forest = rollout(plan, model, [4, 9], seed=5)
    assert forest.x.dtype == torch.float32
    assert (forest.leaves - whole.leaves).abs().max() < 0.1
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got"):
        rollout(plan, model, [4, 9], seed=5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="tape must be >= 0 nodes, got -1"):
        rollout(plan, model, [4, 9], seed=5, tape=-1)


def test_a_plan_of_roots_alone_needs_no_model():
    t = Tree()
    t.leaf(t.roots(3))
    forest = rollout(t.plan(noisy_leaves=True), Broken(None), [0], seed=0)
    assert forest.leaves.shape == (3, 15)


def test_sibling_noise_golden_case_7(toy):
    """Var 1, Cov 1/(1 + s^2), and identical siblings at s = 0."""
    for s in (0.0, 1.0, 4.0):
        t = Tree()
        x = t.grow(t.roots(1), 0.5, dance_sde(1.0), children=2, correlate=s)
        t.leaf(t.grow(x, 0.0, euler))
        plan = t.plan(merge=False)
        noise = rollout(plan, toy(), [0], seed=0, **F64).noise
        eps = branchcore.ops.philox_normal(forests.noise_rows(noise, 1, 3), 200_000, torch.float64)
        assert eps.var(1).tolist() == pytest.approx([1, 1], abs=0.02)
        assert float((eps[0] * eps[1]).mean()) == pytest.approx(1 / (1 + s * s), abs=0.01)
        assert torch.equal(eps[0], eps[1]) == (s == 0.0)


def test_log_prob_is_the_density_of_the_drawn_noise(toy):
    plan = plan_of("branch_grpo")
    forest = rollout(plan, toy(), [4, 9], seed=5, **F64)
    sde = np.flatnonzero(plan.stochastic)
    eps = branchcore.ops.philox_normal(forest.noise, 15, torch.float64).numpy()
    wanted = -0.5 * (eps[sde] ** 2).mean(1) - np.log(plan.row[sde, 3]) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(forest.log_prob.numpy()[sde], wanted, atol=1e-13)
    assert not forest.log_prob.numpy()[~plan.stochastic & (plan.parent >= 0)].any()


class Broken:
    latent_shape = (3, 5)

    def __init__(self, result):
        self.result = result

    def velocity(self, x, sigma, prompt):
        return self.result(x, sigma)


def poisoned(x, sigma):
    return torch.where((sigma < 0.5)[:, None, None], torch.full_like(x, torch.nan), x)


NOT_FINITE = (
    r"must be finite, got NaN or Inf at node \d+ \(depth 7, sigma 0\.3, prompt 0\) and \d+ m"
)
FLOATS = "velocity: result must be a float tensor, got "
SHAPE = r"velocity: result must be \(2, 3, 5\), got \(2, 2, 5\)"


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (poisoned, FloatingPointError, NOT_FINITE),
        (lambda x, _: x[:, :2], ValueError, SHAPE),
        (lambda x, _: x.long(), TypeError, FLOATS + "torch.int64"),
        (lambda x, _: None, TypeError, FLOATS + "NoneType"),
    ],
)
def test_broken_models_are_named(result, error, message):
    with pytest.raises(error, match=message):
        rollout(plan_of("branch_grpo"), Broken(result), [4, 9], seed=0)


def test_wrong_uids_and_frozen_tape(toy):
    plan = plan_of("branchcore")
    with pytest.raises(ValueError, match=r"uids must be \(2,\), got \(1,\)"):
        rollout(plan, toy(), [1], seed=0)
    with pytest.raises(ValueError, match=r"uids must be in \[0, 2\*\*31\), got -1 to 9"):
        rollout(plan, toy(), [-1, 9], seed=0)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*32\), got -5"):
        rollout(plan, toy(), [4, 9], seed=-5)
    model = toy()
    model.module.requires_grad_(False)
    with pytest.raises(ValueError, match="velocity must be differentiable for the tape"):
        rollout(plan, model, [4, 9], seed=0, tape=1, **F64)
