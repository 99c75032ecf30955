"""Pruning in the engine: exact expectations, masks, what runs and what does not, reports."""

import itertools
import json

import numpy as np
import pytest
import torch

from branchcore import recipes, schedule, unbiased
from branchcore.credit import EdgeCredit
from branchcore.gradient import live_edges
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.rollout import rollout
from branchcore.stages import Batch, accumulate

SG = schedule.shifted_linear(6, 3)
PROMPTS = ["a", "b", "c", "d", "e"]


def grown(recipe, model, uids=(4, 9), tape=0, iteration=3, **options):
    """A credited batch in float64."""
    plan = recipe.plan(list(uids), seed=5, iteration=iteration)
    view = model.with_prompts([PROMPTS[uid % 5] for uid in uids])
    forest = rollout(
        plan, view, list(uids), seed=5, iteration=iteration, tape=tape, dtype=torch.float64,
        **options,
    )  # fmt: skip
    # other batch shapes round otherwise
    rewards = forest.leaves.mean(1, keepdim=True).numpy().round(9)
    credit = recipe.credit(plan, rewards, np.ones(1), forest.log_prob.numpy())
    weight = recipe.prune(plan, credit.value, iteration)
    return Batch(forest, view, None, credit, weight, tuple(uids))


def gradient_of(batch, recipe, model, weight, **options):
    model.zero_grad()
    stats = accumulate(batch._replace(weight=weight), recipe, **options)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.module.parameters()]
    return torch.cat([p.flatten() for p in parts]), stats


def tree(**options):
    return recipes.branchcore(SG, splits=(0, 2), clip=0.5, kl=0.3, **options)


EXACT = {
    "threshold": (tree, {"rule": "threshold", "rate": 0.6}),
    "threshold max": (tree, {"rule": "threshold", "rate": 0.6, "score": "max"}),
    "uniform": (tree, {"rule": "uniform", "rate": 0.4}),
    "optimal": (tree, {"rule": "optimal", "rate": 0.5, "floor": 0.05}),
    "history": (tree, {"rule": "history", "rate": 0.5}),
    "fixed": (tree, {"rule": "uniform", "rate": 0.5, "draw": "fixed"}),
    "matching": (
        lambda: recipes.awm(SG, group=3, times=2, kl=0.1),
        {"rule": "optimal", "rate": 0.5},
    ),
    "coupled": (lambda: recipes.dgpo(SG, group=3), {"rule": "uniform", "rate": 0.4}),
}


@pytest.mark.parametrize("kind", EXACT)
def test_the_mean_over_all_masks_is_the_full_gradient(kind, toy, monkeypatch):
    build, options = EXACT[kind]
    recipe, model = build(), toy()
    batch = grown(recipe, model, uids=(4,))
    full, _ = gradient_of(batch, recipe, model, batch.weight)
    pruning = Pruning(PruningConfig(**options), recipe, 5)
    units = unbiased.trained_units(batch.forest.plan, 0, recipe.objective.together)
    count = len(units.node)
    assert 2 <= count <= 8
    coins = {"now": np.zeros(count)}
    monkeypatch.setattr(unbiased, "unit_coins", lambda *a, **k: coins["now"])
    everything = pruning.weights(batch, iteration=3).weight
    p = np.ones(count)
    p[units.owner] = batch.weight[units.edges] / np.maximum(everything[units.edges], 1.0)
    if kind == "fixed":
        draws = [(np.array(order) / count, None) for order in itertools.permutations(range(count))]
        draws = [(coin, 1 / len(draws)) for coin, _ in draws]
    else:
        masks = itertools.product(*((True, False) if x < 1 else (True,) for x in p))
        draws = [
            (np.where(kept, 0.0, 1 - 2.0**-53), np.prod(np.where(kept, p, 1 - p)))
            for kept in map(np.array, masks)
        ]
    assert sum(chance for _, chance in draws) == pytest.approx(1.0)
    assert len(draws) >= 2
    known, total, naive = {}, torch.zeros_like(full), torch.zeros_like(full)
    for coin, chance in draws:
        coins["now"] = coin
        weight = pruning.weights(batch, iteration=3).weight
        if weight.tobytes() not in known:
            pair = [gradient_of(batch, recipe, model, w)[0] for w in (weight, np.sign(weight))]
            known[weight.tobytes()] = pair
        total += chance * known[weight.tobytes()][0]
        naive += chance * known[weight.tobytes()][1]
    assert float((total - full).norm() / full.norm()) <= 1e-12
    assert float((naive - full).norm() / full.norm()) > 1e-3


