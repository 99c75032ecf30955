"""Numerical invariants of samplers and log-probs, numbered as in the Flow-GRPO family's notes.

11 to 14, 16, 17, 25, 26 are in test_credit_family; 15 in test_golden; 18 in test_matching; 19 to 23
in test_recipes_chains and test_recipes_trees.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from branchcore import ops, schedule, steps
from branchcore.forest import noise_rows
from branchcore.gradient import gradient
from branchcore.objective import ClippedRatio
from branchcore.rollout import rollout
from branchcore.tree import Tree

SG = schedule.flow_match_euler(10)
F64 = {"dtype": torch.float64}


@pytest.mark.parametrize(
    "make",
    [
        lambda g: steps.dance_sde(g),
        lambda g: steps.flow_sde(g, SG[1]),
        lambda g: steps.cps(g),
        lambda g: steps.linear_sde(0.0, g),
    ],
)
def test_1_no_noise_is_euler(make):
    for sigma, after in itertools.pairwise(SG):
        np.testing.assert_allclose(
            make(1e-9)((), sigma, after)[:3], steps.euler((), sigma, after)[:3], atol=1e-12
        )


def test_1_dpmpp_order_1_is_euler_and_linear_sde_with_equal_ends_is_dance():
    for sigma, after in itertools.pairwise(SG):
        assert steps.dpmpp(1)((), sigma, after) == steps.euler((), sigma, after)
        flat = steps.linear_sde(0.3, 0.3)((), sigma, after)
        np.testing.assert_allclose(flat, steps.dance_sde(0.3)((), sigma, after), atol=1e-15)


def test_2_flow_sde_closed_forms():
    a = 0.7
    for i, (sigma, after) in enumerate(itertools.pairwise(SG)):
        dt = sigma - after
        row = steps.flow_sde(a, SG[1])((), sigma, after)
        if i == 0:
            assert row.s == pytest.approx(a, abs=1e-12)
            wanted = (1 - a**2 / 2, -dt)
        else:
            wanted = (1 - a**2 * dt / (2 * (1 - sigma)), -dt * (1 + a**2 / 2))
        np.testing.assert_allclose(row[:2], wanted, atol=1e-12)
        assert row.a * (1 - sigma) - row.b == pytest.approx(1 - after, abs=1e-12)


def test_3_cps_coefficients():
    cos = math.cos(0.4 * math.pi)
    for sigma, after in itertools.pairwise(SG):
        row = steps.cps(0.8)((), sigma, after)
        on_x1 = row.a * sigma + row.b
        assert row.a * (1 - sigma) - row.b == pytest.approx(1 - after, abs=1e-14)
        assert on_x1 == pytest.approx(after * cos, abs=1e-14)
        assert on_x1**2 + row.s**2 == pytest.approx(after**2, abs=1e-14)
    assert row.s == 0.0


def exact_velocity(sigma, mean=1.3, std=0.4):
    """(slope, offset) of the exact velocity of data N(mean, std^2)."""
    total = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / total
    return slope, -mean - slope * (1 - sigma) * mean


STEPS = {
    "euler": (lambda _: steps.euler, 0.3997),
    "flow_sde": (lambda sg: steps.flow_sde(0.7, sg[1]), 0.4001),
    "dance_sde": (lambda _: steps.dance_sde(0.3), 0.3998),
    "cps": (lambda _: steps.cps(0.8), 0.3225),
    "linear_sde": (lambda _: steps.linear_sde(0.1, 0.5), None),
}


@pytest.mark.parametrize("name", STEPS)
def test_4_terminal_mean_is_exact_for_every_step_and_length(name):
    make, terminal = STEPS[name]
    for num_steps in (3, 10, 5000):
        sg = schedule.shifted_linear(num_steps, 3)
        step, m, var = make(sg), 0.0, 1.0
        for sigma, after in itertools.pairwise(sg):
            slope, offset = exact_velocity(sigma)
            a, b, _, s, _ = step((), sigma, after)
            m, var = (a + b * slope) * m + b * offset, (a + b * slope) ** 2 * var + s**2
        assert m == pytest.approx(1.3, abs=1e-9)
    if terminal is not None:
        assert math.sqrt(var) == pytest.approx(terminal, abs=6e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_4_multistep_keeps_the_terminal_mean_too(order):
    for sg in (schedule.shifted_linear(10, 3), schedule.flow_match_euler(10)):
        path, predictions, m = [], [], 0.0
        for sigma, after in itertools.pairwise(sg):
            row = steps.dpmpp(order, warm_up=True)(path[:2], sigma, after)
            slope, offset = exact_velocity(sigma)
            v = slope * m + offset
            predictions.insert(0, m - sigma * v)
            path.insert(0, sigma)
            older = [*predictions[1:3], 0.0, 0.0]
            m = row.a * m + row.b * v + row.c * older[0] + row.d * older[1]
        assert m == pytest.approx(1.3, abs=1e-9)


def test_6_kappa_is_the_slope_of_the_mean_in_the_velocity():
    x, v, h = 0.3, -0.8, 1e-6
    a, eta = 0.7, 0.8 * math.pi / 2
    for i, (sigma, after) in enumerate(itertools.pairwise(SG)):
        dt = sigma - after
        wanted = {
            "flow": (steps.flow_sde(a, SG[1]), dt * (1 + a**2 / 2) if i else dt),
            "dance": (steps.dance_sde(0.3), dt * (1 + 0.09 * (1 - sigma) / (2 * sigma))),
            "cps": (
                steps.cps(0.8),
                sigma * (1 - after) - (1 - sigma) * after * math.cos(eta),
            ),
        }
        for step, kappa in wanted.values():
            row = step((), sigma, after)
            up, down = (row.a * x + row.b * (v + e) for e in (h, -h))
            assert (up - down) / (2 * h) == pytest.approx(-kappa, abs=1e-8)


@pytest.fixture
def edge():
    """A parent with one stochastic edge of 4,000 elements, old and new velocities."""
    rng = torch.Generator().manual_seed(0)
    x, old, change = (torch.randn(1, 4000, generator=rng, dtype=torch.float64) for _ in range(3))
    t = Tree()
    kids = t.grow(t.roots(1), 0.9, steps.dance_sde(0.3), children=2, train=True)
    t.leaf(t.grow(kids, 0.0, steps.euler))
    plan = t.plan()
    model = type("Old", (), {"latent_shape": (4000,), "velocity": lambda _s, x, *_: 0 * x})()
    forest = rollout(plan, model, [0], seed=0, **F64)
    noise = noise_rows(forest.noise, 1, 2)
    eps = ops.philox_normal(noise, 4000, torch.float64)[0]
    return x, old, old + 0.05 * change, plan.row[1], eps, noise


def test_7_log_prob_is_the_joint_log_density_per_element(edge):
    x, v, _, (a, b, _, s), eps, _ = edge
    y = a * x + b * v + s * eps
    row, start = torch.tensor([[a, b, 0.0, s]], dtype=torch.float64), torch.tensor([0, 1])
    joint = torch.distributions.Normal(a * x + b * v, s).log_prob(y).sum()
    assert float(ops.sde_log_prob(x, v, y, row, start)) == pytest.approx(
        float(joint) / 4000, abs=1e-12
    )


def test_8_and_9_log_ratio_and_ratio_norm_identities(edge):
    x, old, new, row4, eps, noise = edge
    a, b, _, s = row4
    y = a * x + b * old + s * eps
    row, start = torch.tensor([[a, b, 0.0, s]], dtype=torch.float64), torch.tensor([0, 1])
    log_ratio = ops.sde_log_prob(x, new, y, row, start) - ops.sde_log_prob(x, old, y, row, start)
    d = b * (new - old)[0]
    by_parts = (eps * d).mean() / s - d.square().mean() / (2 * s**2)
    assert float(log_ratio) == pytest.approx(float(by_parts), abs=1e-12)
    p, q = ops.edge_dots(new, old, start, noise)
    lin, quad = ClippedRatio().exponent(row4[None])[0]
    assert lin * float(p) - quad * float(q) == pytest.approx(float(log_ratio), abs=1e-12)
    # RatioNorm adds b = mean(d^2) / (2 s^2), multiplies by s: mean(eps d)
    guard, zero = ClippedRatio(ratio="guard").exponent(row4[None])[0]
    normed = s * (float(log_ratio) + float(d.square().mean()) / (2 * s**2))
    assert guard * float(p) == pytest.approx(normed, abs=1e-12)
    assert zero == 0.0


def test_8_mean_and_variance_over_noise(edge):
    _, old, new, (_, b, _, s), _, _ = edge
    d = (b * (new - old)[0]).numpy()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4000, 4000))
    log_ratio = (noise * d).mean(1) / s - (d**2).mean() / (2 * s**2)
    sem = math.sqrt((d**2).mean() / (s**2 * 4000) / 4000)
    assert log_ratio.mean() == pytest.approx(-(d**2).mean() / (2 * s**2), abs=4 * sem)
    assert log_ratio.var() == pytest.approx((d**2).mean() / (s**2 * 4000), rel=0.1)


def test_10_kl_forms():
    row = np.array([steps.flow_sde(0.7, SG[1])((), a, b)[:4] for a, b in itertools.pairwise(SG)])
    dt = -np.diff(SG)
    g = row[:, 3] / np.sqrt(dt)
    true = ClippedRatio(kl=1.0).kl_factor(row, dt)
    released = ClippedRatio(kl=1.0, kl_form="flow_grpo").kl_factor(row, dt)
    np.testing.assert_allclose(true, row[:, 1] ** 2 / (2 * g**2 * dt), rtol=1e-12)
    np.testing.assert_allclose(released, row[:, 1] ** 2 / (2 * g**2), rtol=1e-12)
    np.testing.assert_allclose(released, dt * true, rtol=1e-12)
    assert 3.7 < (true / released)[:9].min() < (true / released)[:9].max() < 25.1


def test_24_micro_batches_of_any_size_are_one_big_mean(toy):
    """The normaliser is the planned edges, so that dropped ones do not change the others' share."""
    t = Tree()
    x = t.roots(5)
    for i, sigma in enumerate(SG[1:-1]):
        x = t.grow(x, sigma, steps.flow_sde(0.7, SG[1]), train=i < 3)
    t.leaf(t.grow(x, 0.0, steps.euler))
    plan, ones = t.plan(), None
    ones = np.ones(len(plan))
    advantage = np.stack([ones, 0 * ones], 1)
    advantage[plan.stream[:, 0] % 3 == 0] = 0.0
    grads = []
    for max_batch in (1, 4, None):
        model = toy()
        forest = rollout(plan, model, [0], seed=0, **F64)
        gradient(forest, model, advantage, ones, ClippedRatio(), max_batch=max_batch)
        grads.append(model.gradient())
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-12, atol=1e-15)


