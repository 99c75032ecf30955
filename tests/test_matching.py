"""Objectives on re-noised leaves against their published formulas, edge by edge, batch 1."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from formulas import RenoisedEdge, published_gradient, shake

from branchcore import ops, schedule
from branchcore.gradient import gradient
from branchcore.matching import (
    AdvantageMatching,
    ContrastiveMatching,
    Preference,
    RewardWeighted,
)
from branchcore.noise import Noise
from branchcore.objective import ClippedRatio, Edges
from branchcore.passes import concat, share, unshare
from branchcore.rollout import rollout
from branchcore.steps import dpmpp, renoise
from branchcore.tree import Tree

F64 = {"dtype": torch.float64}
SG = schedule.shifted_linear(5, 3)
TIMES = (0.3, 0.7, 0.9)
UIDS = [4, 9]


def images_and_times(group=4, updates=1, *, same_noise=True):
    t = Tree()
    x = t.leaf(t.chain(t.roots(group), SG[1:], dpmpp(2, warm_up=True)))
    update = np.arange(group) * updates // group
    for i, time in enumerate(TIMES):
        t.grow(x, time, renoise, train=True, same_noise=same_noise, label=i, update=update)
    return t.plan()


def setting(**options):
    plan = concat([images_and_times(**options)] * 2)
    rng = np.random.default_rng(3)
    value = rng.normal(size=int(plan.leaf.sum()))
    value -= value.mean()
    node = np.zeros(len(plan))
    node[plan.leaf] = value
    node[plan.train] = node[plan.parent[plan.train]]
    advantage = np.stack([np.maximum(node, 0), np.maximum(-node, 0)], 1)
    return plan, advantage, rng.choice([0.5, 1.0, 2.5], size=len(plan))


CASES = {
    "awm uniform": AdvantageMatching(weighting="uniform", clip=(0.4, 0.4)),
    "awm t": AdvantageMatching(weighting="t", clip=(0.4, 0.4)),
    "awm t2": AdvantageMatching(weighting="t2", clip=(0.01, 0.01)),
    "awm ghuber": AdvantageMatching(clip=(0.4, 0.4)),
    "nft": ContrastiveMatching(),
    "nft beta .1": ContrastiveMatching(beta=0.1),
    "dgpo": Preference(beta=2.0),
    "rwr": RewardWeighted(),
}


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_published_one(name, kl, toy):
    """On policy and after an update; any packing; with and without the velocity KL."""
    objective = dataclasses.replace(CASES[name], kl=kl)
    plan, advantage, weight = setting()
    edges = plan.trained()
    for changed in (False, True):
        old, model = toy(), toy()
        forest = rollout(plan, old, UIDS, seed=5, keep_velocity=True, **F64)
        if changed:
            shake(model)
        published_gradient(
            forest, model, objective, advantage, weight, old=old if changed else None
        )
        exact = model.gradient()
        for max_batch in (4, 7, None):
            model.zero_grad()
            forest = rollout(plan, old, UIDS, seed=5, keep_velocity=True, max_batch=7, **F64)
            anchor = "rollout" if changed and objective.anchor == "policy" else "auto"
            stats = gradient(
                forest, model, advantage, weight, objective, anchor=anchor, max_batch=max_batch
            )
            gap = float((model.gradient() - exact).norm() / exact.norm())
            assert gap <= 1e-12, (changed, max_batch, gap)
            assert int(stats.ratio.edges) == len(edges)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_invariant_18_nft_on_policy_is_awm_with_t2_over_w_whatever_beta(beta, toy):
    plan, advantage, weight = setting()
    model, edges = toy(), plan.trained()
    forest = rollout(plan, model, UIDS, seed=5, **F64)
    for e in edges:
        one = RenoisedEdge(plan, forest, model, None, e)
        w = one.t * (one.v - one.u).abs().mean().detach()
        a = advantage[e, 0] - advantage[e, 1]
        loss = a * one.t**2 * (one.v - one.u).square().mean() / w
        (weight[e] / len(edges) * loss).backward()
    exact = model.gradient()
    model.zero_grad()
    gradient(forest, model, advantage, weight, ContrastiveMatching(beta=beta))
    assert float((model.gradient() - exact).norm() / exact.norm()) <= 1e-12


def test_invariant_18_awm_on_policy_and_ghuber_limits(toy):
    plan, advantage, weight = setting()
    grads = {}
    for name, options in {
        "t": {"weighting": "t"},
        "one": {"weighting": "ghuber", "power": 1.0},
        "quarter": {},
    }.items():
        model = toy()
        forest = rollout(plan, model, UIDS, seed=5, **F64)
        stats = gradient(forest, model, advantage, weight, AdvantageMatching(**options))
        assert float(stats.ratio.max_abs_dev) == 0.0
        grads[name] = model.gradient()
    assert float((grads["t"] - grads["one"]).norm() / grads["t"].norm()) <= 1e-9
    assert float((grads["t"] - grads["quarter"]).norm() / grads["t"].norm()) > 0.1


def test_invariant_14_zero_advantage(toy):
    """No gradient from AWM, DGPO and RWR; none from NFT at the old policy, some away from it."""
    plan, advantage, weight = setting()
    for changed in (False, True):
        for objective in (AdvantageMatching(), Preference(), ContrastiveMatching()):
            old, model = toy(), toy()
            forest = rollout(plan, old, UIDS, seed=5, keep_velocity=True, **F64)
            if changed:
                shake(model)
            anchor = "rollout" if changed and objective.anchor == "policy" else "auto"
            stats = gradient(forest, model, 0 * advantage, weight, objective, anchor=anchor)
            silent = not isinstance(objective, ContrastiveMatching)
            assert (stats.parents == 0) == silent
            if not silent:
                assert (float(model.gradient().norm()) > 1e-6) == changed


def test_dgpo_toy_of_section_7_3():
    """S = -.025, and dL/dmiss_i = beta sigmoid(S) A_i, with beta / G as the group's beta."""
    advantage = torch.tensor([1.2, 0.1, -0.5, -0.8], dtype=torch.float64)
    misses = torch.tensor([0.30, 0.28, 0.35, 0.31], dtype=torch.float64)
    reference = torch.tensor([0.31, 0.28, 0.34, 0.33], dtype=torch.float64)
    counter = torch.tensor([[i, -1, 0] for i in range(4)], dtype=torch.int32)
    mix = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    noise = Noise(torch.zeros(3, dtype=torch.int64), counter, mix)
    edges = Edges(
        child_start=torch.arange(5),
        noise=noise,
        image=ops.philox_normal(noise, 1, torch.float64),  # the target u is then 0
        numbers=torch.ones(4, 1, dtype=torch.float64),
        advantage=torch.stack([advantage.clamp(min=0), (-advantage).clamp(min=0)], 1),
        weight=torch.full((4,), 0.25, dtype=torch.float64),
        group=torch.zeros(4, dtype=torch.int64),
    )
    v = misses.sqrt()[:, None].requires_grad_()
    result = Preference(beta=100 / 4).loss(v, reference.sqrt()[:, None], edges)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(math.log1p(math.exp(-0.025)), abs=1e-12)
    by_miss = v.grad[:, 0] / (2 * misses.sqrt())
    np.testing.assert_allclose(by_miss, [14.813, 1.234, -6.172, -9.875], atol=6e-4)


