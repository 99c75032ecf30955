"""Chain methods: published amounts of work, MixGRPO's windows, Flash's tail, re-noised images."""

import itertools
import math

import numpy as np
import pytest

from branchcore import passes, recipes, schedule, steps
from branchcore.recipes.chains import logit_normal
from branchcore.recipes.flash_grpo import rectification
from branchcore.recipes.recipe import Moment
from branchcore.recipes.windows import (
    SCHEDULES,
    SlidingWindow,
    exponential_interval,
    linear_interval,
    moving_start,
)
from branchcore.trainer_config import TrainerConfig

SG10, SG16, SG25 = (schedule.shifted_linear(n, 3) for n in (10, 16, 25))
SD10, SD14 = schedule.flow_match_euler(10), schedule.flow_match_euler(14)
CHAINS = (
    "flow_grpo", "flow_grpo_fast_v1", "flow_grpo_fast_v2", "dance_grpo", "mix_grpo",
    "mix_grpo_flash", "grpo_guard", "flow_cps", "flow_dppo", "flash_grpo", "awm", "diffusion_nft",
    "dgpo", "flow_dpo", "flow_rwr",
)  # fmt: skip


def plan_of(name, sigmas, uids=(0,), iteration=0, seed=0, **options):
    recipe = recipes.build(name, sigmas, **options)
    return recipe.plan(list(uids), seed=seed, iteration=iteration)


def naive_forwards(plan):
    return passes.unshare(plan).plan.counts().forwards


def sde_steps(plan):
    return sorted({int(d) - 1 for d in plan.depth[plan.stochastic]})


@pytest.mark.parametrize(
    ("name", "sigmas", "options", "iteration", "chains", "counts", "nodes", "waves", "widest"),
    [
        ("flow_grpo", SD10, {}, 0, 240, (240, 216, 216, 24), 264, 10, 24),
        ("flow_grpo", schedule.flux_dynamic(6, 1024), {}, 0, 144, (144, 120, 120, 24), 168, 6, 24),
        ("grpo_guard", SD10, {}, 0, 240, (240, 216, 216, 24), 264, 10, 24),
        ("flow_cps", SD10, {}, 0, 240, (240, 216, 216, 24), 264, 10, 24),
        ("flow_grpo_fast_v2", SD10, {}, 0, 240, (240, 72, 72, 24), 264, 10, 24),
        ("flow_dppo", SD10, {}, 0, 160, (160, 48, 48, 16), 176, 10, 16),
        ("dance_grpo", SG16, {}, 0, 192, (181, 108, None, 12), 193, 16, 12),
        ("mix_grpo", SG25, {"interval": 1}, 5, 300, (234, 48, 37, 12), 246, 25, 12),
        ("mix_grpo", SG25, {"interval": 1}, 11, 300, (168, 48, 37, 12), 180, 25, 12),
        ("mix_grpo_flash", SG25, {"interval": 1}, 5, 168, (102, 48, 37, 12), 114, 14, 12),
        (
            "mix_grpo_flash", SG25, {"schedule": "frozen", "ratio": 0.2},
            0, 84, (73, 48, 37, 12), 85, 7, 12,
        ),
        ("awm", SD14, {}, 0, 336, (336, 144, 144, 24), 504, 14, 24),
        ("diffusion_nft", SD10, {}, 0, 240, (240, 216, 216, 24), 480, 10, 24),
        ("dgpo", SD10, {}, 0, 160, (160, 64, 64, 16), 240, 10, 16),
        ("flow_dpo", SD10, {"times": 1}, 0, 240, (240, 24, 24, 24), 288, 10, 24),
        ("flow_rwr", SD10, {}, 0, 240, (240, 216, 216, 24), 480, 10, 24),
    ],
)  # fmt: skip
def test_published_work(name, sigmas, options, iteration, chains, counts, nodes, waves, widest):
    plan = plan_of(name, sigmas, iteration=iteration, **options)
    for have, want in zip(plan.counts(), counts, strict=True):
        assert want is None or have == want
    per_level = [int(plan.evaluated[lo:hi].sum()) for lo, hi in plan.levels()]
    assert (len(plan), sum(n > 0 for n in per_level), max(per_level)) == (nodes, waves, widest)
    images = plan.matching.any()
    assert (plan.counts().forwards if images else naive_forwards(plan)) == chains


def test_fast_v1_work_for_every_branching_step():
    """T = 10, m = 9: shared k + 1 + 9 (T - k - 1), released k + 9 (T - k) = 90 - 8 k."""
    seen = {}
    for uid in range(60):
        plan = plan_of("flow_grpo_fast_v1", SD10, uids=(uid,), trunks=1)
        k = int(plan.depth[plan.stochastic].min()) - 1
        seen[k] = plan
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    for k, plan in seen.items():
        assert plan.counts() == (k + 1 + 9 * (9 - k), 18, 10, 9)
        assert plan.counts().forwards + 8 == 90 - 8 * k
        assert naive_forwards(plan) == 90
        assert sde_steps(plan) == [k, k + 1]
    per_level = [int(seen[3].evaluated[lo:hi].sum()) for lo, hi in seen[3].levels()]
    assert (len(seen[3]), sum(n > 0 for n in per_level), max(per_level)) == (67, 10, 9)


