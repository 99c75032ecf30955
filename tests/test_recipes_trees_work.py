"""Work of the tree recipes: published counts less their waste, shared and as chains."""

import math

import numpy as np
import pytest

from branchcore import passes, recipes, schedule
from branchcore.recipes.branching import geometric_chances, scaled_splits
from branchcore.recipes.scale import prime_factors

SD35, FLUX = schedule.flow_match_euler(10), schedule.shifted_linear(16, 3)
SG20 = schedule.shifted_linear(20, 3)

TREES = [
    "branch_grpo", "branch_mix", "branchcore", "dynamic_tree_rpo", "g2rpo", "instant_rewards",
    "multi_grpo", "tempflow_grpo", "tree_grpo", "vgpo",
]  # fmt: skip

STEPS = (10, 16, 20, 25)
# Released work per prompt: model forwards, trained edges, distinct trained states, decodes.
OFFICIAL = {
    12: {
        "branch": [(83, 94, 83, 12), (145, 156, 145, 12), (175, 186, 175, 12), (227, 238, 227, 12)],
        "depth": [(83, 70, 59, 12), (145, 108, 97, 12), (175, 126, 115, 12), (227, 166, 155, 12)],
        "width": [(83, 58, 47, 12), (145, 90, 79, 12), (175, 108, 97, 12), (227, 136, 125, 12)],
        "mix": [(83, 22, 11, 12), (145, 24, 13, 12), (175, 22, 11, 12), (227, 22, 11, 12)],
        "tree": [(81, 18, 7, 12), (152, 18, 7, 12), (200, 18, 7, 12), (260, 18, 7, 12)],
        "tempflow": [
            (558, 108, 18, 108), (1470, 180, 30, 180), (2318, 228, 38, 228), (3648, 288, 48, 288)],
        "g2rpo": [
            (718, 60, 5, 121), (1792, 96, 8, 193), (2780, 120, 10, 241), (4201, 144, 12, 289)],
        "ideal": [(47, 18, 7, 12), (73, 18, 7, 12), (91, 18, 7, 12), (107, 18, 7, 12)],
    },
    16: {
        "branch": [
            (99, 114, 99, 16), (165, 180, 165, 16), (203, 218, 203, 16), (263, 278, 263, 16)],
        "depth": [(99, 82, 67, 16), (165, 116, 101, 16), (203, 138, 123, 16), (263, 182, 167, 16)],
        "width": [(99, 74, 59, 16), (165, 116, 101, 16), (203, 138, 123, 16), (263, 174, 159, 16)],
        "mix": [(99, 34, 19, 16), (165, 36, 21, 16), (203, 34, 19, 16), (263, 34, 19, 16)],
        "tree": [(97, 30, 15, 16), (192, 30, 15, 16), (256, 30, 15, 16), (336, 30, 15, 16)],
        "tempflow": [
            (756, 144, 36, 144), (1980, 240, 60, 240), (3116, 304, 76, 304), (4896, 384, 96, 384)],
        "g2rpo": [
            (954, 80, 5, 161), (2384, 128, 8, 257), (3700, 160, 10, 321), (5593, 192, 12, 385)],
        "ideal": [(51, 30, 15, 16), (101, 30, 15, 16), (107, 30, 15, 16), (151, 30, 15, 16)],
    },
    24: {
        "branch": [
            (139, 162, 139, 24), (229, 252, 229, 24), (283, 306, 283, 24), (367, 390, 367, 24)],
        "depth": [
            (139, 114, 91, 24), (229, 156, 133, 24), (283, 186, 163, 24), (367, 246, 223, 24)],
        "width": [
            (139, 102, 79, 24), (229, 156, 133, 24), (283, 186, 163, 24), (367, 234, 211, 24)],
        "mix": [(139, 42, 19, 24), (229, 44, 21, 24), (283, 42, 19, 24), (367, 42, 19, 24)],
        "tree": [(138, 38, 15, 24), (280, 38, 15, 24), (376, 38, 15, 24), (496, 38, 15, 24)],
        "tempflow": [
            (1116, 216, 36, 216), (2940, 360, 60, 360), (4636, 456, 76, 456), (7296, 576, 96, 576)],
        "g2rpo": [
            (1426, 120, 5, 241), (3568, 192, 8, 385), (5540, 240, 10, 481), (8377, 288, 12, 577)],
        "ideal": [(67, 38, 15, 24), (133, 38, 15, 24), (139, 38, 15, 24), (199, 38, 15, 24)],
    },
    81: {
        "branch": [
            (454, 534, 454, 81), (754, 834, 754, 81), (928, 1008, 928, 81), (1207, 1287, 1207, 81)],
        "depth": [
            (454, 372, 292, 81), (754, 510, 430, 81), (928, 603, 523, 81), (1207, 801, 721, 81)],
        "width": [
            (454, 332, 252, 81), (754, 510, 430, 81), (928, 603, 523, 81), (1207, 760, 680, 81)],
        "mix": [(454, 129, 49, 81), (754, 132, 52, 81), (928, 126, 46, 81), (1207, 126, 46, 81)],
        "tree": [(454, 120, 40, 81), (932, 120, 40, 81), (1256, 120, 40, 81), (1661, 120, 40, 81)],
        "tempflow": [
            (3726, 729, 81, 729), (9855, 1215, 135, 1215),
            (15561, 1539, 171, 1539), (24516, 1944, 216, 1944)],
        "g2rpo": [
            (4789, 405, 5, 811), (12004, 648, 8, 1297),
            (18650, 810, 10, 1621), (28213, 972, 12, 1945)],
        "ideal": [(211, 120, 40, 81), (430, 120, 40, 81), (442, 120, 40, 81), (640, 120, 40, 81)],
    },
}  # fmt: skip