def test_dgpo_at_the_reference_is_log_2_and_a_pair_is_flow_dpo(toy):
    plan, advantage, _ = setting(group=2)
    ones = np.ones(len(plan))
    model = toy()
    model.base.load_state_dict(model.module.state_dict())
    forest = rollout(plan, model, UIDS, seed=5, **F64)
    pair = np.where(advantage > 0, 1.0, 0.0)
    stats = gradient(forest, model, pair, ones, Preference(beta=50.0))
    assert float(stats.loss) == pytest.approx(math.log(2), abs=1e-12)
    shake(model)
    model.zero_grad()
    stats = gradient(forest, model, pair, ones, Preference(beta=50.0))
    edges = [RenoisedEdge(plan, forest, model, None, e) for e in plan.trained()]
    total = 0.0
    for prompt in (0, 1):
        for label in range(len(TIMES)):
            mine = [
                (e, pair[i])
                for e, i in zip(edges, plan.trained(), strict=True)
                if (e.prompt, e.label) == (prompt, label)
            ]
            w, lose = (next(e for e, a in mine if a[k]) for k in (0, 1))
            gains = [(e.u - e.v).square().mean() - (e.u - e.ref).square().mean() for e in (w, lose)]
            total = total - torch.nn.functional.logsigmoid(-(100.0 / 2) * (gains[0] - gains[1]))
    assert float(stats.loss) == pytest.approx(float(total.detach()) / 6, rel=1e-12)
    swapped = gradient(forest, model, pair[:, ::-1].copy(), ones, Preference(beta=50.0))
    assert float(swapped.loss) != pytest.approx(float(stats.loss), abs=1e-3)


