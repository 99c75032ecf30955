"""The update: every way to compute a gradient equals the naive per-edge one; ratio 1 on policy."""

import dataclasses

import numpy as np
import pytest
import torch

from branchcore import ops, recipes, schedule
from branchcore.forest import noise_rows
from branchcore.gradient import gradient, live_edges
from branchcore.objective import ClippedRatio
from branchcore.rollout import rollout
from branchcore.steps import cps, dance_sde, euler, renoise
from branchcore.tree import Tree

F64 = {"dtype": torch.float64}
SG = schedule.shifted_linear(8, 3)
RECIPES = {
    "branch_grpo": recipes.branch_grpo(SG, splits=(0, 2, 4)),
    "branch_mix": recipes.branch_mix(SG, splits=(0, 2), window=2),
    "branchcore": recipes.branchcore(SG, splits=(1, 3), branching=(3, 2)),
    "dance_grpo": recipes.dance_grpo(SG, group=5),
    "flow_grpo": recipes.flow_grpo(SG, group=4, kl=0.0),
    "amplified": recipes.branch_grpo(SG, splits=(0, 3), correlate=None, amplify=4.0),
}
ALL = 10**6


def setting(name):
    recipe = RECIPES[name]
    plan = recipe.plan([4, 9], seed=5, iteration=3)
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(int(plan.leaf.sum()), 2))
    advantage = recipe.credit(plan, rewards, np.array([1.0, 0.5]), np.zeros(len(plan))).advantage
    weight = rng.choice([0.0, 1.0, 2.5], size=len(plan))
    return recipe, plan, advantage, weight


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", RECIPES)
def test_all_ways_equal_the_naive_gradient(name, toy, naive, all_states):
    recipe, plan, advantage, weight = setting(name)
    model = toy()
    forest = rollout(plan, model, [4, 9], seed=5, iteration=3, **F64)
    x, v = all_states(plan, model, forest.noise)
    naive(forest, model, advantage, weight, recipe.objective.clip, x, v)
    exact = model.gradient()
    ways = {
        "shared": {"tape": 0},
        "mixed-step packs": {"tape": 0, "max_batch": 7},
        "batch 1": {"tape": 0, "max_batch": 1},
        "tape": {"tape": ALL},
        "tape in chunks": {"tape": ALL, "max_batch": 3},
        "tape and recomputed": {"tape": 5, "max_batch": 4},
        "rollout": {"tape": 0, "anchor": "rollout"},
        "tape and rollout": {"tape": 5, "anchor": "rollout"},
    }
    for way, options in ways.items():
        model.zero_grad()
        anchor, batch = options.get("anchor", "auto"), options.get("max_batch")
        forest = rollout(
            plan, model, [4, 9], seed=5, iteration=3, tape=options["tape"], max_batch=batch,
            keep_velocity=True, **F64,
        )  # fmt: skip
        stats = gradient(
            forest, model, advantage, weight, recipe.objective, anchor=anchor, max_batch=batch
        )
        assert relative(model.gradient(), exact) <= 1e-12, way
        if anchor != "rollout":
            assert float(stats.ratio.max_abs_dev) == 0.0
        assert not forest.tape