def test_fast_v1_branches_early_enough_on_short_schedules():
    recipe = recipes.flow_grpo_fast_v1([1.0, 0.7, 0.5, 0.2, 0.0], trunks=1, children=2)
    seen = {tuple(sde_steps(recipe.plan([u], seed=0, iteration=0))) for u in range(20)}
    assert seen == {(0, 1), (1, 2)}


def test_fast_v1_trunks_have_their_own_noise_and_step():
    plan = plan_of("flow_grpo_fast_v1", SD10, uids=(1,), trunks=5, children=3, window=1)
    first = [
        int(plan.depth[plan.stochastic & (plan.tree == root)].min())
        for root in np.unique(plan.tree)
    ]
    assert len(first) == 5
    assert len(set(first)) > 1
    assert len(set(plan.stream[plan.parent < 0, 0])) == 5
    assert len(np.unique(plan.group(("prompt",))[plan.leaf])) == 1
    dealt = plan_of("flow_grpo_fast_v1", SD10, uids=(1,), updates=2)
    for update in range(2):
        assert len(np.unique(dealt.tree[dealt.trained(update)])) == 1
        assert len(dealt.trained(update)) == 18


# F / E as released / P distinct states / D for 10, 16, 20 and 25 steps, by leaves
WORK = {
    "flow_grpo": {
        12: ((120, 108, 108, 12), (192, 180, 180, 12), (240, 228, 228, 12), (300, 288, 288, 12)),
        16: ((160, 144, 144, 16), (256, 240, 240, 16), (320, 304, 304, 16), (400, 384, 384, 16)),
        24: ((240, 216, 216, 24), (384, 360, 360, 24), (480, 456, 456, 24), (600, 576, 576, 24)),
        81: (
            (810, 729, 729, 81), (1296, 1215, 1215, 81),
            (1620, 1539, 1539, 81), (2025, 1944, 1944, 81),
        ),
    },
    "dance_grpo": {
        12: ((120, 60, 54, 12), (192, 108, 102, 12), (240, 132, 126, 12), (300, 168, 162, 12)),
        16: ((160, 80, 72, 16), (256, 144, 135, 16), (320, 176, 168, 16), (400, 224, 216, 16)),
        24: ((240, 120, 108, 24), (384, 216, 203, 24), (480, 264, 251, 24), (600, 336, 323, 24)),
        81: (
            (810, 405, 361, 81), (1296, 729, 681, 81),
            (1620, 891, 845, 81), (2025, 1134, 1088, 81),
        ),
    },
    "mix_grpo": {
        12: ((120, 48, 37, 12), (192, 48, 37, 12), (240, 48, 37, 12), (300, 48, 37, 12)),
        16: ((160, 64, 49, 16), (256, 64, 49, 16), (320, 64, 49, 16), (400, 64, 49, 16)),
        24: ((240, 96, 73, 24), (384, 96, 73, 24), (480, 96, 73, 24), (600, 96, 73, 24)),
        81: ((810, 324, 244, 81), (1296, 324, 244, 81), (1620, 324, 244, 81), (2025, 324, 244, 81)),
    },
    "mix_grpo_flash": {
        12: ((89, 48, 37, 12), (138, 48, 37, 12), (172, 48, 37, 12), (213, 48, 37, 12)),
        16: ((119, 64, 49, 16), (185, 64, 49, 16), (229, 64, 49, 16), (284, 64, 49, 16)),
        24: ((178, 96, 73, 24), (277, 96, 73, 24), (343, 96, 73, 24), (427, 96, 73, 24)),
        81: ((602, 324, 244, 81), (935, 324, 244, 81), (1158, 324, 244, 81), (1440, 324, 244, 81)),
    },
    "flash_star": {
        12: ((48, 48, 37, 12), (60, 48, 37, 12), (72, 48, 37, 12), (84, 48, 37, 12)),
        16: ((64, 64, 49, 16), (80, 64, 49, 16), (96, 64, 49, 16), (112, 64, 49, 16)),
        24: ((96, 96, 73, 24), (120, 96, 73, 24), (144, 96, 73, 24), (168, 96, 73, 24)),
        81: ((324, 324, 244, 81), (405, 324, 244, 81), (486, 324, 244, 81), (567, 324, 244, 81)),
    },
}  # fmt: skip
CELLS = [(n, i, t) for n in (12, 16, 24, 81) for i, t in enumerate((10, 16, 20, 25))]


@pytest.mark.parametrize(("leaves", "column", "num_steps"), CELLS)
def test_work_of_chains(leaves, column, num_steps):
    sg = schedule.shifted_linear(num_steps, 3)
    frozen = {"schedule": "frozen", "ratio": 0.2, "noisy_leaves": True}
    for name, options in (("flow_grpo", {}), ("mix_grpo", {}), ("mix_grpo_flash", frozen)):
        plan = plan_of(name, sg, group=leaves, **options)
        forwards, *rest = WORK["flash_star" if options else name][leaves][column]
        assert tuple(plan.counts()[1:]) == tuple(rest)
        assert naive_forwards(plan) == forwards
        assert plan.counts().forwards == forwards - (0 if name == "flow_grpo" else leaves - 1)