@pytest.mark.parametrize(
    "options", [{"rule": "threshold", "rate": 0.7}, {"rule": "optimal", "rate": 0.5}]
)
def test_many_draws_on_a_real_tree(options, toy):
    """Mean within 4 standard errors, variance within 10 % of the formula."""
    recipe = recipes.branch_grpo(SG, splits=(0, 1, 2, 3), clip=0.5, kl=0.1)
    model = toy()
    batch = grown(recipe, model)
    units = unbiased.trained_units(batch.forest.plan)
    parts = []
    for unit in range(len(units.node)):
        one = np.zeros_like(batch.weight)
        one[units.edges[units.owner == unit]] = 1.0
        parts.append(gradient_of(batch, recipe, model, one)[0].numpy())
    parts = np.stack(parts)
    full, _ = gradient_of(batch, recipe, model, batch.weight)
    np.testing.assert_allclose(parts.sum(0), full, rtol=1e-9, atol=1e-15)
    pruning = Pruning(PruningConfig(**options), recipe, 5)
    draws, first = 1000, np.zeros(len(units.node), int)
    first[units.owner[::-1]] = units.edges[::-1]
    weights = np.stack([pruning.weights(batch, iteration=i).weight[first] for i in range(draws)])
    p = 1 / weights.max(0)
    estimate = weights @ parts
    formula = unbiased.added_variance(p, (parts**2).sum(1))
    error = np.linalg.norm(estimate.mean(0) - full.numpy())
    assert 0 < error < 4 * np.sqrt(formula / draws)
    measured = ((estimate - full.numpy()) ** 2).sum(1).mean()
    assert measured == pytest.approx(formula, rel=0.1)


def test_masks_are_of_the_prompt_and_the_pass_alone(toy):
    recipe = recipes.dance_grpo(SG, group=4, clip=0.5)
    for options in (
        {"rule": "uniform", "rate": 0.5},
        {"rule": "threshold", "rate": 0.5},
        {"rule": "optimal", "rate": 0.5},
        {"rule": "uniform", "rate": 0.5, "draw": "fixed"},
    ):
        pruning = Pruning(PruningConfig(**options), recipe, 5)

        def masks(uids, pruning=pruning, **where):
            batch = grown(recipe, toy(), uids)
            weight = pruning.weights(batch, **{"iteration": 3, **where}).weight
            plan = batch.forest.plan
            return {uid: weight[plan.prompt == i] for i, uid in enumerate(uids)}

        whole = masks((4, 9, 12))
        for uids in ((9, 12, 4), (12,), (4, 9)):
            for uid, weight in masks(uids).items():
                np.testing.assert_array_equal(weight, whole[uid])
        assert any((w == 0).any() for w in whole.values())
        for other in ({"inner": 1}, {"inner": 2}, {"iteration": 4}):
            again = masks((4, 9, 12), **other)
            assert any((again[u] != whole[u]).any() for u in whole), other