@pytest.mark.parametrize("ratio", ["gaussian", "guard", "cps"])
@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_after_an_update_the_ratio_is_the_published_one(ratio, clip, toy, all_states):
    """Published log-probs of each family, batch 1 per edge, against (p, q) at changed weights."""
    _, plan, advantage, weight = setting("branch_grpo")
    model = toy()
    forest = rollout(plan, model, [4, 9], seed=5, iteration=3, keep_velocity=True, **F64)
    x, v_old = all_states(plan, model, forest.noise)
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(1e-2 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))
    edges = plan.trained()
    total = torch.zeros((), dtype=torch.float64)
    for e in edges:
        n, (a, b, _, s) = int(plan.parent[e]), plan.row[e]
        eps = ops.philox_normal(noise_rows(forest.noise, int(e), int(e) + 1), 15, torch.float64)[0]
        child = a * x[n] + b * v_old[n] + s * eps
        sigma, prompt = torch.tensor([plan.sigma[n]]), torch.tensor([int(plan.prompt[n])])
        v = model.velocity(x[n].view(1, 3, 5), sigma, prompt).flatten()
        new, old = ((child - a * x[n] - b * u) ** 2 for u in (v, v_old[n]))
        if ratio == "cps":
            log_ratio = -new.mean() + old.mean()
        else:
            log_ratio = ((old - new) / (2 * s**2)).mean()
        if ratio == "guard":
            log_ratio = s * (log_ratio + ((b * (v - v_old[n])) ** 2).mean() / (2 * s**2))
        r = log_ratio.exp()
        low, high = (
            torch.minimum(r, r.clamp(1 - clip, 1 + clip)),
            torch.maximum(r, r.clamp(1 - clip, 1 + clip)),
        )
        total = total + weight[e] * (-advantage[e, 0] * low + advantage[e, 1] * high)
    (total / len(edges)).backward()
    exact = model.gradient()
    model.zero_grad()
    objective = ClippedRatio(ratio=ratio, clip=(clip, clip))
    stats = gradient(forest, model, advantage, weight, objective, anchor="rollout", max_batch=6)
    assert relative(model.gradient(), exact) <= 1e-9
    assert float(stats.loss) == pytest.approx(float(total.detach()) / len(edges), abs=1e-12)
    assert float(stats.ratio.max_abs_dev) > 1e-5


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 11, 40, None])
@pytest.mark.parametrize("tape", [0, ALL])
def test_ratio_is_exactly_one_on_policy_at_any_batch_fp32(max_batch, tape, toy):
    recipe, plan, advantage, weight = setting("branch_grpo")
    model = toy(torch.float32)
    forest = rollout(plan, model, [4, 9], seed=5, tape=tape, max_batch=max_batch)
    stats = gradient(forest, model, advantage, weight, recipe.objective, max_batch=max_batch)
    assert float(stats.ratio.max_abs_dev) == 0.0
    assert float(stats.ratio.sum_log_ratio_sq) == 0.0
    assert float(stats.ratio.edges) == len(live_edges(plan, advantage, weight, recipe.objective, 0))


def test_log_ratio_error_after_an_update_at_65536_elements():
    """fp32 states and velocities, v changed by 0.5 %: the log ratio against float64."""
    d, rng = 65_536, torch.Generator().manual_seed(0)
    t = Tree()
    t.leaf(t.grow(t.grow(t.roots(1), 0.9, dance_sde(0.3), children=4, train=True), 0.0, euler))
    plan = t.plan()
    model = type("Wide", (), {"latent_shape": (d,), "velocity": lambda _s, x, sigma, p: 0.3 * x})()
    forest = rollout(plan, model, [0], seed=0)
    v_old = torch.randn(1, d, generator=rng)
    v = v_old + 5e-3 * torch.randn(1, d, generator=rng)
    start = torch.tensor([0, 4])
    noise = noise_rows(forest.noise, 1, 5)
    exponent = ClippedRatio().exponent(plan.row[1:5])
    p, q = ops.edge_dots(v, v_old, start, noise)
    got = exponent[:, 0] * p.double().numpy() - exponent[:, 1] * float(q.double())
    eps = ops.philox_normal(noise, d, torch.float64)
    diff = v.double() - v_old.double()
    exact = exponent[:, 0] * (diff * eps).mean(1).numpy() - exponent[:, 1] * float((diff**2).mean())
    assert np.abs(exact).max() > 1e-6
    assert np.abs(got - exact).max() <= 1e-9


