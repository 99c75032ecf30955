"""What shares a model call: dense packs, budgets of tokens, texts cut to their length."""

import itertools
import re
import time

import numpy as np
import pytest
import tiny_pipelines
import torch

from branchcore import _dispatch, recipes, reference, schedule
from branchcore.gradient import gradient
from branchcore.matching import Preference
from branchcore.model import token_budget
from branchcore.models import prompted_flow
from branchcore.objective import ClippedRatio
from branchcore.packing import TokenBudget, pack, pack_parents
from branchcore.passes import concat
from branchcore.rollout import rollout
from branchcore.steps import dpmpp, renoise
from branchcore.tree import Tree

F64 = {"dtype": torch.float64}
SG = schedule.shifted_linear(8, 3)
TOY = np.array([6, 5, 4, 3, 2])


@pytest.fixture(params=["cpp", "reference"])
def implementation(request):
    if request.param == "cpp" and _dispatch.host() is None:
        pytest.skip("branchcore._C is not built")
    with _dispatch.use(request.param):
        yield request.param


def as_lists(packs):
    return [items.tolist() for items in packs.items()]


def draws(count):
    """Random problems, ties and zeros often among them."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        capacity = int(rng.integers(1, 30))
        lengths = rng.integers(0, capacity + 1, int(rng.integers(0, 40)))
        yield lengths, capacity, int(rng.integers(1, 12))


def test_published_toy(implementation):
    packs = pack(TOY, 10, 3)
    assert [TOY[items].tolist() for items in packs.items()] == [[6, 4], [5, 3, 2]]
    assert packs.density(TOY, 10) == 1.0
    in_order = pack(TOY, 10, 1)
    assert [TOY[items].tolist() for items in in_order.items()] == [[6], [5, 4], [3, 2]]
    assert in_order.density(TOY, 10) == pytest.approx(20 / 30)


def test_what_has_been_passed_over_waits_for_the_next_pack(implementation):
    assert as_lists(pack(np.array([5, 9, 1, 1, 1, 1, 1]), 10, 2)) == [[0, 2], [1, 3], [4, 5, 6]]
    assert as_lists(pack(np.array([5, 9, 1, 1, 1, 1, 1]), 10, 4)) == [[0, 2, 3, 4], [1, 5], [6]]


def test_equal_lengths_join_oldest_first_and_nothing_makes_no_pack(implementation):
    assert as_lists(pack(np.full(5, 3), 7, 4)) == [[0, 1], [2, 3], [4]]
    assert as_lists(pack(np.zeros(3, int), 1, 2)) == [[0, 1, 2]]
    nothing = pack(np.zeros(0, int), 4, 2)
    assert as_lists(nothing) == []
    assert nothing.start.tolist() == [0]
    assert nothing.density(np.zeros(0, int), 4) == 1.0


def test_compiled_equals_the_reference():
    if _dispatch.host() is None:
        pytest.skip("branchcore._C is not built")
    for lengths, capacity, window in draws(1500):
        found = pack(lengths, capacity, window)
        assert found.order.dtype == found.start.dtype == np.int64
        exact = reference.pack(lengths.tolist(), capacity, window)
        assert as_lists(found) == exact, (lengths, capacity, window)
        strided = np.repeat(lengths, 2)[::2].astype(np.int32)
        assert as_lists(pack(strided, capacity, window)) == exact


def test_invariants(implementation):
    for lengths, capacity, window in draws(300):
        packs = pack(lengths, capacity, window)
        assert sorted(packs.order.tolist()) == list(range(len(lengths)))
        mine = packs.items()
        assert all(len(items) and lengths[items].sum() <= capacity for items in mine)
        for begin, items in zip(packs.start[:-1], mine, strict=True):
            assert items[0] == packs.order[begin:].min()
        for here, after in itertools.pairwise(mine):
            assert lengths[here].sum() + lengths[after[0]] > capacity
        place = np.argsort(packs.order)
        for item in range(len(lengths)):
            oldest_from = place[:item].max(initial=-1) + 1
            passing = packs.order[oldest_from : max(oldest_from, place[item])]
            assert (passing > item).all()
            assert len(passing) <= window - 1
        if window == 1:
            assert packs.order.tolist() == list(range(len(lengths)))


def test_a_hundred_thousand_items_take_less_than_a_second():
    if _dispatch.host() is None:
        pytest.skip("branchcore._C is not built")
    lengths = np.random.default_rng(0).integers(200, 4000, 100_000)
    for window, density in ((1, 0.85), (64, 0.99), (100_000, 0.999)):
        begin = time.process_time()
        packs = pack(lengths, 10_000, window)
        assert time.process_time() - begin < 1.0, window
        assert packs.density(lengths, 10_000) >= density


@pytest.mark.parametrize(
    ("lengths", "capacity", "window", "error", "message"),
    [
        (
            [3, 9, 2, 8],
            7,
            2,
            ValueError,
            "pack: lengths must be in [0, capacity=7], got 9 at 1",
        ),
        ([3, -1], 7, 2, ValueError, "pack: lengths must be in [0, capacity=7], got -1 at 1"),
        ([3], 0, 2, ValueError, "pack: capacity must be at least 1, got 0"),
        ([3], 7, 0, ValueError, "pack: window must be at least 1, got 0"),
        ([[3]], 7, 1, ValueError, "pack: lengths must be (N,), got (1, 1)"),
        ([3.5], 7, 1, TypeError, "pack: lengths must be integers, got float64"),
    ],
)
def test_pack_errors(lengths, capacity, window, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pack(np.array(lengths), capacity, window)


def forked(prompts=4):
    return recipes.branch_mix(SG, splits=(0, 2), window=3).plan(
        list(range(prompts)), seed=5, iteration=3
    )


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("rows", "max_batch"), [(7, None), (1, None), (9, 7), (7, 9), (900, None)])
def test_rows_of_one_length_are_packed_as_by_max_batch(rows, max_batch, mixed):
    plan = forked()
    parts = [np.arange(4, 9)]
    budget = TokenBudget(np.full(len(plan), 11), 11 * rows + 5, mixed)
    found = pack_parents(plan, plan.trained(), max_batch, parts, budget=budget)
    exact = pack_parents(plan, plan.trained(), min(rows, max_batch or rows), parts)
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class Counting:
    """Adds to the toy policy how long its rows are, and a record of what its calls hold."""

    def __init__(self, toy, mixed, lengths):
        self.toy, self.variable_length, self.lengths = toy, mixed, np.asarray(lengths)
        self.latent_shape, self.calls = toy.latent_shape, []

    def row_tokens(self, prompt):
        return self.lengths[prompt]

    def velocity(self, x, sigma, prompt):
        self.calls.append((self.lengths[prompt.numpy()], sigma.numpy(), prompt.numpy()))
        return self.toy.velocity(x, sigma, prompt)

    def reference_velocity(self, x, sigma, prompt):
        return self.toy.reference_velocity(x, sigma, prompt)


def edges_of(plan):
    rng = np.random.default_rng(2)
    advantage = rng.normal(size=len(plan))
    split = np.stack([np.maximum(advantage, 0), np.maximum(-advantage, 0)], 1)
    return split, rng.choice([0.0, 0.5, 2.0], size=len(plan))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("tape", [0, 9])
def test_any_budget_gives_the_same_gradient(mixed, tape, toy):
    plan, objective = forked(), ClippedRatio(clip=(0.1, 0.1), kl=0.3)
    model = Counting(toy(), mixed, [5, 9, 23, 31])
    advantage, weight = edges_of(plan)

    def take(**limits):
        forest = rollout(plan, model, [0, 1, 2, 3], seed=5, iteration=3, tape=tape, **F64)
        model.toy.zero_grad()
        model.calls.clear()
        stats = gradient(forest, model, advantage, weight, objective, **limits)
        return model.toy.gradient(), stats

    exact, whole = take()
    for most in np.random.default_rng(4).integers(31, 300, 5):
        found, stats = take(max_tokens=int(most), max_batch=6)
        assert float((found - exact).norm() / exact.norm()) <= 1e-12
        assert stats.parents == whole.parents
        assert float(stats.loss) == pytest.approx(float(whole.loss), rel=1e-12)
        for lengths, _, _ in model.calls:
            assert lengths.sum() <= most
            assert len(lengths) <= 6
            assert mixed or len(set(lengths)) == 1


def test_calls_are_filled_with_other_trees_and_steps(toy):
    plan = recipes.branch_grpo(SG, splits=(0, 2)).plan([0, 1, 2, 3], seed=5, iteration=3)
    model = Counting(toy(), True, [5, 9, 23, 31])
    advantage, weight = edges_of(plan)
    forest = rollout(plan, model, [0, 1, 2, 3], seed=5, iteration=3, **F64)
    calls = {}
    for mixed in (True, False):
        model.variable_length = mixed
        model.calls.clear()
        gradient(forest, model, advantage, weight, ClippedRatio(), max_tokens=100)
        calls[mixed] = list(model.calls)
    tokens = sum(lengths.sum() for lengths, _, _ in calls[True])
    assert tokens == sum(lengths.sum() for lengths, _, _ in calls[False])
    assert all(lengths.sum() >= 90 for lengths, _, _ in calls[True][:-1])
    assert len(calls[True]) < len(calls[False])
    assert any(len(set(sigma)) > 1 and len(set(prompt)) > 1 for _, sigma, prompt in calls[True])


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        ({}, [156]),
        ({"max_batch": 8}, [4] + 19 * [8]),
        ({"max_batch": 32}, [28] + 4 * [32]),
        ({"max_tokens": 31 * 13}, [12, 16] + 4 * [32]),
        ({"max_batch": 32, "even": lambda passes: passes}, [4, 8, 16] + 4 * [32]),
    ],
)
def test_waves_on_the_tape_share_calls_of_the_reference(limits, rows, toy):
    plan = recipes.branch_grpo(SG, splits=(0, 1, 2)).plan([0, 1, 2, 3], seed=5, iteration=3)
    model, objective = Counting(toy(), True, [5, 9, 23, 31]), ClippedRatio(kl=0.3)
    advantage, weight = edges_of(plan)
    asked = []

    def reference_velocity(x, sigma, prompt):
        asked.append(len(x))
        return model.toy.reference_velocity(x, sigma, prompt)

    gradients = []
    for tape, given in ((len(plan), limits), (0, {})):
        limit = {k: v for k, v in given.items() if k == "max_batch"}
        forest = rollout(plan, model, [0, 1, 2, 3], seed=5, iteration=3, tape=tape, **limit, **F64)
        model.reference_velocity = reference_velocity
        model.toy.zero_grad()
        asked.clear()
        gradient(forest, model, advantage, 0.5 + weight, objective, **given)
        gradients.append(model.toy.gradient())
        if tape:
            assert asked == rows
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) <= 1e-12


def pairs():
    """Images of three prompts, re-noised: a group is the images of a prompt at one time."""
    t = Tree()
    x = t.leaf(t.chain(t.roots(4), SG[1:], dpmpp(2, warm_up=True)))
    for label, sigma in enumerate((0.3, 0.7, 0.9)):
        t.grow(x, sigma, renoise, train=True, same_noise=True, label=label)
    return concat([t.plan()] * 3)


@pytest.mark.parametrize("mixed", [True, False])
def test_coupled_edges_stay_whole_within_the_budget(mixed, toy):
    plan, objective = pairs(), Preference(beta=2.0)
    model = Counting(toy(), mixed, [5, 9, 23])
    advantage, weight = edges_of(plan)
    together = plan.group(objective.together)
    taken = []
    for limits in ({}, {"max_tokens": 120}, {"max_tokens": 230, "max_batch": 8}):
        forest = rollout(plan, model, [0, 1, 2], seed=5, **F64)
        model.toy.zero_grad()
        model.calls.clear()
        gradient(forest, model, advantage, 0.5 + weight, objective, **limits)
        taken.append(model.toy.gradient())
        assert all(lengths.sum() <= limits.get("max_tokens", 999) for lengths, _, _ in model.calls)
        assert all(len(lengths) <= limits.get("max_batch", 999) for lengths, _, _ in model.calls)
        assert float((taken[-1] - taken[0]).norm() / taken[0].norm()) <= 1e-12
    budget = TokenBudget(model.lengths[plan.prompt], 120, mixed)
    packs = pack_parents(plan, plan.trained(), None, (), together, budget)
    for group in np.unique(together[plan.trained()]):
        assert sum(group in together[batch.edges] for batch in packs) == 1
    with pytest.raises(ValueError, match=r"max_tokens must hold a whole group of 92, got 91"):
        pack_parents(plan, plan.trained(), None, (), together, budget._replace(most=91))


def test_budget_errors(toy):
    plan = forked()
    advantage, weight = edges_of(plan)
    model = Counting(toy(), True, [5, 9, 23, 31])
    forest = rollout(plan, model, [0, 1, 2, 3], seed=5, **F64)
    arguments = advantage, weight, ClippedRatio()
    with pytest.raises(ValueError, match="max_tokens must hold a row of 31, got 30"):
        gradient(forest, model, *arguments, max_tokens=30)
    with pytest.raises(TypeError, match=r"must have row_tokens .* got ToyModel; try max_batch"):
        gradient(forest, model.toy, *arguments, max_tokens=30)
    model.lengths = np.array([5, 0, 23, 31])
    with pytest.raises(ValueError, match=r"integers, at least 1, got \(\d+,\) int64 from 0"):
        token_budget(model, plan.prompt, 30)
    assert token_budget(model.toy, plan.prompt, None) is None
    tokens = np.arange(1, 1 + len(plan))
    whole = np.zeros(len(plan), dtype=np.int64)
    with pytest.raises(ValueError, match="rows of one group must have one length"):
        pack_parents(plan, plan.trained(), None, (), whole, TokenBudget(tokens, 10**6, False))


PROMPTS = ["a cat", "a dog and a red cat on a green hill", "blue"]


def test_texts_of_a_call_are_cut_to_its_longest(tiny_folder, monkeypatch):
    tiny = tiny_pipelines.Tiny("qwen_image", tiny_folder("qwen_image"))
    monkeypatch.setattr(prompted_flow, "TEXT_STEP", 2)
    model = tiny.load(guidance=3.0).to(torch.float64)
    view = model.with_prompts(PROMPTS)
    own = view.text["mask"].sum(1).numpy()[:3]
    tokens = view.row_tokens(np.array([0, 1, 2, 1]))
    image = tokens - np.minimum(-(-own // 2) * 2, own.max())[[0, 1, 2, 1]]
    assert len(set(image)) == 1
    assert image[0] == np.prod(model.latent_shape[1:]) // 4
    x = torch.randn(3, *model.latent_shape, dtype=torch.float64)
    sigma, prompt = torch.full((3,), 0.6, dtype=torch.float64), torch.arange(3)
    seen = []
    model.module.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    whole = view.velocity(x, sigma, prompt).detach()
    assert max(seen) == own.max()
    for row in range(3):
        seen.clear()
        alone = view.velocity(*(value[row : row + 1] for value in (x, sigma, prompt))).detach()
        assert seen[-1] == tokens[row] - image[0]
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-10, atol=1e-12)
    assert tokens[1] > tokens[0]


def test_families_that_pad_alike_refuse_a_budget(tiny_folder):
    tiny = tiny_pipelines.Tiny("sd3", tiny_folder("sd3"))
    view = tiny.load().with_prompts(PROMPTS)
    with pytest.raises(NotImplementedError, match="must keep their length, got padded sd3"):
        view.row_tokens(np.zeros(2, dtype=np.int64))
