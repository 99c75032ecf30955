"""Golden cases of BranchGRPO that span several parts: log-prob, gradient, clip, noise, ratio."""

import math

import numpy as np
import pytest
import torch

from branchcore import ops, recipes, schedule, steps
from branchcore.rollout import rollout

SG = schedule.shifted_linear(20, 3)
X = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
V = torch.tensor([[0.5, 0.1, -0.4]], dtype=torch.float64)
XI = torch.tensor([[1.0, -0.5, 0.25]], dtype=torch.float64)
ONE = torch.tensor([0, 1])


def dance_row(i):
    return torch.tensor([steps.dance_sde(0.3)((), SG[i], SG[i + 1])[:4]], dtype=torch.float64)


def child(i):
    a, b, _, s = dance_row(i)[0]
    return a * X + b * V + s * XI


@pytest.mark.parametrize(("i", "wanted"), [(9, 1.7323865), (0, 2.0965058), (19, 1.0624994)])
def test_case_4_log_prob(i, wanted):
    got = ops.sde_log_prob(X, V, child(i), dance_row(i), ONE)
    assert float(got) == pytest.approx(wanted, abs=5e-8)
    s = float(dance_row(i)[0, 3])
    summed = float((-0.5 * XI**2 - math.log(s) - 0.5 * math.log(2 * math.pi)).sum())
    assert summed == pytest.approx(3 * wanted, abs=2e-7)


def test_case_5_edge_gradient_by_log_prob_and_by_dots():
    wanted = [0.3188359, -0.1594180, 0.0797090]
    v = V.clone().requires_grad_()
    log_prob = ops.sde_log_prob(X, v, child(9), dance_row(9), ONE)
    (-1.5 * torch.exp(log_prob - log_prob.detach())).sum().backward()
    np.testing.assert_allclose(v.grad[0], wanted, atol=5e-8)
    _, b, _, s = dance_row(9)[0].tolist()
    np.testing.assert_allclose(-1.5 * b / s * XI[0] / 3, wanted, atol=5e-8)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "loss", "passes"),
    [
        (1.5, 5e-4, -1.5007502, True),
        (1.5, 2e-3, -1.5015, False),
        (1.5, -2e-3, -1.4970030, True),
        (-1.5, -2e-3, 1.4985, False),
        (-1.5, 2e-3, 1.5030030, True),
    ],
)
def test_case_6_clip(advantage, log_ratio, loss, passes):
    p = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    columns = torch.tensor([[max(advantage, 0.0), max(-advantage, 0.0)]], dtype=torch.float64)
    result = ops.ratio_loss(
        p, torch.zeros(1, dtype=torch.float64), ONE, torch.tensor([[1.0, 0.0]]).double(), columns,
        torch.ones(1, dtype=torch.float64), (1e-3, 1e-3),
    )  # fmt: skip
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(loss, abs=5e-8)
    assert bool(p.grad != 0) == passes
    assert int(result.stats.clipped_low + result.stats.clipped_high) == (not passes)


def test_case_7_mixture_numbers():
    plan = recipes.branch_grpo(SG).plan([0], seed=0, iteration=0)
    own, shared = plan.mix[1]
    got = own * np.array([1.0, -1.0]) + shared * 1.0
    np.testing.assert_allclose(got, [1.2126781, -0.7276069], atol=5e-8)


class ExactGaussian:
    """The exact velocity of data N(0, tau2), element by element: D independent samples at once."""

    latent_shape = (20_000,)
    tau2 = 0.5

    def velocity(self, x, sigma, _prompt):
        total = (1 - sigma) ** 2 * self.tau2 + sigma**2
        return ((sigma - (1 - sigma) * self.tau2) / total)[:, None] * x


@pytest.mark.parametrize(
    ("options", "variance"),
    [
        ({"correlate": 1.0}, 0.404660),
        ({"correlate": 4.0}, 0.404660),
        ({"correlate": None}, 0.404660),
        ({"correlate": None, "amplify": 4.0}, 0.467623),
    ],
)
def test_case_7_leaf_marginals_by_sampling(options, variance):
    """The paper's mixture keeps every leaf an ordinary SDE sample; the released noise does not."""
    recipe = recipes.branch_grpo(SG, last_step="sde", splits=(0, 3, 6, 9), **options)
    plan = recipe.plan([0], seed=0, iteration=0)
    forest = rollout(plan, ExactGaussian(), [0], seed=3)
    assert float(forest.leaves.var(1).mean()) == pytest.approx(variance, rel=0.015)


def test_case_15_rounding_after_the_log_prob_moves_the_ratio():
    """The released order (score the fp32 sample, store bf16) against ours, on policy."""
    rng = torch.Generator().manual_seed(0)
    x, v, xi = (torch.randn(1, 65_536, generator=rng) for _ in range(3))
    row = dance_row(1)
    a, b, _, s = row[0].tolist()
    sample = a * x + b * v + s * xi
    stored = sample.bfloat16().float()
    old_then_round = ops.sde_log_prob(x, v, sample, row, ONE)
    on_stored = ops.sde_log_prob(x, v, stored, row, ONE)
    assert -2e-3 < float(torch.expm1(on_stored - old_then_round)) < -5e-4


class HalfPrecision(ExactGaussian):
    """A model that answers in bf16, as big ones do."""

    def velocity(self, x, sigma, prompt):
        return super().velocity(x, sigma, prompt).bfloat16()


@pytest.mark.parametrize("max_batch", [1, 3, None])
def test_case_15_our_ratio_is_one_with_bf16_velocities(max_batch):
    plan = recipes.branch_grpo(SG).plan([0], seed=0, iteration=0)
    model = HalfPrecision()
    forest = rollout(plan, model, [0], seed=0, max_batch=max_batch, keep_velocity=True)
    assert forest.x.dtype == torch.float32
    nodes = np.unique(plan.action[plan.trained()])
    x, sigma = forest.states(nodes), torch.from_numpy(plan.sigma[nodes]).float()
    again = model.velocity(x, sigma, None)
    stored = forest.velocity[torch.from_numpy(forest.slot[nodes])]
    dots = ops.edge_dots(again, stored)
    assert float(dots.q_N.max()) == 0.0