@pytest.mark.parametrize(("leaves", "column", "num_steps"), CELLS)
def test_work_of_dance_grpo_whose_parents_are_a_mean_over_draws(leaves, column, num_steps):
    forwards, edges, parents, decodes = WORK["dance_grpo"][leaves][column]
    recipe = recipes.dance_grpo(schedule.shifted_linear(num_steps, 3), group=leaves)
    first = recipe.plan([0], seed=0, iteration=0)
    assert naive_forwards(first) == forwards
    assert first.counts()[1] == edges
    assert first.counts()[3] == decodes
    share = int(0.6 * (num_steps - 1)) / (num_steps - 1)
    exact = edges - leaves * share + 1 - (1 - share) ** leaves
    assert round(exact) == parents
    draws = 40 if leaves <= 16 else 4
    got = [recipe.plan([u], seed=1, iteration=0).counts().trained_parents for u in range(draws)]
    error = math.sqrt(leaves * share * (1 - share) / draws)
    assert abs(np.mean(got) - exact) <= 4 * error


@pytest.mark.parametrize("num_steps", [10, 16, 20, 25])
def test_flash_work_is_the_mean_over_windows_0_to_t_minus_w_of_which_the_last_cannot_be(num_steps):
    """The published mean has a window on the last step too, which ends at the image: T forwards."""
    sg, column = schedule.shifted_linear(num_steps, 3), (10, 16, 20, 25).index(num_steps)
    options = {"interval": 1, "roll_back": False, "noisy_leaves": True}
    recipe = recipes.mix_grpo_flash(sg, group=2, **options)
    plans = [recipe.plan([0], seed=0, iteration=i) for i in range(num_steps - 4)]
    assert [sde_steps(p)[0] for p in plans] == list(range(num_steps - 4))
    nfe = [naive_forwards(p) // 2 for p in plans]
    for leaves in (12, 16, 24, 81):
        forwards, *rest = WORK["mix_grpo_flash"][leaves][column]
        assert round(leaves * np.mean([*nfe, num_steps])) == forwards
        last = plan_of("mix_grpo_flash", sg, group=leaves, iteration=num_steps, **options)
        assert tuple(last.counts()[1:]) == tuple(rest)
        assert naive_forwards(last) == leaves * nfe[-1]


def window(**options):
    given = {"recipe": "r", "steps": 25, "window": 4, "schedule": "progressive", "interval": 25}
    return SlidingWindow(**{**given, **options})


def at(moving, iteration, uid=0, seed=0):
    return list(moving.at(Moment(seed=seed, iteration=iteration, uid=uid)))


def test_19_progressive_windows():
    moving = window(roll_back=False)
    for it in range(800):
        first = min(it // 25, 25 - 4 - 1)
        assert at(moving, it) == list(range(first, first + 4))
    starts = [at(moving, it)[0] for it in range(300)]
    assert sorted(set(starts)) == list(range(12))
    two = window(roll_back=False, stride=3, interval=2)
    assert [at(two, it)[0] for it in range(0, 18, 2)] == [0, 3, 6, 9, 12, 15, 18, 20, 20]


def test_19_the_released_list_but_for_its_empty_window():
    moving = window(cut=True, interval=1, roll_back=False)
    for first in range(23):
        assert at(moving, first) == list(range(first, min(first + 4, 23)))
    assert at(moving, 23) == at(moving, 10**6) == [22]


def test_19_rolling_back():
    assert [at(window(interval=2), it)[0] for it in range(41, 46)] == [20, 0, 0, 1, 1]
    assert [at(window(interval=1, start=18), it)[0] for it in range(7)] == [18, 19, 20] * 2 + [18]


def test_intervals_of_the_decaying_windows():
    assert [linear_interval(i, 25, 10, 1) for i in (0, 1, 5, 12, 22, 23)] == [10, 9, 8, 5, 1, 1]
    got = [exponential_interval(i, 25) for i in (0, 13, 14, 15, 20)]
    assert got == [25, 25, 23, 21, 13]
    linear = window(schedule="linear", interval=10)
    starts = [at(linear, it)[0] for it in range(24)]
    assert starts == [0] * 10 + [1] * 9 + [2] * 5
    exponential = window(schedule="exponential", interval=3)
    assert [at(exponential, it)[0] for it in (38, 39, 41, 42, 44, 45)] == [12, 13, 13, 14, 14, 15]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cut", [False, True])
def test_windows_are_never_empty_and_pure(name, cut):
    for num_steps, length, stride in itertools.product((4, 9), (1, 2), (1, 2, 5)):
        options = {"steps": num_steps, "window": length, "stride": stride, "cut": cut}
        moving = window(schedule=name, interval=3, **options)
        seen = [at(moving, it) for it in range(80)]
        again = window(schedule=name, interval=3, **options)
        assert [at(again, it, uid=5) for it in reversed(range(80))] == seen[::-1]
        for steps_ in seen:
            assert 1 <= len(steps_) <= length
            assert cut or len(steps_) == length
            assert 0 <= steps_[0] <= steps_[-1] <= num_steps - (3 if cut else 2)
        if name != "frozen" and stride == 1:
            assert len({s[0] for s in seen}) == moving.last + 1


def test_random_windows_agree_for_all_prompts_and_are_uniform():
    plan = plan_of("mix_grpo", SG25, uids=range(6), iteration=3, schedule="random", group=2)
    assert len(sde_steps(plan)) == 4
    moving = window(schedule="random")
    starts = [at(moving, it)[0] for it in range(2100)]
    assert starts[3] == sde_steps(plan)[0]
    counts = np.bincount(starts, minlength=21)
    assert len(counts) == 21
    assert ((counts - 100) ** 2 / 100).sum() <= 45.3  # chi^2 of 20 degrees at .001


def test_frozen_windows_need_no_stride():
    moving = window(schedule="frozen", stride=0, start=7)
    assert [at(moving, it) for it in (0, 999)] == [[7, 8, 9, 10]] * 2
    frozen = recipes.mix_grpo(SG25, group=2, schedule="frozen", stride=0)
    assert not frozen.varies
    assert sde_steps(frozen.plan([0], seed=0, iteration=999)) == [0, 1, 2, 3]


def test_windows_move_with_the_recipe():
    recipe = recipes.mix_grpo(SG25, group=2)
    first = [sde_steps(recipe.plan([0], seed=0, iteration=it))[0] for it in (0, 24, 25, 299)]
    assert first == [0, 0, 1, 11]
    assert moving_start(7, lambda at: at + 1, start=1, last=3, stride=1, roll_back=True) == 3
    assert moving_start(9, lambda at: at + 1, start=1, last=3, stride=1, roll_back=True) == 1


def test_visit_probabilities_of_fast_v2():
    """(0, 5): w = 3 visits its steps with 1/3, 2/3, 1, 2/3, 1/3; w = 2 with 1/4, 1/2, ..., 1/4."""
    for length, wanted in ((3, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]), (2, [0.25, 0.5, 0.5, 0.5, 0.25])):
        recipe = recipes.flow_grpo_fast_v2(SD10, group=2, window=length)
        visits = np.zeros(9)
        for uid in range(500):
            visited = sde_steps(recipe.plan([uid], seed=0, iteration=0))
            assert visited == list(range(visited[0], visited[0] + length))
            visits[visited] += 1 / 500
        error = np.sqrt(np.array(wanted) * (1 - np.array(wanted)) / 500)
        assert (np.abs(visits[:5] - wanted) <= 4 * error + 1e-12).all()
        assert not visits[5:].any()


def test_fast_v2_windows_per_prompt_or_per_iteration():
    prompts = recipes.flow_grpo_fast_v2(SD10, group=2).plan(range(12), seed=0, iteration=0)
    own = [tuple(sde_steps(prompts.select([p]))) for p in range(12)]
    assert len(set(own)) == 3
    same = recipes.flow_grpo_fast_v2(SD10, group=2, per="iteration")
    plans = [same.plan(range(12), seed=0, iteration=it) for it in range(12)]
    assert {len(sde_steps(p)) for p in plans} == {3}
    assert len({tuple(sde_steps(p)) for p in plans}) == 3


def test_flow_dppo_draws_steps_of_the_first_half_alike_for_all_prompts():
    recipe = recipes.flow_dppo(SD10, group=2)
    drawn = [sde_steps(recipe.plan([0, 8], seed=0, iteration=it)) for it in range(100)]
    assert {len(d) for d in drawn} == {3}
    assert {s for d in drawn for s in d} == {0, 1, 2, 3, 4}
    assert any(d[2] - d[0] > 2 for d in drawn)
    assert len({tuple(d) for d in drawn}) == 10


def test_20_flash_nfe():
    recipe = recipes.mix_grpo_flash(SG25, group=2, interval=1, noisy_leaves=True)
    plans = [recipe.plan([0], seed=0, iteration=i) for i in range(21)]
    nfe = [naive_forwards(p) // 2 for p in plans]
    assert nfe[:15] == [11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18, 19, 19, 20]
    assert np.mean(nfe[:15]) == pytest.approx(15.6)
    assert [bool(p.sigma[p.leaf].any()) for p in plans] == [False] * 18 + [True] * 3
    np.testing.assert_array_equal(plans[18].sigma[plans[18].leaf], SG25[22])
    clean = recipes.mix_grpo_flash(SG25, group=2, interval=1)
    plans = [clean.plan([0], seed=0, iteration=i) for i in range(21)]
    assert not any(p.sigma[p.leaf].any() for p in plans)
    extra = [naive_forwards(p) // 2 - n for p, n in zip(plans, nfe, strict=True)]
    assert extra == [0] * 18 + [1] * 3


@pytest.mark.parametrize(("ratio", "wanted"), [(0.2, 7), (0.3, 9), (0.4, 11), (0.5, 14), (0.6, 16)])
def test_20_flash_star_nfe(ratio, wanted):
    plan = plan_of("mix_grpo_flash", SG25, group=2, schedule="frozen", ratio=ratio)
    assert naive_forwards(plan) == 2 * wanted


@pytest.mark.parametrize("order", [1, 2, 3])
def test_flash_tail_levels_and_solver(order):
    plan = plan_of("mix_grpo_flash", SG25, group=2, iteration=100, order=order)
    assert sde_steps(plan) == [5, 6, 7, 8]
    chain, node = [], int(np.flatnonzero(plan.leaf)[0])
    while node >= 0:
        chain.append(node)
        node = int(plan.parent[node])
    levels = plan.sigma[chain[::-1]]
    np.testing.assert_array_equal(levels[:10], SG25[:10])
    t = np.linspace(16 / 25, 0.0, 6)
    np.testing.assert_allclose(levels[9:], 3 * t / (1 + 2 * t), atol=1e-15)
    solver = steps.dpmpp(order)
    for i in range(10, 15):
        row = solver(levels[: i - 1][::-1].tolist(), float(levels[i - 1]), float(levels[i]))
        np.testing.assert_array_equal(plan.row[chain[::-1][i]], row[:4])
        assert plan.older[chain[::-1][i]] == row.d
    higher = plan.row[chain[4::-1], 2] != 0.0
    assert higher.tolist() == ([True] * 4 if order > 1 else [False] * 4) + [False]


def test_flash_at_ratio_1_has_all_levels_but_one():
    plan = plan_of("mix_grpo_flash", SG25, group=2, ratio=1.0, order=1)
    assert naive_forwards(plan) == 2 * 25
    assert len(np.unique(plan.sigma)) == 26


def test_flash_history_at_a_one_step_window():
    plan = plan_of("mix_grpo_flash", SG25, group=2, window=1, order=3)
    assert (plan.older != 0).any()
    assert plan.counts().trained_parents == 1


def test_best_of_group_is_the_identity(rng):
    for same_noise in (True, False):
        recipe = recipes.dance_grpo(SG10, group=6, best_of=6, same_noise=same_noise)
        plan = recipe.plan([0, 1], seed=0, iteration=0)
        np.testing.assert_array_equal(recipe.prune(plan, rng.normal(size=len(plan)), 0), 1.0)


def test_best_of_keeps_the_best_and_worst_chains(rng):
    recipe = recipes.dance_grpo(SG10, group=8, best_of=4, fraction=1.0)
    plan = recipe.plan([0, 1, 2], seed=0, iteration=0)
    rewards = rng.normal(size=(24, 1))
    credit = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan)))
    weight = recipe.prune(plan, credit.value, 0)
    owner = plan.prompt[plan.leaf]
    for prompt in range(3):
        mine = rewards[owner == prompt, 0]
        kept = weight[plan.leaf][owner == prompt]
        order = np.argsort(mine)
        np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(order[[0, 1, 6, 7]]))
        assert weight[plan.train & (plan.prompt == prompt)].sum() == 4 * 9
    everyone = recipes.dance_grpo(SG10, group=8, fraction=1.0)
    np.testing.assert_array_equal(
        everyone.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage, credit.advantage
    )