def solve(order, num, *, exact_start=0, first_order_end=False, **options):
    """Error of the multistep solver on the Gaussian-exact velocity from sigma .9 to .1 at x = 2."""
    mean, std = 1.3, 0.4

    def scale(s):
        return math.sqrt((1 - s) ** 2 * std**2 + s**2)

    def flow(s):
        return (2.0 - 0.1 * mean) / scale(0.9) * scale(s) + (1 - s) * mean

    sg = np.linspace(0.9, 0.1, num + 1)
    x, path, predictions = 2.0, [], []
    for i, (sigma, after) in enumerate(itertools.pairwise(sg)):
        slope, offset = exact_velocity(sigma, mean, std)
        v = slope * x + offset
        chosen = 1 if first_order_end and i == num - 1 else order
        row = steps.dpmpp(chosen, warm_up=True, **options)(path[:2], sigma, after)
        predictions.insert(0, x - sigma * v)
        path.insert(0, sigma)
        older = [*predictions[1:3], 0.0, 0.0]
        x = row.a * x + row.b * v + row.c * older[0] + row.d * older[1]
        if i < exact_start:
            x = flow(after)
    return abs(x - flow(0.1))


@pytest.mark.parametrize(
    ("order", "end", "wanted"),
    [
        (2, False, [0.005736, 0.001667, 0.000431, 0.000108]),
        (2, True, [0.007035, 0.001045, 0.000161, 0.0000277]),
        (1, False, [0.0475, 0.0241, 0.0121, 0.0061]),
    ],
)
def test_27_errors_of_dpm_solver_on_the_exact_velocity(order, end, wanted):
    got = [solve(order, n, first_order_end=end) for n in (16, 32, 64, 128)]
    for error, published in zip(got, wanted, strict=True):
        digits = len(f"{published:.7f}".rstrip("0").split(".")[1])
        assert error == pytest.approx(published, abs=0.51 * 10.0**-digits)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_27_order_of_convergence(order):
    """Halving the steps divides the error by 2^order, the history's start being exact."""
    errors = [solve(order, n, exact_start=order - 1) for n in (128, 256, 512, 1024)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2.0**order, rel=0.1)