@pytest.mark.parametrize("form", ["gaussian", "flow_grpo", "velocity"])
def test_kl_to_the_reference(form, toy, all_states):
    recipe, plan, advantage, weight = setting("branch_mix")
    model = toy()
    objective = ClippedRatio(clip=recipe.objective.clip, kl=0.3, kl_form=form)
    forest = rollout(plan, model, [4, 9], seed=5, iteration=3, tape=4, **F64)
    x, _ = all_states(plan, model, forest.noise)
    stats = gradient(forest, model, 0 * advantage, weight, objective, max_batch=5)
    got = model.gradient()
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    edges = plan.trained()
    for e in edges:
        n, (_, b, _, s) = int(plan.parent[e]), plan.row[e]
        at = x[n].view(1, 3, 5), torch.tensor([plan.sigma[n]]), torch.tensor([int(plan.prompt[n])])
        q = (model.velocity(*at) - model.reference_velocity(*at).detach()).square().mean()
        dt = plan.sigma[n] - plan.sigma[e]
        factor = {"gaussian": b**2 / (2 * s**2), "flow_grpo": b**2 * dt / (2 * s**2), "velocity": 1}
        total = total + weight[e] * 0.3 * factor[form] * q
    (total / len(edges)).backward()
    assert relative(got, model.gradient()) <= 1e-12
    assert float(stats.kl) == pytest.approx(float(total.detach()) / len(edges), rel=1e-12)


def test_dead_weight_costs_no_forward_golden_cases_13_and_19(toy):
    sg = schedule.shifted_linear(20, 3)
    for splits, tape in (((9, 12, 15, 18), 0), ((9, 12, 15, 18), ALL), ((0, 3, 6, 9), 0)):
        recipe = recipes.branch_grpo(sg, splits=splits, last_step="sde")
        plan = recipe.plan([0], seed=0, iteration=0)
        model = toy()
        forest = rollout(plan, model, [0], seed=0, tape=tape, **F64)
        rewards = forest.leaves.mean(1, keepdim=True).numpy()
        advantage = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
        model.rows.clear()
        stats = gradient(forest, model, advantage, np.ones(len(plan)), recipe.objective)
        silent = plan.depth <= (9 if splits[0] == 9 else 0)
        assert not advantage[silent].any()
        parents = np.unique(plan.parent[plan.train & ~silent])
        assert stats.parents == len(parents)
        assert sum(model.rows) == (0 if tape else len(parents))
    assert stats.parents == 203
    assert recipes.branch_grpo(sg).plan([0], seed=0, iteration=0).counts().trained_parents == 187


def test_zero_weight_costs_nothing_and_pruning_keeps_the_rest(toy):
    recipe, plan, advantage, _ = setting("branch_grpo")
    model = toy()
    weight = np.where(plan.depth > 5, 0.0, 1.0)
    forest = rollout(plan, model, [4, 9], seed=5, iteration=3, **F64)
    model.rows.clear()
    gradient(forest, model, advantage, weight, recipe.objective)
    kept = plan.train & (weight > 0) & advantage.any(1)
    assert sum(model.rows) == len(np.unique(plan.parent[kept]))
    model.zero_grad()
    stats = gradient(forest, model, advantage, 0 * weight, recipe.objective)
    assert (stats.parents, float(stats.loss)) == (0, 0.0)
    assert all(p.grad is None for p in model.module.parameters())


def test_normaliser_is_the_planned_edges(toy):
    recipe, plan, advantage, weight = setting("branch_grpo")
    grads = []
    for planned in (None, 10):
        model = toy()
        forest = rollout(plan, model, [4, 9], seed=5, iteration=3, **F64)
        gradient(forest, model, advantage, weight, recipe.objective, num_planned=planned)
        grads.append(model.gradient())
    assert relative(grads[1], grads[0] * len(plan.trained()) / 10) <= 1e-13