def grown(name, sigmas, **options):
    recipe = recipes.build(name, sigmas, **options)
    return recipe, recipe.plan([0], seed=0, iteration=0)


def kept_work(recipe, plan):
    """F, E, P, D of what pruning leaves."""
    rewards = np.random.default_rng(0).normal(size=(int(plan.leaf.sum()), 1))
    value = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).value
    kept = plan.train & (recipe.prune(plan, value, 0) > 0)
    forwards, _, _, decodes = plan.counts()
    return forwards, int(kept.sum()), len(np.unique(plan.action[kept])), decodes


def own_work(method, leaves, steps):
    """F, E, P, D of our recipe; TreeGRPO's F is the mean over where its window starts."""
    sigmas, factors = schedule.shifted_linear(steps, 3), prime_factors(leaves)
    splits = {"splits": scaled_splits("dense", steps, len(factors)), "branching": factors}
    if method == "tree":
        chances = geometric_chances(0.5, steps - len(factors))
        plans = [
            grown("tree_grpo", sigmas, branching=factors, start=i)[1].counts()
            for i in range(len(chances))
        ]
        assert {c[1:] for c in plans} == {plans[0][1:]}
        return (sum(p * c[0] for p, c in zip(chances, plans, strict=True)), *plans[0][1:])
    children = {16: 4, 81: 9}.get(leaves, 6)
    name, options = {
        "branch": ("branch_grpo", splits),
        "depth": (
            "branch_grpo",
            {
                **splits,
                "pruning": "depth",
                "prune_depths": range(steps - steps // 4 + 1, steps + 1),
            },
        ),
        "width": ("branch_grpo", {**splits, "pruning": "extremes"}),
        "mix": ("branch_mix", splits),
        "tempflow": ("tempflow_grpo", {"trunks": leaves // children, "children": children}),
        "g2rpo": ("g2rpo", {"group": leaves, "strides": (1, 2)}),
        "ideal": ("branchcore", splits),
    }[method]
    return kept_work(*grown(name, sigmas, **options))


def correction(method, leaves, steps, official):
    """What the released work has too much, per prompt."""
    if method == "branch":
        # the edges into depth T, which no reward sees
        return 0, leaves, leaves, 0
    if method == "width":
        # half of the edges past the last split, of R levels; whole chains of R - 1 live ones stay
        factors = prime_factors(leaves)
        levels = steps - scaled_splits("dense", steps, len(factors))[-1] - 1
        full = OFFICIAL[leaves]["branch"][STEPS.index(steps)][1]
        after = official[1] - (full - leaves * levels)
        assert abs(after - leaves * levels / 2) <= 0.5
        less = after - leaves // 2 * (levels - 1)
        return 0, less, less, 0
    if method == "g2rpo":
        # the anchor's second half and its image; the SDE forward of every child; two states that
        # both strides' tails begin with
        half = steps // 2
        return steps - half + leaves * half + 2 * leaves * half, 0, 0, 1
    return 0, 0, 0, 0


@pytest.mark.parametrize("leaves", OFFICIAL)
@pytest.mark.parametrize("method", OFFICIAL[12])
def test_work_is_the_published_less_its_waste(method, leaves):
    for steps, official in zip(STEPS, OFFICIAL[leaves][method], strict=True):
        less = correction(method, leaves, steps, official)
        F, E, P, D = own_work(method, leaves, steps)
        wanted = tuple(o - c for o, c in zip(official, less, strict=True))
        assert (math.floor(F + 0.5), E, P, D) == wanted, steps


@pytest.mark.parametrize(
    ("name", "sigmas", "options", "chains", "counts", "nodes", "waves", "widest"),
    [
        ("branch_grpo", SG20, {}, 320, (203, 202, 187, 16), 219, 20, 16),
        ("branch_mix", SG20, {}, 320, (203, 34, 19, 16), 219, 20, 16),
        ("branchcore", SG20, {}, 224, (107, 30, 15, 16), 123, 14, 16),
        ("tempflow_grpo", SD35, {}, 2160, (1116, 216, 36, 216), 1332, 10, 216),
        ("tempflow_grpo", SD35, {"trunks": 1}, 540, (279, 54, 9, 54), 333, 10, 54),
        ("g2rpo", FLUX, {}, 3372, (1700, 96, 8, 288), 1988, 16, 192),
        ("g2rpo", FLUX, {"strides": (1, 2)}, 2544, (1496, 96, 8, 192), 1688, 16, 168),
        ("g2rpo", FLUX, {"strides": (1,)}, 1536, (1112, 96, 8, 96), 1208, 16, 96),
        ("tree_grpo", SD35, {"start": 0}, 270, (202, 39, 13, 27), 229, 10, 27),
        ("dynamic_tree_rpo", SD35, {}, 160, (111, 30, 15, 16), 127, 10, 16),
        ("multi_grpo", SD35, {}, 240, (188, 184, 164, 24), 212, 10, 24),
        ("vgpo", SD35, {}, 1296, (240, 216, 216, 216), 456, 10, 24),
        ("instant_rewards", SD35, {}, 1296, (252, 216, 36, 216), 468, 10, 28),
    ],
)
def test_shared_and_unshared_work(name, sigmas, options, chains, counts, nodes, waves, widest):
    plan = grown(name, sigmas, **options)[1]
    assert plan.counts() == counts
    assert passes.unshare(plan).plan.counts().forwards == chains
    per_level = [int(plan.evaluated[lo:hi].sum()) for lo, hi in plan.levels()]
    assert (len(plan), sum(n > 0 for n in per_level), max(per_level)) == (nodes, waves, widest)


@pytest.mark.parametrize(("strides", "wanted"), [((1,), 1216), ((1, 2), 1792), ((1, 2, 3), 2188)])
def test_g2rpo_released_work_follows_from_the_shared_plan(strides, wanted):
    """Anchor to its end, the SDE forward per child, every tail from its own child."""
    plan = grown("g2rpo", FLUX, strides=strides)[1]
    child = np.where(plan.stochastic, np.arange(len(plan)), -1)
    for lo, hi in plan.levels()[1:]:
        child[lo:hi] = np.maximum(child[lo:hi], child[plan.parent[lo:hi]])
    tail = plan.depth[plan.leaf] - plan.depth[child[plan.leaf]]
    assert 16 + plan.counts().trained_edges + tail.sum() == wanted
    lengths = {1: range(15, 7, -1), 2: (8, 7, 7, 6, 6, 5, 5, 4), 3: (5, 5, 5, 4, 4, 4, 3, 3)}
    for label in range(8 * len(strides)):
        k, j = divmod(label, len(strides))
        assert set(tail[plan.label[plan.leaf] == label]) == {lengths[strides[j]][k]}


def test_tree_grpo_cost_accounting():
    """3.4: trained states (k^d - 1) / (k - 1), forwards by start, 177.4 on average against 270."""
    sizes = [(3, 3, 1, 13), (2, 3, 1, 7), (2, 4, 1, 15), (4, 3, 1, 21), (3, 3, 2, 26)]
    for k, depth, trees, states in sizes:
        plan = grown("tree_grpo", SD35, branching=k, depth=depth, trees=trees, start=0)[1]
        assert plan.counts()[1:3] == (k * states, states)
    starts = [grown("tree_grpo", SD35, start=i)[1].counts().forwards for i in range(7)]
    assert starts == [202, 176, 150, 124, 98, 72, 46]
    chances = geometric_chances(0.5, 7)
    np.testing.assert_allclose(
        chances, [0.50394, 0.25197, 0.12598, 0.06299, 0.03150, 0.01575, 0.00787], atol=5e-6
    )
    assert np.dot(chances, range(7)) == pytest.approx(0.945, abs=5e-4)
    assert np.dot(chances, starts) == pytest.approx(177.4, abs=0.05)
    np.testing.assert_allclose(geometric_chances(1.0, 4), 0.25)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("leaves", [7, 12, 16, 24, 81])
def test_equal_leaves(name, leaves):
    """One image per leaf, times the branching steps of a trunk or projections."""
    options = recipes.leaf_options(tuple(recipes.options_of(name)), leaves, 10)
    plan = grown(name, SD35, **options)[1]
    each = {"tempflow_grpo": 9, "instant_rewards": 9, "vgpo": 9, "g2rpo": 15}
    assert plan.counts().decodes == leaves * each.get(name, 1)


@pytest.mark.parametrize(
    "name", ["branch_grpo", "branch_mix", "branchcore", "multi_grpo", "tree_grpo"]
)
@pytest.mark.parametrize("steps", [3, 4, 6])
@pytest.mark.parametrize("leaves", [4, 16, 32])
def test_few_steps_have_as_many_leaves(name, steps, leaves):
    options = recipes.leaf_options(tuple(recipes.options_of(name)), leaves, steps)
    sigmas = schedule.shifted_linear(steps, 3)
    plan = recipes.build(name, sigmas, **options).plan([0], seed=0, iteration=0)
    assert plan.counts().decodes == leaves


def test_scaled_splits_are_published_ones_and_never_twice_the_same():
    for preset, every in (("dense", 3), ("mixed", 4), ("sparse", 5)):
        assert scaled_splits(preset, 20) == (0, every, 2 * every, 3 * every)
        for steps in range(5, 40):
            assert len(set(scaled_splits(preset, steps))) == 4
            assert scaled_splits(preset, steps)[-1] < steps - 1