def test_27_the_released_third_order_step_is_of_second_order():
    errors = [solve(3, n, exact_start=2, curvature=0.5) for n in (128, 256, 512)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.12)


def test_27_multistep_needs_its_history():
    with pytest.raises(ValueError, match="order 3 must have 2 levels above the node, got 1 at"):
        steps.dpmpp(3)((0.9,), 0.8, 0.7)
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        steps.dpmpp(4)
    t = Tree()
    with pytest.raises(ValueError, match="order 2 must have 1 levels above the node, got 0"):
        t.grow(t.roots(2), 0.9, steps.dpmpp(2))
    x = t.grow(t.roots(2), 0.9, steps.euler)
    row = steps.dpmpp(2)((1.0,), 0.9, 0.8)
    np.testing.assert_allclose(row, steps.euler((), 0.9, 0.8), atol=1e-15)
    t.leaf(t.chain(x, [0.8, 0.6, 0.0], steps.dpmpp(2)))
    assert t.plan().history.sum() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steps.linear_sde(0.1, 0.0), "sigma_max must be positive, got 0.0"),
        (lambda: steps.linear_sde(0.4, 0.3), r"sigma_min must be in \[0, sigma_max\], got 0.4"),
        (lambda: steps.named_sde("heun", 0.3, SG), "name must be from .*got 'heun'"),
    ],
)
def test_bad_steps_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
