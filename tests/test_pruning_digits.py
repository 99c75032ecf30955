"""Pruning on the embedded diffusers model in float64: expectations, variances, ways to skip."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import published_gradient

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytest.importorskip("diffusers")

from float64 import float64_throughout  # noqa: E402

from branchcore import recipes, schedule, unbiased  # noqa: E402
from branchcore.models.digits import PROMPTS, DigitsReward, load_digits_model  # noqa: E402
from branchcore.models.digits.presets import PRESETS, SIGMAS  # noqa: E402
from branchcore.prune import cppo  # noqa: E402
from branchcore.pruning import Pruning  # noqa: E402
from branchcore.pruning_config import PruningConfig  # noqa: E402
from branchcore.rewards import component_weights, score  # noqa: E402
from branchcore.rollout import rollout  # noqa: E402
from branchcore.stages import Batch, accumulate  # noqa: E402

PRESET = PRESETS["branch_grpo"]
SEED, ITERATION, ALL = 5, 3, 10**6
RULES = {
    "threshold": {"rule": "threshold", "rate": 0.7},
    "uniform": {"rule": "uniform", "rate": 0.5},
    "optimal": {"rule": "optimal", "rate": 0.5},
    "fixed": {"rule": "uniform", "rate": 0.5, "draw": "fixed"},
}


@pytest.fixture(scope="module", autouse=True)
def _float64():
    """diffusers would round time embeddings and norms to fp32."""
    with float64_throughout():
        yield


@pytest.fixture(scope="module")
def model():
    """Moved off its base, so that the KL has a gradient too."""
    model = load_digits_model().to(torch.float64)
    with torch.no_grad():
        for p in model.module.parameters():
            p.mul_(1 + 0.05 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))
    return model


class Counted:
    """A view of the model that counts its rows, and says how many tokens they have."""

    variable_length = True

    def __init__(self, view):
        self.view, self.latent_shape, self.rows = view, view.latent_shape, 0

    def velocity(self, x, sigma, prompt):
        self.rows += len(x)
        return self.view.velocity(x, sigma, prompt)

    def reference_velocity(self, x, sigma, prompt):
        return self.view.reference_velocity(x, sigma, prompt)

    def row_tokens(self, prompt):
        return np.array([16, 21])[prompt]


def branch_grpo(sigmas=SIGMAS, **options):
    return recipes.build("branch_grpo", sigmas, **{**PRESET.recipe, **options})


def grown(recipe, model, uids, **options):
    """A forest of some prompts; the same one but for rounding, whatever the options."""
    plan = recipe.plan(uids, seed=SEED, iteration=ITERATION)
    view = Counted(model.with_prompts([PROMPTS[7 * uid % len(PROMPTS)] for uid in uids]))
    where = {"seed": SEED, "iteration": ITERATION, "dtype": torch.float64}
    return rollout(plan, view, uids, **where, **options), view


def credited(recipe, model, uids):
    """A batch with the task's rewards, nothing on the tape."""
    forest, view = grown(recipe, model, uids, tape=0)
    # what is cast to fp32 in torch stays in float64 here, and the classifier is in fp32
    images = torch.from_numpy(model.decode(forest.leaves.view(-1, 1, 8, 8)).numpy().astype("f4"))
    plan = forest.plan
    texts = [PROMPTS[7 * uids[p] % len(PROMPTS)] for p in plan.prompt[plan.leaf]]
    scores = score(DigitsReward(), images, texts)
    weights = component_weights(scores.names, PRESET.trainer["reward_weights"])
    credit = recipe.credit(plan, scores.values, weights, forest.log_prob.numpy())
    return Batch(forest, view, scores, credit, np.ones(len(plan)), tuple(uids))


def flat(model):
    parameters = list(model.module.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    model.module.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in grads])


def gradient_of(batch, recipe, model, weight, **limits):
    accumulate(batch._replace(weight=weight), recipe, **limits)
    return flat(model)