def test_a_preference_group_counts_whole_however_few_of_it_have_advantages():
    plan, _, _ = setting()
    objective = Preference(beta=2.0)
    numbers = objective.numbers(plan, plan.trained())
    assert (numbers == 1.0).all()
    half = plan.trained()[::2]
    assert objective.numbers(plan, half).mean() == pytest.approx(2.0)


def test_groups_stay_together_in_a_micro_batch(toy):
    plan, advantage, weight = setting()
    model = toy()
    forest = rollout(plan, model, UIDS, seed=5, **F64)
    with pytest.raises(ValueError, match="max_batch must hold a whole group of 4, got 3"):
        gradient(forest, model, advantage, weight, Preference(), max_batch=3)
    model.rows.clear()
    gradient(forest, model, advantage, weight, Preference(), max_batch=9)
    assert model.rows == [8, 8, 8]


def test_later_updates_use_the_velocities_of_the_rollout(toy):
    plan, advantage, weight = setting(updates=2)
    model = toy()
    forest = rollout(plan, model, UIDS, seed=5, **F64)
    assert forest.velocity is not None
    for update in (0, 1):
        stats = gradient(forest, model, advantage, weight, AdvantageMatching(), update=update)
        assert float(stats.ratio.max_abs_dev) <= 1e-12
        assert int(stats.ratio.edges) == len(plan.trained()) // 2
    with pytest.raises(ValueError, match="needs stored velocities, got none at row"):
        gradient(forest, model, advantage, weight, AdvantageMatching(), anchor="rollout")
    shake(model)
    stats = gradient(forest, model, advantage, weight, AdvantageMatching(), update=1)
    assert float(stats.ratio.max_abs_dev) > 1e-3


def test_counts_and_unshared_chains_of_re_noised_leaves():
    plan = images_and_times(group=4)
    counts = plan.counts()
    assert (counts.forwards, counts.trained_edges, counts.trained_parents) == (20, 12, 12)
    chains = unshare(plan).plan
    assert chains.counts() == counts
    assert len(share(chains)) == len(plan)


def test_history_starts_anew_after_an_image():
    t = Tree()
    x = t.leaf(t.chain(t.roots(2), SG[1:], dpmpp(2, warm_up=True)))
    x = t.grow(x, 0.6, renoise)
    t.leaf(t.chain(x, [0.4, 0.2, 0.0], dpmpp(2, warm_up=True)))
    plan = t.plan()
    again = plan.history & (plan.depth > 5)
    assert set(plan.sigma[again]) == {0.2}
    with pytest.raises(ValueError, match="order 2 must have 1 levels above the node, got 0"):
        t.grow(x, 0.4, dpmpp(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdvantageMatching(weighting="w"), "weighting must be uniform, t, t2 or ghuber"),
        (lambda: AdvantageMatching(power=0.0), r"power must be in \(0, 1\], got 0.0"),
        (lambda: AdvantageMatching(kl_form="gaussian"), "kl_form must be velocity, got 'gaussian'"),
        (lambda: ContrastiveMatching(beta=0.0), "beta and advantage_max must be positive, got 0.0"),
        (lambda: Preference(beta=-1.0), "beta must be positive, got -1.0"),
        (lambda: renoise((), 0.5, 0.7), "sigma must be 0 and next_sigma in"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_objective_names_edges_that_are_not_of_its_kind(toy):
    plan, advantage, weight = setting()
    forest = rollout(plan, toy(), UIDS, seed=5, **F64)
    with pytest.raises(ValueError, match=r"must be sampling steps \(b != 0\) for ClippedRatio"):
        gradient(forest, toy(), advantage, weight, ClippedRatio())