def test_best_of_with_equal_rewards_keeps_the_first_and_the_last():
    recipe = recipes.dance_grpo(SG10, group=6, best_of=3, fraction=1.0)
    plan = recipe.plan([0], seed=0, iteration=0)
    weight = recipe.prune(plan, np.zeros(len(plan)), 0)
    np.testing.assert_array_equal(weight[plan.leaf], [1, 0, 0, 0, 1, 1])


def test_flash_grpo_weights_are_the_released_table():
    """Wan2.1's 20 UniPC levels of shift 3, first ten steps."""
    wanted = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    t = np.linspace(0.999, 0.0, 21)
    sg = 3 * t / (1 + 2 * t)
    step = steps.linear_sde(0.0, sg[1])
    rows = [step((), sg[i], sg[i + 1]) for i in range(10)]
    np.testing.assert_allclose([r.s / -r.b for r in rows], wanted, atol=5e-5)


def test_flash_grpo_has_one_step_per_prompt_and_weights_of_mean_1():
    recipe = recipes.flash_grpo(schedule.shifted_linear(20, 3), group=3)
    seen = {}
    for uid in range(200):
        plan = recipe.plan([uid], seed=0, iteration=0)
        (i,) = sde_steps(plan)
        seen[i] = plan
        assert plan.counts() == (3 * 20 - 2 * (i + 1), 3, 1, 3)
        assert naive_forwards(plan) == 60 or uid > 3
    assert sorted(seen) == list(range(10))
    factors, raw = [], []
    for i in range(10):
        plan = seen[i]
        rewards = np.array([[0.0], [1.0], [2.0]])
        advantage = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
        top = advantage[plan.train][2, 0]
        factors.append(top / (1 / (math.sqrt(2 / 3) + 1e-4)))
        raw.append(rectification(plan)[plan.train][0])
        b, s = plan.row[plan.train][0, [1, 3]]
        assert factors[-1] * abs(b) / s == pytest.approx(factors[0] / raw[0], rel=1e-12)
    assert np.mean(factors) == pytest.approx(1.0, abs=1e-12)