def test_pruned_parents_run_no_forward_and_untaped_ones_no_backward(toy):
    recipe = recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5)
    model = toy()
    rules = ({"rule": "threshold", "rate": 0.7}, {"rule": "optimal", "rate": 0.6})
    early = {"rule": "uniform", "rate": 0.5}, {"rule": "history", "rate": 0.5}
    for options in (*rules, *early, {"rule": "first_steps", "rate": 0.5}):
        pruning = Pruning(PruningConfig(**options), recipe, 5)
        batch = pruning.weigh(grown(recipe, model), {4: 1.0, 9: 1.0})
        plan = batch.forest.plan
        weight, sums = pruning.weights(batch, iteration=3)
        kept = live_edges(plan, batch.credit.advantage, weight, recipe.objective, 0)
        parents = np.unique(plan.parent[kept])
        exact, _ = gradient_of(batch, recipe, model, weight)
        model.rows.clear()
        got, stats = gradient_of(batch, recipe, model, weight)
        assert sum(model.rows) == stats.parents == len(parents) == sums.kept
        assert sums.parents - sums.kept > 0
        ahead = pruning.ahead(plan, (4, 9), 3)
        assert pruning.late == (options["rule"] in ("threshold", "optimal"))
        if pruning.late:
            assert ahead is None
            continue
        taped = grown(recipe, model, tape=10**6, off_tape=ahead)
        taped = pruning.weigh(taped, {4: 1.0, 9: 1.0})
        on_tape = np.concatenate([part.nodes for part in taped.forest.tape])
        np.testing.assert_array_equal(
            np.sort(on_tape),
            np.setdiff1d(np.unique(plan.parent[plan.train]), np.flatnonzero(ahead)),
        )
        assert not np.isin(np.flatnonzero(ahead), parents).any()
        model.rows.clear()
        got, _ = gradient_of(taped, recipe, model, pruning.weights(taped, iteration=3).weight)
        assert sum(model.rows) == 0
        assert float((got - exact).norm() / exact.norm()) <= 1e-12


