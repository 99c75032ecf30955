"""Schedules against published numbers; steps against closed forms, goldens and exact Gaussians."""

import itertools
import math

import numpy as np
import pytest

from branchcore import schedule, steps

SG = schedule.shifted_linear(20, 3)
X, V = np.array([0.3, -1.2, 0.7]), np.array([0.5, 0.1, -0.4])


def test_shifted_linear_golden_case_1():
    assert SG[9] == pytest.approx(11 / 14, abs=1e-15)
    assert SG[19] == pytest.approx(0.136364, abs=1e-6)
    t16 = schedule.shifted_linear(16, 3)
    assert t16[1] == pytest.approx(0.978261, abs=1e-6)
    assert t16[15] == pytest.approx(0.166667, abs=1e-6)
    wanted = "1000 982 964 944 923 900 874 847 818 785 750 710 666 617 562 500 428 346 250 136"
    got = 1000 * schedule.truncated_times(20, 3)
    np.testing.assert_allclose(got, [int(w) for w in wanted.split()], atol=1e-9)
    wanted = "1000 978 954 928 900 868 833 794 750 700 642 576 500 409 300 166"
    got = 1000 * schedule.truncated_times(16, 3)
    np.testing.assert_allclose(got, [int(w) for w in wanted.split()], atol=1e-9)


def test_flow_match_euler_has_the_double_shift():
    wanted = [
        1000,
        960.1293,
        913.3489,
        857.6923,
        790.3683,
        707.2785,
        602.1505,
        464.8760,
        278.0488,
        8.9286,
        0,
    ]
    np.testing.assert_allclose(1000 * schedule.flow_match_euler(10), wanted, atol=5e-5)


def test_flow_match_euler_equals_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for num in (1, 7, 28):
        scheduler.set_timesteps(num)
        np.testing.assert_allclose(schedule.flow_match_euler(num), scheduler.sigmas, atol=2e-7)


def test_flux_dynamic_golden():
    wanted = [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]
    np.testing.assert_allclose(schedule.flux_dynamic(6, 1024), wanted, atol=5e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.shifted_linear(0), "steps must be at least 1, got 0"),
        (lambda: schedule.shifted_linear(4, -1), "shift must be positive, got -1"),
        (lambda: schedule.flux_dynamic(4, 0), "image_tokens must be at least 1, got 0"),
        (lambda: steps.dance_sde(0.0), "eta must be positive, got 0.0"),
        (lambda: steps.flow_sde(0.7, 1.0), r"sigma_1 must be inside \(0, 1\), got 1.0"),
        (lambda: steps.cps(1.5), r"eta must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("i", "s", "mean"),
    [
        (9, 0.0566947, [0.2813101, -1.2011607, 0.7130292]),
        (0, 0.0393919, [0.2911466, -1.2007931, 0.7063534]),
        (19, 0.1107823, [0.1988864, -1.1635227, 0.7385909]),
    ],
)
def test_dance_step_golden_case_2(i, s, mean):
    row = steps.dance_sde(0.3)((), SG[i], SG[i + 1])
    assert row.s == pytest.approx(s, abs=1e-7)
    np.testing.assert_allclose(row.a * X + row.b * V, mean, atol=1e-7)


@pytest.mark.parametrize(
    ("i", "s", "mean"),
    [
        (0, 0.7, [0.2178793, -0.9077241, 0.5353966]),
        (9, 0.253311, [0.2655179, -1.1554464, 0.6892024]),
        (19, 0.102714, [0.2035084, -1.1705562, 0.7408301]),
    ],
)
def test_flow_step_golden_case_3(i, s, mean):
    row = steps.flow_sde(0.7, SG[1])((), SG[i], SG[i + 1])
    assert row.s == pytest.approx(s, abs=5e-7)
    np.testing.assert_allclose(row.a * X + row.b * V, mean, atol=1e-7)


def test_flow_with_constant_diffusion_equals_dance_case_3():
    for i in range(1, 20):
        level = 0.3 * math.sqrt((1 - SG[i]) / SG[i])
        flow = steps.flow_sde(level, SG[1])((), SG[i], SG[i + 1])
        np.testing.assert_allclose(flow, steps.dance_sde(0.3)((), SG[i], SG[i + 1]), atol=1e-15)