def test_flash_grpo_group_differs_by_step_noise_or_by_roots():
    sg = schedule.shifted_linear(20, 3)
    assert (plan_of("flash_grpo", sg).parent < 0).sum() == 1
    apart = plan_of("flash_grpo", sg, same_noise=False)
    assert (apart.parent < 0).sum() == 8
    assert apart.counts() == (160, 8, 8, 8)


def times_of(plan):
    """(leaves, times) levels of each leaf's re-noised states, in order of growth."""
    leaves = np.flatnonzero(plan.leaf)
    return np.array([plan.sigma[plan.train & (plan.parent == leaf)] for leaf in leaves])


def test_awm_times_are_stratified():
    """T = 14: six parts of steps 1..11."""
    recipe = recipes.awm(SD14, group=4)
    drawn = np.concatenate([times_of(recipe.plan([u], seed=0, iteration=0)) for u in range(100)])
    parts = [[1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    for column, part in zip(drawn.T, parts, strict=True):
        np.testing.assert_array_equal(np.unique(column), np.sort(SD14[part]))
        share = np.mean(column == SD14[part[0]])
        assert abs(share - 1 / len(part)) <= 4 * math.sqrt(0.25 / 400)
    assert len(np.unique(recipe.plan([0], seed=0, iteration=0).stream[:, 0])) == 4 + 24 + 1


def test_awm_divides_the_clamped_advantage_by_its_bound():
    recipe = recipes.awm(SD14, group=4)
    plan = recipe.plan([0], seed=0, iteration=0)
    rewards = np.array([[3.0], [1.0], [2.0], [6.0]])
    advantage = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
    z = (rewards[:, 0] - 3.0) / (rewards.std() + 1e-4)
    leaves = np.flatnonzero(plan.leaf)
    for leaf, value in zip(leaves, z, strict=True):
        mine = advantage[plan.train & (plan.parent == leaf)]
        np.testing.assert_allclose(mine[:, 0] - mine[:, 1], value / 5, atol=1e-15)
    big = recipes.awm(SD14, group=40)
    plan = big.plan([0], seed=0, iteration=0)
    rewards = np.zeros((40, 1))
    rewards[0] = 1.0
    assert big.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage.max() == 1.0


def test_nft_times_are_all_levels_but_one():
    plan = plan_of("diffusion_nft", SD10, uids=(3,))
    drawn = times_of(plan)
    assert drawn.shape == (24, 9)
    missing = [set(SD10[:-1]) - set(row) for row in drawn]
    assert {len(m) for m in missing} == {1}
    assert len(set.union(*missing)) > 3
    halves = plan_of("diffusion_nft", SD10, updates=2)
    for update in range(2):
        assert len(np.unique(halves.parent[halves.trained(update)])) == 12
        assert len(halves.trained(update)) == 12 * 9


def test_dgpo_shares_levels_and_noise_in_the_group():
    plan = plan_of("dgpo", SD10, uids=(0, 1))
    for prompt in range(2):
        for label in range(4):
            mine = plan.train & (plan.prompt == prompt) & (plan.label == label)
            assert mine.sum() == 16
            assert len(np.unique(plan.sigma[mine])) == 1
            assert len(np.unique(plan.stream[mine, 0])) == 1
    assert len(np.unique(plan.stream[plan.train, 0])) == 4
    assert len(np.unique(plan.sigma[plan.train & (plan.prompt == 0)])) == 4
    recipe = recipes.dgpo(SD10, group=2)
    seen = np.concatenate(
        [np.unique(times_of(recipe.plan([u], seed=0, iteration=0))) for u in range(60)]
    )
    np.testing.assert_array_equal(np.unique(seen), np.sort(SD10[:7]))
    assert recipes.dgpo(SD10, group=20, beta=50.0).objective.beta == 2.5
    geneval = recipes.build_preset("dgpo", "sd3.5-m", group=2, times=5)
    got = np.unique(times_of(geneval.plan([0], seed=0, iteration=0)))
    np.testing.assert_array_equal(got, np.sort(SD10[:5]))


def test_flow_dpo_trains_the_best_against_the_worst():
    recipe = recipes.flow_dpo(SD10, group=5, times=3)
    plan = recipe.plan([0, 1], seed=0, iteration=0)
    rewards = np.array([[3.0], [1.0], [2.0], [6.0], [5.0], [1.0], [1.0], [1.0], [1.0], [1.0]])
    advantage = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
    leaves = np.flatnonzero(plan.leaf)
    signed = np.array([(advantage[plan.parent == leaf] @ [1, -1]).sum() for leaf in leaves])
    np.testing.assert_array_equal(signed, [0, -3, 0, 3, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(times_of(plan)[:5], np.tile(times_of(plan)[0], (5, 1)))
    assert len(np.unique(times_of(plan))) == 6
    assert recipe.objective.beta == 50.0


def test_flow_rwr_draws_levels_per_image():
    recipe = recipes.flow_rwr(SD10, group=5, times=3)
    plan = recipe.plan([0], seed=0, iteration=0)
    assert len(np.unique(times_of(plan))) == 15
    rewards = np.array([[3.0], [1.0], [2.0], [6.0], [3.0]])
    advantage = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
    z = (rewards[:, 0] - 3.0) / (rewards.std() + 1e-4)
    for leaf, value in zip(np.flatnonzero(plan.leaf), z, strict=True):
        mine = advantage[plan.train & (plan.parent == leaf)]
        np.testing.assert_allclose(mine, [[np.exp(value), 0.0]] * 3, rtol=1e-14)


def test_logit_normal_levels(rng):
    plain, shifted = logit_normal(rng, 20_000, 1.0), logit_normal(rng, 20_000, 3.0)
    assert plain.mean() == pytest.approx(0.5, abs=4 * plain.std() / math.sqrt(20_000))
    assert plain.std() == pytest.approx(0.2083, abs=0.004)
    np.testing.assert_allclose(np.quantile(shifted, 0.5), 0.75, atol=0.006)
    assert 0.0 < shifted.min() < shifted.max() < 1.0


@pytest.mark.parametrize(
    ("sde", "make"),
    [
        ("flow_sde", lambda sg: steps.flow_sde(0.6, sg[1])),
        ("dance_sde", lambda sg: steps.dance_sde(0.6)),
        ("cps", lambda sg: steps.cps(0.6)),
        ("linear_sde", lambda sg: steps.linear_sde(0.0, 0.6 * sg[1])),
    ],
)
def test_steps_by_name(sde, make):
    recipe = recipes.flow_grpo(SD10, group=2, sde=sde, noise_level=0.6)
    plan = recipe.plan([0], seed=0, iteration=0)
    step = make(SD10)
    for i, (sigma, after) in enumerate(itertools.pairwise(SD10[:-1])):
        rows = plan.row[plan.stochastic & (plan.depth == i + 1)]
        np.testing.assert_array_equal(rows, np.tile(step((), sigma, after)[:4], (2, 1)))
    assert recipe.objective.ratio == ("cps" if sde == "cps" else "gaussian")


def test_guard_divides_the_loss_by_dt():
    guard, flow = recipes.grpo_guard(SD10, group=4), recipes.flow_grpo(SD10, group=4)
    plan = guard.plan([0], seed=0, iteration=0)
    rewards = np.array([[3.0], [1.0], [2.0], [6.0]])
    ours, plain = (
        r.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage for r in (guard, flow)
    )
    inner = plan.parent >= 0
    dt = plan.sigma[plan.parent] - plan.sigma
    np.testing.assert_allclose(ours[inner], plain[inner] / dt[inner, None], rtol=1e-14)
    b = plan.row[plan.train, 1] / dt[plan.train]
    factors = np.unique(np.round(-b, 12))
    np.testing.assert_allclose(factors, [1.0, 1.245], atol=1e-12)
    assert guard.objective.ratio == "guard"
    assert guard.objective.clip == (2e-6, 2e-6)


def test_kl_forms_differ_by_dt():
    for form in ("flow_grpo", "gaussian"):
        objective = recipes.flow_grpo(SD10, kl_form=form).objective
        row = np.array([steps.flow_sde(0.7, SD10[1])((), SD10[3], SD10[4])[:4]])
        dt = np.array([SD10[3] - SD10[4]])
        exact = 0.04 * row[0, 1] ** 2 / (2 * row[0, 3] ** 2)
        wanted = exact * (dt[0] if form == "flow_grpo" else 1.0)
        assert objective.kl_factor(row, dt)[0] == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize(
    ("options", "trust", "ratio"),
    [({}, 1e-7, "gaussian"), ({"sde": "cps"}, 1e-6, "cps"), ({"trust": 1e-3}, 1e-3, "gaussian")],
)
def test_trust_of_flow_dppo(options, trust, ratio):
    objective = recipes.flow_dppo(SD10, **options).objective
    assert (objective.trust, objective.ratio) == (trust, ratio)
    assert objective.clip == (math.inf, math.inf)


@pytest.mark.parametrize("name", CHAINS)
def test_presets_build_move_and_fit_the_trainer(name):
    assert recipes.PRESETS[name]
    for preset, chosen in recipes.PRESETS[name].items():
        recipe = recipes.build_preset(name, preset)
        for iteration in (0, 299, 1000):
            plan = recipe.plan([0, 7], seed=0, iteration=iteration)
            assert plan.counts().trained_edges > 0
            assert plan.num_updates == recipe.updates
            assert all(len(plan.trained(u)) for u in range(recipe.updates))
        fields = {"iterations": 1, "prompts_per_iteration": 1} | dict(chosen.trainer)
        assert TrainerConfig(**fields).lr == chosen.trainer.get("lr", 1e-5)
        assert len(chosen.source) > 20


@pytest.mark.parametrize("name", CHAINS)
def test_defaults_take_one_update(name):
    assert recipes.options_of(name)["updates"].default == 1
    assert recipes.options_of(name)["kl"].default >= 0.0


def test_qwen_image_schedule_ends_at_its_terminal():
    sigmas = recipes.PRESETS["flow_grpo_fast_v2"]["qwen-image"].sigmas
    assert sigmas[0] == 1.0
    assert sigmas[-2] == pytest.approx(0.02, abs=1e-15)
    mu = math.exp(0.5 + 0.4 * 768 / 7936)
    plain = [mu / (mu + 1 / t - 1) for t in (0.9, 0.5, 0.1)]
    ratio = (1 - sigmas[1]) / (1 - plain[0])
    assert ratio == pytest.approx(0.98 / (1 - plain[2]), rel=1e-12)
    assert (1 - sigmas[5]) / (1 - plain[1]) == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(
            (name, {"group": 1}, f"{name}: group must be at least 2 leaves, got 1")
            for name in CHAINS
            if name != "flow_grpo_fast_v1"
        ),
        ("flow_grpo_fast_v1", {"trunks": 1, "children": 1}, "make at least 2 leaves, got 1 and 1"),
        ("flow_grpo_fast_v1", {"trunks": 0}, "at least 1 and make .* got 0 and 9"),
        ("flow_grpo_fast_v1", {"window": 10}, r"window must be in 1\.\.9, .*, got 10"),
        ("flow_grpo_fast_v1", {"latest": 8}, r"latest must be in 0\.\.7, got 8"),
        ("flow_grpo_fast_v1", {"updates": 19}, r"updates must be in 1\.\.18, got 19"),
        ("flow_grpo_fast_v2", {"window": 6}, r"window must be in 1\.\.5, .* 0 to 4, got 6"),
        ("flow_grpo_fast_v2", {"window": 0}, r"window must be in 1\.\.5, .*, got 0"),
        ("flow_grpo_fast_v2", {"last": 10}, r"first < last <= 9, got 0 and 10"),
        ("flow_grpo_fast_v2", {"first": 5}, r"first < last <= 9, got 5 and 5"),
        ("flow_grpo_fast_v2", {"per": "rank"}, "per must be 'prompt' or 'iteration', got 'rank'"),
        ("flow_grpo", {"sde": "ode"}, "name must be from .* got 'ode'"),
        ("flow_grpo", {"updates": 25}, r"updates must be in 1\.\.24, got 25"),
        ("dance_grpo", {"best_of": 13}, r"best_of must be in 2\.\.12, got 13"),
        ("dance_grpo", {"best_of": 1}, r"best_of must be in 2\.\.12, got 1"),
        ("mix_grpo", {"window": 10}, r"mix_grpo: window must be in 1\.\.9 with 10 steps, got 10"),
        ("mix_grpo", {"window": 9, "cut": True}, r"window must be in 1\.\.8 with 10 steps, got 9"),
        ("mix_grpo", {"window": 0}, r"window must be in 1\.\.9 .*, got 0"),
        ("mix_grpo", {"start": 6}, r"start must be in 0\.\.5, got 6"),
        ("mix_grpo", {"start": -1}, r"start must be in 0\.\.5, got -1"),
        ("mix_grpo", {"stride": 0}, "stride must be at least 1, got 0; try schedule='frozen'"),
        ("mix_grpo", {"schedule": "decay"}, "schedule must be from .*'linear'.* got 'decay'"),
        ("mix_grpo", {"interval": 0}, "interval must be at least min_interval .* got 0 and 1"),
        ("mix_grpo", {"min_interval": 0}, "interval must be at least .* got 25 and 0"),
        ("mix_grpo", {"trimmed": 1.0}, r"trimmed must be in \[0, 1\), got 1.0"),
        ("mix_grpo_flash", {"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ("mix_grpo_flash", {"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ("mix_grpo_flash", {"shift": 2.5}, r"shift must take sigmas back .*, got 2.5 \(off by 0.0"),
        ("mix_grpo_flash", {"shift": -1.0}, "shift must be positive, got -1.0"),
        ("mix_grpo_flash", {"order": 4}, "order must be 1, 2 or 3, got 4"),
        ("mix_grpo_flash", {"window": 10}, r"mix_grpo_flash: window must be in 1\.\.9"),
        ("flow_dppo", {"sde_steps": 6}, r"sde_steps must be in 1\.\.5, half .*, got 6"),
        ("flow_dppo", {"credit": "tree"}, "credit must be 'group' or 'gdpo', got 'tree'"),
        ("flow_dppo", {"credit": "gdpo", "global_std": True}, "global_std must be False"),
        ("flash_grpo", {"last": 10}, r"first < last <= 9, got 0 and 10"),
        ("flash_grpo", {"sigma_min": 2.0}, r"sigma_min must be in \[0, sigma_max\], got 2.0"),
        ("awm", {"times": 9}, r"times must be in 1\.\.8 with 10 steps, got 9"),
        ("awm", {"weighting": "huber"}, "weighting must be uniform, t, t2 or ghuber, got 'huber'"),
        ("diffusion_nft", {"times": 11}, r"times must be in 1\.\.10, got 11"),
        ("dgpo", {"times": 9}, r"times must be in 1\.\.7, the levels from t_min = 0.5625 up"),
        ("dgpo", {"updates": 5}, r"updates must be in 1\.\.4, got 5"),
        ("flow_dpo", {"times": 0}, "times must be at least 1, got 0"),
        ("flow_dpo", {"shift": 0.0}, "shift must be positive, got 0.0"),
        ("flow_rwr", {"times": 0}, "times must be at least 1, got 0"),
        ("flow_rwr", {"shift": 0.0}, "shift must be positive, got 0.0"),
        ("flow_rwr", {"cap": 0.0}, "temperature and cap must be positive"),
    ],
)  # fmt: skip
def test_bad_options_are_one_clear_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        recipes.build(name, SG10, **options)