def test_sibling_permutation_and_reward_sign_golden_case_20(toy):
    recipe = recipes.branch_grpo(SG, splits=(0, 2))
    plan = recipe.plan([1], seed=0, iteration=0)
    model = toy()
    forest = rollout(plan, model, [1], seed=0, **F64)
    rewards = forest.leaves.mean(1, keepdim=True).numpy()
    nothing = np.zeros(len(plan))
    plus = recipe.credit(plan, rewards, np.ones(1), nothing).advantage
    minus = recipe.credit(plan, -rewards, np.ones(1), nothing).advantage
    np.testing.assert_array_equal(plus, minus[:, ::-1])
    ones = np.ones(len(plan))
    gradient(forest, model, plus, ones, recipe.objective)
    exact = model.gradient()
    mirror = np.arange(len(plan))
    for lo, hi in plan.levels():
        mirror[lo:hi] = np.roll(mirror[lo:hi], (hi - lo) // 2)
    swapped = dataclasses.replace(plan, stream=plan.stream[mirror])
    model.zero_grad()
    forest = rollout(swapped, model, [1], seed=0, **F64)
    rewards = forest.leaves.mean(1, keepdim=True).numpy()
    again = recipe.credit(swapped, rewards, np.ones(1), nothing).advantage
    np.testing.assert_allclose(again, plus[mirror], atol=1e-9)
    assert np.abs(again - plus).max() > 0.1
    gradient(forest, model, again, ones, recipe.objective)
    assert relative(model.gradient(), exact) <= 1e-9


def test_causality_golden_case_17(toy):
    """The noise of an edge changes only the leaves below it."""
    plan = recipes.branch_grpo(SG, splits=(0, 2)).plan([1], seed=0, iteration=0)
    base = rollout(plan, toy(), [1], seed=0, **F64).leaves
    for edge in (1, 5, 9):
        streams = plan.stream.copy()
        streams[edge, 0] = 999
        other = rollout(dataclasses.replace(plan, stream=streams), toy(), [1], seed=0, **F64).leaves
        below = np.zeros(len(plan), dtype=bool)
        below[edge] = True
        for lo, hi in plan.levels()[1:]:
            below[lo:hi] |= below[plan.parent[lo:hi]]
        changed = (other != base).any(1).numpy()
        np.testing.assert_array_equal(changed, below[plan.leaf])


@pytest.mark.parametrize(("density", "variance"), [(1.0, 16.0), (4.0, 1 / 16)])
def test_score_of_amplified_noise_golden_case_16(density, variance, toy):
    """Noise drawn at std 4 s: the official density (std s) has score variance 16/s^2, the right
    one (std 4 s) has 1/(4 s)^2; both from the op's own gradient."""
    t = Tree()
    x = t.grow(t.roots(1), 0.9, dance_sde(0.3), children=2, amplify=4.0, train=True)
    t.leaf(t.grow(x, 0.0, euler))
    plan = t.plan()
    d = 100_000
    model = type("Still", (), {"latent_shape": (d,), "velocity": lambda _s, x, *_: 0 * x})()
    forest = rollout(plan, model, [0], seed=0, **F64)
    root = ops.philox_normal(noise_rows(forest.noise, 0, 1), d, torch.float64)
    row = torch.from_numpy(plan.row[1:3]).clone()
    start, none = torch.tensor([0, 2]), torch.zeros(1, d, dtype=torch.float64)
    noise = noise_rows(forest.noise, 1, 3)
    child = ops.branch_step(root, none, row, start, noise).y_MD
    v = none.clone().requires_grad_()
    _, b, _, s = row[0].tolist()
    row[:, 3] *= density
    ops.sde_log_prob(root, v, child, row, start)[0].backward()
    score = v.grad[0] * d / b
    assert float(score.var()) == pytest.approx(variance / s**2, rel=0.02)
    assert abs(float(score.mean())) < 0.02 * float(score.std())
    dots = none.clone().requires_grad_()
    ops.edge_dots(dots, None, start, noise).p_E[0].backward()
    if density == 1.0:
        torch.testing.assert_close(b / s * dots.grad, v.grad, rtol=1e-9, atol=1e-15)


def test_later_updates_need_velocities_and_matching_edges_an_objective_of_their_own(toy):
    recipe = recipes.dance_grpo(SG, group=4, updates=2)
    plan = recipe.plan([0], seed=0, iteration=0)
    model = toy()
    ones = np.ones(len(plan))
    advantage = np.stack([ones, 0 * ones], 1)
    forest = rollout(plan, model, [0], seed=0, keep_velocity=False, **F64)
    with pytest.raises(ValueError, match="anchor 'rollout' needs stored velocities"):
        gradient(forest, model, advantage, ones, recipe.objective, update=1)
    with pytest.raises(ValueError, match="anchor must be 'rollout' after an update, got update 1"):
        gradient(forest, model, advantage, ones, recipe.objective, update=1, anchor="detach")
    forest = rollout(plan, model, [0], seed=0, **F64)
    a, b = (gradient(forest, model, advantage, ones, recipe.objective, update=u) for u in (0, 1))
    assert int(a.ratio.edges) + int(b.ratio.edges) == plan.counts().trained_edges
    t = Tree()
    x = t.leaf(t.grow(t.roots(2), 0.0, euler))
    t.grow(x, 0.5, renoise, train=True)
    plan = t.plan()
    assert (plan.action[plan.train] == np.flatnonzero(plan.train)).all()
    forest = rollout(plan, model, [0], seed=0, **F64)
    ones = np.ones(len(plan))
    with pytest.raises(ValueError, match=r"must be sampling steps \(b != 0\) for ClippedRatio"):
        gradient(forest, model, np.stack([ones, ones], 1), ones, ClippedRatio())


@pytest.mark.parametrize(
    ("advantage", "weight", "message"),
    [
        ((3, 2), (5,), r"advantage_M2 must be \(\d+, 2\), got \(3, 2\)"),
        (None, (5,), r"weight_M must be \(\d+,\), got \(5,\)"),
        (-1.0, None, r"advantage_M2 must be finite and >= 0, got -1.0 at 0"),
        (None, np.nan, r"weight_M must be finite and >= 0, got nan at 0"),
    ],
)
def test_gradient_refuses_bad_edge_arrays(advantage, weight, message, toy):
    recipe, plan, *good = setting("branch_mix")
    model = toy()
    forest = rollout(plan, model, [4, 9], seed=5, iteration=3, **F64)
    arrays = [
        g if a is None else np.zeros(a) if isinstance(a, tuple) else np.full(g.shape, a)
        for a, g in zip((advantage, weight), good, strict=True)
    ]
    with pytest.raises(ValueError, match=message):
        gradient(forest, model, *arrays, recipe.objective)


def test_cps_and_dance_steps_mix_in_one_micro_batch(toy):
    t = Tree()
    root = t.roots(1)
    for step in (cps(0.8), dance_sde(0.3)):
        t.leaf(t.grow(t.grow(root, 0.5, step, children=2, train=True), 0.0, euler))
    plan, model = t.plan(), toy()
    forest = rollout(plan, model, [0], seed=0, **F64)
    model.rows.clear()
    advantage = np.tile([1.0, 0.0], (len(plan), 1))
    stats = gradient(forest, model, advantage, np.ones(len(plan)), ClippedRatio())
    assert (stats.parents, model.rows) == (1, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "ppo"}, "ratio must be gaussian, guard or cps, got 'ppo'"),
        ({"clip": (0.0, 1.0)}, "clip must be two positive numbers"),
        ({"kl": -1.0}, "kl must be finite and >= 0, got -1.0"),
        ({"kl_form": "k3"}, "kl_form must be gaussian, flow_grpo or velocity, got 'k3'"),
    ],
)
def test_objective_refuses_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        ClippedRatio(**options)
