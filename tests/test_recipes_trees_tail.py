"""branchcore's short ODE tail: its levels, its history, its error on exact velocities."""

import math

import numpy as np
import pytest
import torch

from branchcore import recipes, schedule
from branchcore.plan import columns_of
from branchcore.recipes.branchcore import tail_levels
from branchcore.rollout import rollout

SG20, SMALL = schedule.shifted_linear(20, 3), schedule.shifted_linear(8, 3)


def grown(sigmas=SMALL, name="branchcore", **options):
    return recipes.build(name, sigmas, **options).plan([0], seed=0, iteration=0)


def test_branchcore_without_a_short_tail_is_branch_mix_without_a_window():
    tail = grown(tail=1.0, order=1, eta=0.3)
    mix = grown(name="branch_mix", window=0)
    for name, column in columns_of(mix).items():
        np.testing.assert_array_equal(columns_of(tail)[name], column)


def test_branchcore_tail_levels():
    sg = SG20.tolist()
    assert tail_levels(sg, 10, 1.0) == sg[11:]
    np.testing.assert_allclose(
        tail_levels(sg, 10, 0.4), np.array([3, 2, 1, 0]) * sg[10] / 4, atol=1e-15
    )
    for rest, num in ((1, 1), (2, 2), (5, 2), (8, 4), (10, 4), (13, 6), (15, 6), (17, 7)):
        assert len(tail_levels(sg, 20 - rest, 0.4)) == num
    assert len(tail_levels(sg, 10, 1e-9)) == 2
    assert len(tail_levels(schedule.shifted_linear(25), 0, 0.28)) == 7


def test_branchcore_tail_has_no_history_across_noise():
    plan = grown(SG20)
    multistep = np.flatnonzero(plan.history)
    assert not plan.stochastic[plan.parent[multistep]].any()
    assert len(multistep) == 2 * 16
    assert not plan.history[plan.leaf].any()
    assert grown(SG20, order=1).history.sum() == 0


class Gaussian:
    """The exact velocity of data N(1.3, std^2), element by element."""

    latent_shape = (40,)

    def __init__(self, std):
        self.std = std

    def velocity(self, x, sigma, _prompt):
        sigma, mean = sigma[:, None], (1 - sigma[:, None]) * 1.3
        total = (1 - sigma) ** 2 * self.std**2 + sigma**2
        return -1.3 + (sigma - (1 - sigma) * self.std**2) / total * (x - mean)

    def image(self, x, sigma):
        """The end of the ODE from x."""
        total = (1 - sigma) ** 2 * self.std**2 + sigma**2
        return 1.3 + self.std * (x - (1 - sigma) * 1.3) / math.sqrt(total)


@pytest.mark.parametrize("steps", [20, 25])
@pytest.mark.parametrize("std", [0.4, 1.0])
def test_branchcore_tail_error(steps, std, all_states):
    """Order 2 at 0.4 of the steps: within 1.15 of Euler at all of them, 0.7 of Euler at 0.4."""
    error = {}
    for tail, order in ((0.4, 2), (0.4, 1), (1.0, 1)):
        plan = grown(schedule.shifted_linear(steps, 3), tail=tail, order=order)
        model = Gaussian(std)
        forest = rollout(plan, model, [0], seed=0, dtype=torch.float64)
        x, _ = all_states(plan, model, forest.noise)
        first = np.arange(len(plan))
        for lo, hi in plan.levels()[1:]:
            above = first[plan.parent[lo:hi]]
            first[lo:hi] = np.where(plan.stochastic[lo:hi], first[lo:hi], above)
        ends = np.flatnonzero(plan.leaf)
        exact = torch.stack([model.image(x[int(n)], plan.sigma[n]) for n in first[ends]])
        error[tail, order] = float((forest.leaves - exact).square().mean().sqrt())
    assert error[0.4, 2] < 0.7 * error[0.4, 1]
    assert error[0.4, 2] < 1.15 * error[1.0, 1]