def off_by(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def small(model):
    """A tree of 5 trained parents: the root and its four children."""
    recipe = branch_grpo(schedule.shifted_linear(3), splits=(0,), branching=4)
    batch = credited(recipe, model, [4])
    full = gradient_of(batch, recipe, model, batch.weight)
    units = unbiased.trained_units(batch.forest.plan)
    assert len(units.node) == 5
    known = {}

    def gradient(weight):
        if weight.tobytes() not in known:
            known[weight.tobytes()] = gradient_of(batch, recipe, model, weight)
        return known[weight.tobytes()]

    return recipe, batch, units, full, gradient


@pytest.mark.parametrize("rule", RULES)
def test_the_mean_over_all_masks_is_the_full_gradient(rule, small, monkeypatch):
    recipe, batch, units, full, gradient = small
    pruning, count = Pruning(PruningConfig(**RULES[rule]), recipe, SEED), len(units.node)
    coins = {"now": np.zeros(count)}
    monkeypatch.setattr(unbiased, "unit_coins", lambda *a, **k: coins["now"])

    def weight_at(coin):
        coins["now"] = np.asarray(coin)
        return pruning.weights(batch, iteration=ITERATION).weight

    if rule == "fixed":
        orders = list(itertools.permutations(np.arange(count) / count))
        draws = [(1 / len(orders), weight_at(order)) for order in orders]
    else:
        p = np.ones(count)
        p[units.owner] = 1.0 / weight_at(np.zeros(count))[units.edges]
        masks = itertools.product(*((True, False) if x < 1.0 else (True,) for x in p))
        draws = [
            (np.where(kept, p, 1.0 - p).prod(), weight_at(np.where(kept, 0.0, 1.0 - 2.0**-53)))
            for kept in map(np.array, masks)
        ]
    assert sum(chance for chance, _ in draws) == pytest.approx(1.0, abs=1e-14)
    assert len({weight.tobytes() for _, weight in draws}) >= 4
    assert off_by(sum(chance * gradient(weight) for chance, weight in draws), full) <= 1e-12
    naive = sum(chance * gradient(np.sign(weight)) for chance, weight in draws)
    assert off_by(naive, full) > 1e-2


def test_cppo_has_another_mean(small):
    _, batch, _, full, gradient = small
    only = gradient(cppo(batch.forest.plan, batch.credit.value, 0.5))
    assert off_by(only, full) > 1e-2
    # nor does a constant factor repair it
    assert off_by(only * float(only @ full / only.square().sum()), full) > 1e-2


class Real:
    """A tree of the preset with the gradients of its 81 parents: draws are linear in them."""

    def __init__(self, model):
        self.recipe = branch_grpo()
        self.batch = credited(self.recipe, model, [4])
        plan = self.batch.forest.plan
        self.units = unbiased.trained_units(plan)
        self.first = np.zeros(len(self.units.node), dtype=int)
        self.first[self.units.owner[::-1]] = self.units.edges[::-1]
        parts = np.empty((len(self.units.node), len(flat(model))))
        for unit in range(len(parts)):
            one = np.zeros(len(plan))
            one[self.units.edges[self.units.owner == unit]] = 1.0
            parts[unit] = gradient_of(self.batch, self.recipe, model, one)
        full = gradient_of(self.batch, self.recipe, model, np.ones(len(plan)))
        assert off_by(torch.from_numpy(parts.sum(0)), full) <= 1e-12
        self.gram = parts @ parts.T

    def miss(self, weight_U):
        """Distance of an estimate from the full gradient."""
        return float(np.sqrt((weight_U - 1.0) @ self.gram @ (weight_U - 1.0)))

    def looks_unbiased(self, weights_NU, variance):
        """The mean of the draws is within 4 standard errors of the full gradient."""
        return self.miss(weights_NU.mean(0)) <= 4.0 * np.sqrt(variance / len(weights_NU))


@pytest.fixture(scope="module")
def real(model):
    return Real(model)


@pytest.mark.parametrize("rule", ["threshold", "uniform", "optimal"])
def test_many_draws_of_a_real_tree(rule, real):
    assert len(real.units.node) == 81
    pruning, draws = Pruning(PruningConfig(**RULES[rule]), real.recipe, SEED), 1500
    weights = np.stack(
        [pruning.weights(real.batch, iteration=i).weight[real.first] for i in range(draws)]
    )
    p = 1.0 / weights.max(0)
    assert (weights == 0.0).any(0).sum() > 20
    formula = unbiased.added_variance(p, real.gram.diagonal())
    assert real.looks_unbiased(weights, formula)
    measured = np.mean([real.miss(weight) ** 2 for weight in weights])
    assert measured == pytest.approx(formula, rel=0.1)
    # the check can fail: without their weights the same coins miss
    assert not real.looks_unbiased(np.sign(weights), formula)


def test_cppo_fails_the_check_of_many_draws(real):
    """Its choice is no draw; even with the standard error of uniform coins of its own share."""
    kept = cppo(real.batch.forest.plan, real.batch.credit.value, 0.5)[real.first]
    assert 0.5 < kept.mean() < 0.7
    variance = unbiased.added_variance(np.full(81, kept.mean()), real.gram.diagonal())
    weights = np.tile(kept, (1500, 1))
    assert not real.looks_unbiased(weights, variance)
    assert not real.looks_unbiased(weights / kept.mean(), variance)


@pytest.fixture(scope="module")
def dropped(model):
    """Two real trees, the weights of some coins, and their gradient edge by edge, times 0 or not.

    The reference has no path to leave anything out: one forward and backward per edge, the
    published loss multiplied by the weight.
    """
    recipe = branch_grpo(SIGMAS[::2], splits=(0, 1, 2))
    batch = credited(recipe, model, [4, 9])
    pruning = Pruning(PruningConfig(**RULES["uniform"]), recipe, SEED)
    weight = pruning.weights(batch, iteration=ITERATION).weight
    plan, edges = batch.forest.plan, batch.forest.plan.trained()
    published_gradient(batch.forest, batch.model, recipe.objective, batch.credit.advantage, weight)
    exact = flat(model)
    assert off_by(gradient_of(batch, recipe, model, np.ones(len(plan))), exact) > 1e-2
    parents = np.unique(plan.parent[edges])
    kept = np.unique(plan.parent[edges[weight[edges] > 0.0]])
    assert 5 < len(kept) < len(parents) - 5
    off = np.zeros(len(plan), dtype=bool)
    off[np.setdiff1d(parents, kept)] = True
    return recipe, batch, weight, exact, len(kept), off


WAYS = {
    "all in one call": ({"tape": 0}, {}),
    "packed by rows": ({"tape": 0}, {"max_batch": 3}),
    "packed by tokens": ({"tape": 0}, {"max_tokens": 60}),
    "packed by both": ({"tape": 0}, {"max_tokens": 90, "max_batch": 4}),
    "taped, times 0": ({"tape": ALL}, {}),
    "taped in chunks": ({"tape": ALL, "max_batch": 5}, {"max_batch": 3}),
    "taped, masked": ({"tape": ALL, "masked_backward": True}, {}),
    "taped in part": ({"tape": 9}, {"max_tokens": 60}),
    "never taped": ({"tape": ALL, "off_tape": True}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_out_is_as_if_multiplied_by_zero(way, dropped, model):
    recipe, batch, weight, exact, kept, off = dropped
    options, limits = WAYS[way]
    options = options | ({"off_tape": off} if "off_tape" in options else {})
    forest, view = grown(recipe, model, [4, 9], **options)
    on_tape = sum(len(part.nodes) for part in forest.tape)
    view.rows = 0
    found = gradient_of(batch._replace(forest=forest, model=view), recipe, model, weight, **limits)
    assert off_by(found, exact) <= 1e-12
    if options["tape"] == 0:
        assert view.rows == kept
    elif options["tape"] == ALL:
        assert view.rows == 0
        assert on_tape == (kept if "off_tape" in options else kept + off.sum())
    else:
        assert 0 < view.rows < kept