ALL = [steps.euler, steps.dance_sde(0.3), steps.flow_sde(0.7, SG[1]), steps.cps(0.8)]


@pytest.mark.parametrize("step", ALL)
def test_every_row_keeps_the_clean_image_and_loses_no_noise(step):
    for sigma, after in itertools.pairwise(SG):
        a, b, c, s, _ = step((), sigma, after)
        assert a * (1 - sigma) - b + c == pytest.approx(1 - after, abs=1e-14)
        assert (a * sigma + b) ** 2 + s**2 >= after**2 - 1e-14


def test_flow_excess_variance_closed_form():
    for i in range(1, 20):
        sigma, after = SG[i], SG[i + 1]
        dt, g2 = sigma - after, 0.49 * sigma / (1 - sigma)
        a, b, _, s, _ = steps.flow_sde(0.7, SG[1])((), sigma, after)
        excess = (a * sigma + b) ** 2 + s**2 - after**2
        assert excess == pytest.approx(g2 * dt**2 / sigma + (g2 * dt / (2 * sigma)) ** 2, rel=1e-9)


def test_cps_keeps_the_noise_level_and_ends_deterministic():
    for sigma, after in itertools.pairwise(SG):
        a, b, _, s, _ = steps.cps(0.8)((), sigma, after)
        assert (a * sigma + b) ** 2 + s**2 == pytest.approx(after**2, abs=1e-14)
    assert s == 0.0


def gaussian_std(step, num_steps, mean=1.3, std=0.4):
    """Terminal moments for data N(mean, std^2) under the exact, affine velocity."""
    sg = schedule.shifted_linear(num_steps, 3)
    m, var = 0.0, 1.0
    for sigma, after in itertools.pairwise(sg):
        total = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / total
        offset = -mean - slope * (1 - sigma) * mean
        a, b, _, s, _ = step(sg)((), sigma, after)
        m, var = (a + b * slope) * m + b * offset, (a + b * slope) ** 2 * var + s**2
    return m, math.sqrt(var)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (lambda _: steps.euler, (0.2770, 0.3729, 0.3972)),
        (lambda sg: steps.flow_sde(0.7, sg[1]), (0.3346, 0.3842, 0.3989)),
        (lambda _: steps.dance_sde(0.3), (0.2986, 0.3770, 0.3976)),
        (lambda _: steps.cps(0.8), (0.2413, 0.2975, 0.3182)),
    ],
)
def test_exact_gaussian_marginals(step, wanted):
    for num_steps, std in zip((10, 50, 500), wanted, strict=True):
        m, got = gaussian_std(step, num_steps)
        assert m == pytest.approx(1.3, abs=1e-9)
        assert got == pytest.approx(std, abs=6e-5)


def test_golden_table_of_sd35():
    sg = schedule.flow_match_euler(10)
    s = [steps.flow_sde(0.7, sg[1])((), a, b).s for a, b in itertools.pairwise(sg)]
    wanted = [0.7, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
    np.testing.assert_allclose(s, wanted, atol=6e-5)
    assert np.mean(s[:9]) == pytest.approx(0.44400, abs=2e-5)


@pytest.mark.parametrize(("amplify", "variance"), [(None, 0.404660), (4.0, 0.467623)])
def test_leaf_variance_of_a_tree_golden_case_7(amplify, variance):
    """tau2 = .5, eta = .3: the paper's mixture keeps the variance, amplified noise does not."""
    tau2, var = 0.5, 1.0
    for i, (sigma, after) in enumerate(itertools.pairwise(SG)):
        slope = (sigma - (1 - sigma) * tau2) / ((1 - sigma) ** 2 * tau2 + sigma**2)
        a, b, _, s, _ = steps.dance_sde(0.3)((), sigma, after)
        scale = amplify if amplify and i in (0, 3, 6, 9) else 1.0
        var = (a + b * slope) ** 2 * var + (scale * s) ** 2
    assert var == pytest.approx(variance, abs=1e-6)
