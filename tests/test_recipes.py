"""Every recipe: its gradient is the published loss edge by edge, shared or as chains."""

import numpy as np
import pytest
import torch
from formulas import published_gradient, shake

from branchcore import recipes, schedule
from branchcore.gradient import gradient
from branchcore.passes import share, unshare
from branchcore.report import other_forwards
from branchcore.rollout import rollout

SG = schedule.shifted_linear(8, 3)
UIDS, SEED, ITERATION = [4, 9], 5, 3
F64 = {"dtype": torch.float64}
OPTIONS = {
    "tempflow_grpo": {"trunks": 2, "children": 2},
    "instant_rewards": {"trunks": 2, "children": 2},
    "flow_grpo_fast_v1": {"trunks": 2, "children": 3, "latest": 3},
    "g2rpo": {"group": 3, "strides": (1, 2)},
    "branch_grpo": {"splits": (0, 2)},
    "branch_mix": {"splits": (0, 2), "window": 2},
}


def small(name, **more):
    known = recipes.options_of(name)
    options = OPTIONS.get(name) or recipes.leaf_options(tuple(known), 4, len(SG) - 1)
    if "updates" in known:
        more = {"updates": 2} | more
    return recipes.build(name, SG, **{**options, **more})


def setting(name, **more):
    recipe = small(name, **more)
    plan = recipe.plan(UIDS, seed=SEED, iteration=ITERATION)
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(int(plan.leaf.sum()), 2)) + 3.0
    log_prob = np.where(plan.stochastic, rng.normal(size=len(plan)), 0.0)
    credit = recipe.credit(plan, rewards, np.array([1.0, 0.5]), log_prob)
    weight = recipe.prune(plan, credit.value, ITERATION) * rng.choice([0.5, 1, 2], len(plan))
    return recipe, plan, credit.advantage, weight


def grown(plan, model, **options):
    return rollout(plan, model, UIDS, seed=SEED, iteration=ITERATION, **options, **F64)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("changed", [False, True], ids=["on policy", "after an update"])
def test_gradient_equals_the_published_loss_edge_by_edge(name, changed, toy):
    recipe, plan, advantage, weight = setting(name)
    old, model = toy(), toy()
    forest = grown(plan, old, keep_velocity=True)
    if changed:
        shake(model)
    assert advantage[plan.train].any()
    for update in range(plan.num_updates):
        published_gradient(
            forest, model, recipe.objective, advantage, weight,
            old=old if changed else None, update=update,
        )  # fmt: skip
    exact = model.gradient()
    ways = {"recomputed": 0} | ({} if changed else {"tape": 10**6})
    for tape in ways.values():
        model.zero_grad()
        forest = grown(plan, model if tape else old, keep_velocity=True, tape=tape, max_batch=9)
        for update in range(plan.num_updates):
            anchor = "rollout" if changed else "auto"
            gradient(
                forest, model, advantage, weight, recipe.objective,
                update=update, anchor=anchor, max_batch=9,
            )  # fmt: skip
        assert relative(model.gradient(), exact) <= 1e-12


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_shared_equals_independent_chains(name, toy):
    """The same noise, the same leaves, the same gradient from chains that share nothing."""
    recipe, plan, advantage, weight = setting(name)
    chains, origin = unshare(plan)
    counts, naive = plan.counts(), chains.counts()
    assert naive.forwards >= counts.forwards
    assert len(share(chains)) == len(plan)
    copies = np.bincount(origin, minlength=len(plan))[origin]
    grads, leaves = [], []
    for each, rows, scale in ((plan, np.arange(len(plan)), 1.0), (chains, origin, 1 / copies)):
        model = toy()
        forest = grown(each, model, keep_velocity=True)
        leaves.append({int(rows[i]): forest.x[forest.slot[i]] for i in np.flatnonzero(each.leaf)})
        for update in range(plan.num_updates):
            gradient(
                forest, model, advantage[rows], weight[rows] * scale, recipe.objective,
                update=update, num_planned=len(plan.trained(update)),
            )  # fmt: skip
        grads.append(model.gradient())
    assert relative(*grads) <= 1e-12
    for leaf, state in leaves[0].items():
        assert float((state - leaves[1][leaf]).abs().max()) <= 1e-12


def test_the_penalty_acts_on_prompts_without_a_spread(toy):
    """MixGRPO's half squared log-ratio has a gradient where the advantages are 0."""
    recipe, plan, advantage, weight = setting("mix_grpo", log_ratio_penalty=0.7)
    advantage[plan.prompt == 1] = 0.0
    old, model = toy(), toy()
    forest = grown(plan, old, keep_velocity=True)
    shake(model)
    published_gradient(forest, model, recipe.objective, advantage, weight, old=old, update=1)
    exact = model.gradient()
    model.zero_grad()
    gradient(forest, model, advantage, weight, recipe.objective, update=1)
    assert relative(model.gradient(), exact) <= 1e-12


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_model_is_asked_for_what_the_plan_counts(name, toy):
    """Rows of the rollout: F, and the old policy's at re-noised states of later updates."""
    recipe, plan, *_ = setting(name)
    model = toy()
    grown(plan, model, keep_velocity=None if recipe.objective.anchor == "policy" else False)
    others = other_forwards(recipe, plan, 0) if recipe.sampler_decay is None else 0
    later = int((plan.train & plan.matching & (plan.update > 0)).sum())
    if recipe.sampler_decay is not None:
        others = later
    assert sum(model.rows) == plan.counts().forwards + others


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_a_pure_function_of_seed_iteration_and_uid(name):
    recipe = small(name)
    plan = recipe.plan([7, 3], seed=1, iteration=11)
    again = small(name).plan([3, 7], seed=1, iteration=11).select([1, 0])
    for field in ("parent", "sigma", "row", "older", "train", "leaf", "label", "update"):
        np.testing.assert_array_equal(getattr(plan, field), getattr(again, field))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_preset_is_a_whole_plan(name):
    for preset in recipes.PRESETS[name]:
        recipe = recipes.build_preset(name, preset)
        plan = recipe.plan([0], seed=0, iteration=0)
        assert plan.counts().trained_edges > 0
        assert recipe.updates == plan.num_updates


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_constant_rewards_are_worth_exactly_nothing(name):
    recipe, plan, *_ = setting(name)
    if name in ("flow_rwr", "vgpo"):
        pytest.skip("weighs by the reward itself, by design")
    rewards = np.full((int(plan.leaf.sum()), 2), 0.1) * 3
    credit = recipe.credit(plan, rewards, np.ones(2), np.zeros(len(plan)))
    assert not credit.advantage.any()