def test_what_a_pass_reports(toy):
    recipe = recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5)
    batch = grown(recipe, toy())
    plan = batch.forest.plan
    pruning = Pruning(PruningConfig(rule="threshold", rate=0.7), recipe, 5)
    weight, sums = pruning.weights(batch, iteration=3)
    edges = plan.trained()
    live = batch.credit.advantage[edges].any(1)
    owners, first = np.unique(plan.parent[edges[live]], return_index=True)
    w = weight[edges[live][first]]
    got = sums.metrics()
    assert got["kept_share"] == (w > 0).mean()
    assert got["parents_saved"] == (w == 0).sum()
    assert got["effective_parents"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    score = np.array(
        [batch.credit.advantage[edges[plan.parent[edges] == n]].sum(1).mean() for n in owners]
    )
    every = np.unique(plan.parent[edges])
    mean = {
        q: np.mean(
            [
                batch.credit.advantage[edges[plan.parent[edges] == n]].sum(1).mean()
                for n in every
                if plan.prompt[n] == q
            ]
        )
        for q in (0, 1)
    }
    p = np.array(
        [
            0.3 if s < mean[plan.prompt[n]] * (1 - 1e-6) else 1
            for n, s in zip(owners, score, strict=True)
        ]
    )
    assert got["expected_share"] == pytest.approx(p.mean())
    lin = recipe.objective.exponent(plan.row[edges])[:, 0] * batch.credit.advantage[edges].sum(1)
    sign = np.sign(batch.credit.advantage[edges] @ [1.0, -1.0])
    part = (lin * sign)[:, None] * plan.mix[edges]
    norm2 = np.array(
        [
            (part[plan.parent[edges] == n, 0] ** 2).sum()
            + part[plan.parent[edges] == n, 1].sum() ** 2
            for n in owners
        ]
    )
    assert got["added_variance"] == pytest.approx(((1 / p - 1) * norm2).sum() / norm2.sum())
    with pytest.raises(ValueError, match=r"uids must be \(2,\), got \(0,\)"):
        pruning.weights(batch._replace(uids=()), iteration=3)
    assert Pruning(PruningConfig(), recipe, 5).weights(batch, iteration=3).weight is batch.weight
    nothing = Pruning(PruningConfig(rule="optimal"), recipe, 5).weights(batch, iteration=3)
    assert nothing.sums.metrics() | {"prompts_share": 1.0} == {
        "prompts_share": 1.0, "kept_share": 1.0, "expected_share": 1.0,
        "effective_parents": pytest.approx(len(owners)), "added_variance": 0.0, "parents_saved": 0,
    }  # fmt: skip


def test_the_mean_over_prompt_coins_is_the_full_gradient(toy):
    recipe, model = tree(), toy()
    pruning = Pruning(PruningConfig(prompts=0.6), recipe, seed=2)
    batch = grown(recipe, model, (0, 1, 2))
    full, _ = gradient_of(batch, recipe, model, batch.weight)
    planned = len(batch.forest.plan.trained())
    total = torch.zeros_like(full)
    for kept in itertools.chain.from_iterable(itertools.combinations((0, 2), n) for n in range(3)):
        uids = tuple(sorted((1, *kept)))
        part = grown(recipe, model, uids)
        part = pruning.weigh(part, {uid: 1.0 if uid == 1 else 2.5 for uid in uids})
        one, _ = gradient_of(part, recipe, model, part.weight, num_planned=planned)
        total += 0.4 ** len(kept) * 0.6 ** (2 - len(kept)) * one
    assert float((total - full).norm() / full.norm()) <= 1e-12


def test_history_is_a_running_mean_of_the_advantages(toy):
    recipe = tree()
    pruning = Pruning(PruningConfig(prompts=0.5), recipe, seed=2)
    batch = grown(recipe, toy(), (0, 2))
    plan = batch.forest.plan
    size = batch.credit.advantage.sum(1)
    now = [size[plan.train & (plan.prompt == q)].mean() for q in (0, 1)]
    indices = np.array([7, 8, 9])
    pruning.remember(indices, [batch])
    assert pruning.past.means["prompts"] == pytest.approx({7: now[0], 9: now[1]})
    credit = EdgeCredit(3.0 * batch.credit.advantage, batch.credit.value)
    pruning.remember(indices, [batch._replace(credit=credit)])
    assert pruning.past.means["prompts"] == pytest.approx({7: 2 * now[0], 9: 2 * now[1]})
    again = Pruning(PruningConfig(prompts=0.5), recipe, seed=2)
    again.load(json.loads(json.dumps(pruning.state())), "state.json")
    assert again.past.means["prompts"] == pruning.past.means["prompts"]


def test_a_biased_pruner_by_name_and_a_cap(toy):
    recipe = recipes.flow_grpo(SG, group=4, kl=0.0)
    batch = grown(recipe, toy())
    pruning = Pruning(PruningConfig(rule="cppo", rate=0.5), recipe, 5)
    weighed = pruning.weigh(batch, dict.fromkeys((4, 9), 1.0))
    assert weighed.weight[batch.forest.plan.leaf].sum() == 4
    sums = pruning.weights(weighed, iteration=3).sums.metrics()
    assert sums["kept_share"] == pytest.approx(0.5, abs=0.15)
    assert sums["added_variance"] == 0.0
    capped = PruningConfig(rule="uniform", rate=0.75, cap=2.0, biased=True)
    weight = Pruning(capped, recipe, 5).weights(batch, iteration=3).weight
    assert set(weight[batch.forest.plan.train]) == {0.0, 2.0}


def test_coins_multiply_what_a_recipe_prunes_and_spend_only_on_the_rest(toy):
    recipe = recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5, kl=0.1, pruning="parent_top1")
    batch = grown(recipe, toy())
    plan = batch.forest.plan
    pruning = Pruning(PruningConfig(rule="optimal", rate=0.5), recipe, 5)
    batch = pruning.weigh(batch, {4: 1.0, 9: 2.0})
    left = batch.weight > 0
    assert not left[plan.train].all()
    many = [pruning.weights(batch, iteration=i) for i in range(80)]
    weight = np.stack([w.weight for w in many])
    assert not weight[:, ~left].any()
    p = np.where(left, batch.weight / np.where(left, weight.max(0), 1.0), 0.0)
    parents, first = np.unique(plan.parent[plan.train & left], return_index=True)
    kept = p[np.flatnonzero(plan.train & left)[first]]
    assert kept.sum() == pytest.approx(len(parents) / 2)
    assert many[0].sums.expected == pytest.approx(len(parents) / 2)
    assert many[0].sums.parents == len(np.unique(plan.parent[plan.train]))


def test_a_budget_below_one_parent_is_refused(toy):
    recipe = tree()
    batch = grown(recipe, toy())
    count = len(unbiased.trained_units(batch.forest.plan).node) // 2
    for rule in ("uniform", "optimal"):
        options = {"floor": 0.01} if rule == "optimal" else {}
        pruning = Pruning(PruningConfig(rule=rule, rate=0.95, **options), recipe, 5)
        with pytest.raises(ValueError, match=rf"rate must leave one of a prompt's {count} parents"):
            pruning.weights(batch, iteration=3)


def test_history_gives_more_coins_to_steps_with_more_gradient(toy):
    """Without a past by the rows alone; then by the advantages of each depth, whoever stays."""
    recipe = recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5)
    pruning = Pruning(PruningConfig(rule="history", rate=0.5), recipe, 5)
    batch = grown(recipe, toy())
    plan, edges = batch.forest.plan, batch.forest.plan.trained()
    units = unbiased.trained_units(plan)

    def probabilities():
        many = np.stack([pruning.weights(batch, iteration=i).weight for i in range(200)])
        p = 1.0 / many.max(0)[edges]
        return p[np.searchsorted(units.owner[np.argsort(units.owner)], np.arange(len(units.node)))]

    size = recipe.objective.slope(plan, edges) ** 2
    by_depth = {int(d): size[plan.depth[edges] == d][0] for d in np.unique(plan.depth[edges])}
    children = np.bincount(units.owner)
    before = probabilities()
    norm = np.sqrt([by_depth[int(d) + 1] for d in plan.depth[units.node]] * children)
    mine = units.prompt == 0
    wanted = unbiased.optimal_probability(norm[mine], units.cost[mine], 0.5, 0.1)
    np.testing.assert_allclose(before[mine], wanted)
    pruning.remember(np.array([0] * 10), [batch])
    a2 = batch.credit.advantage[edges].sum(1) ** 2
    for d in by_depth:
        assert pruning.past.means["steps"][d] == pytest.approx(a2[plan.depth[edges] == d].mean())
    pruning.past.means["steps"] = {d: (1.0 if d == 1 else 0.0) for d in by_depth}
    after = probabilities()
    roots = plan.depth[units.node] == 0
    assert (after[roots] == 1.0).all()
    assert after[~roots].max() < 0.6
    again = Pruning(pruning.config, recipe, 5)
    again.load(json.loads(json.dumps(pruning.state())), "state.json")
    assert again.past.means["steps"] == pruning.past.means["steps"]


def test_what_is_known_before_the_rollout_stays_off_the_tape(toy):
    """A depth window of the recipe and one edge of two kept; a tape where it pays."""
    window = recipes.branch_grpo(SG, splits=(0, 1), pruning="depth", prune_depths=(2, 3))
    plan = window.plan([4, 9], seed=5, iteration=3)
    ahead = Pruning(PruningConfig(), window, 5).ahead(plan, (4, 9), 3)
    np.testing.assert_array_equal(
        np.flatnonzero(ahead), np.unique(plan.parent[plan.train & np.isin(plan.depth, (2, 3))])
    )
    assert Pruning(PruningConfig(), tree(), 5).ahead(plan, (4, 9), 3) is None
    best = recipes.branch_grpo(SG, splits=(0, 1), pruning="parent_top1")
    assert Pruning(PruningConfig(), best, 5).ahead(plan, (4, 9), 3) is None
    for config, recipe, wanted in (
        (PruningConfig(), best, 0),
        (PruningConfig(rule="cppo", rate=0.5), tree(), 0),
        (PruningConfig(rule="cppo", rate=0.2), tree(), None),
        (PruningConfig(rule="threshold", rate=0.5), tree(), None),
        (PruningConfig(rule="threshold", rate=0.7), tree(), 0),
        (PruningConfig(rule="optimal", rate=0.5), tree(), 0),
        (PruningConfig(rule="history", rate=0.5), tree(), None),
        (PruningConfig(rule="zero_advantage"), tree(), None),
        (PruningConfig(), window, None),
    ):
        pruning = Pruning(config, recipe, 5)
        assert pruning.tape(None) == wanted, config
        assert pruning.tape(7) == 7
