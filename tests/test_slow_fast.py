"""SFPO's outer loop and reward guidance against what they must reduce to."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from branchcore import recipes, schedule
from branchcore.guidance import RewardGuided
from branchcore.rollout import rollout
from branchcore.slow_fast import FastPath
from branchcore.stages import accumulate, collect
from branchcore.steps import euler
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig
from branchcore.tree import Tree

SG = schedule.shifted_linear(5, 3)
CONFIG = TrainerConfig(iterations=1, prompts_per_iteration=2, lr=1e-2, max_grad_norm=1e9)


def reward(images, _prompts):
    return {"mean": images.flatten(1).mean(1)}


def recipe():
    return recipes.branchcore(SG, splits=(0, 1), clip=0.5)


def trained(toy, out, iterations=1, **options):
    """Weights after whole iterations of the trainer."""
    model = toy(torch.float32)
    config = dataclasses.replace(CONFIG, iterations=iterations, **options)
    Trainer(model, ["a", "b"], reward, recipe(), config, out).run()
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


def plain_steps(toy, count, keep=1.0):
    """Weights after some AdamW steps on one batch; of all before the last a share is kept."""
    model, plain = toy(torch.float32), recipe()
    optimizer = torch.optim.AdamW(
        model.module.parameters(), lr=CONFIG.lr, betas=CONFIG.betas, eps=CONFIG.eps,
        weight_decay=CONFIG.weight_decay,
    )  # fmt: skip
    from branchcore.stages import prompt_indices

    order = prompt_indices(2, 2, seed=0, iteration=0)
    plan = plain.plan([0, 1], seed=0, iteration=0)
    prompts = [["a", "b"][i] for i in order]
    batch = collect(
        plan, model, plain, prompts, [0, 1], reward, seed=0, iteration=0, keep_velocity=True
    )
    start = [p.detach().clone() for p in model.module.parameters()]
    for i in range(count):
        if i == count - 1 and keep < 1.0:
            for p, first in zip(model.module.parameters(), start, strict=True):
                p.data = first + keep * (p.data - first)
                optimizer.state[p] = {n: keep * v for n, v in optimizer.state[p].items()}
        optimizer.zero_grad()
        accumulate(batch, plain, anchor="rollout" if i else "auto")
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


@pytest.mark.parametrize("fast_steps", [1, 3])
def test_share_0_is_one_plain_step(fast_steps, toy, tmp_path):
    one = plain_steps(toy, 1)
    got = trained(toy, tmp_path, fast_steps=fast_steps, fast_share=0.0)
    torch.testing.assert_close(got, one, rtol=0, atol=2e-6)
    assert float((got - plain_steps(toy, 2)).abs().max()) > 1e-3


@pytest.mark.parametrize("fast_steps", [1, 3])
def test_share_1_is_all_plain_steps(fast_steps, toy, tmp_path):
    got = trained(toy, tmp_path, fast_steps=fast_steps, fast_share=1.0)
    torch.testing.assert_close(got, plain_steps(toy, fast_steps + 1), rtol=0, atol=2e-5)


def test_a_share_between_is_written_out(toy, tmp_path):
    """One fast step, 30 % of its way in weights, moments and step count, then one step there."""
    got = trained(toy, tmp_path, fast_steps=1, fast_share=0.3)
    torch.testing.assert_close(got, plain_steps(toy, 2, keep=0.3), rtol=0, atol=2e-6)
    assert float((got - plain_steps(toy, 2, keep=0.6)).abs().max()) > 1e-4


def test_a_deviation_above_the_limit_drops_the_fast_steps(toy, tmp_path):
    dropped = trained(toy, tmp_path / "0", fast_steps=3, fast_share=1.0, fast_limit=0.0)
    torch.testing.assert_close(dropped, plain_steps(toy, 1), rtol=0, atol=2e-6)


def test_moments_and_step_count_go_the_same_share():
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([w], lr=0.1)
    path = FastPath([w], optimizer)
    w.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer.step()
    moved, moments = w.detach().clone(), optimizer.state[w]["exp_avg"].clone()
    path.go_back(0.25)
    torch.testing.assert_close(w.detach(), 0.25 * moved)
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], 0.25 * moments)
    assert float(optimizer.state[w]["step"]) == 0.25
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
        path.go_back(1.5)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_limit_needs_a_ratio_to_measure(steps, toy, tmp_path):
    config = dataclasses.replace(CONFIG, fast_steps=steps, fast_limit=0.1)
    with pytest.raises(ValueError, match="fast_limit must be inf unless at least 2 fast_steps"):
        Trainer(toy(torch.float32), ["a", "b"], reward, recipe(), config, tmp_path)


def test_fast_steps_refuse_several_updates(toy, tmp_path):
    several = recipes.dance_grpo(SG, group=4, updates=2)
    config = dataclasses.replace(CONFIG, fast_steps=2)
    with pytest.raises(ValueError, match="fast_steps must be 0 with several updates, got 2 and 2"):
        Trainer(toy(torch.float32), ["a", "b"], reward, several, config, tmp_path)


class Standard:
    """Exact velocity of data N(0, 1), element by element."""

    latent_shape = (4,)

    def velocity(self, x, sigma, _prompt):
        return ((2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2))[:, None] * x

    def reference_velocity(self, x, sigma, prompt):
        return self.velocity(x, sigma, prompt)


def tilted(x, sigma, _prompt):
    """log E[exp(w x0) | x_t] / w up to a constant, for r = x0 summed over elements."""
    return ((1 - sigma) / ((1 - sigma) ** 2 + sigma**2)) * x.sum(1)


@pytest.mark.parametrize(("x", "wanted"), [(-1.0, -1.884615), (0.5, -1.307692)])
def test_section_10_guided_velocity_is_the_tilted_one(x, wanted):
    model = RewardGuided(Standard(), {"r": tilted}, {"r": 1.3})
    at = torch.full((1, 4), x, dtype=torch.float64), torch.tensor([0.6]).double(), None
    np.testing.assert_allclose(model.velocity(*at), wanted, atol=1e-6)
    two = RewardGuided(Standard(), {"a": tilted, "b": tilted}, {"a": 1.0, "b": 0.3})
    np.testing.assert_allclose(two.velocity(*at), model.velocity(*at), atol=1e-12)


def test_guided_sampling_ends_at_the_tilted_mean():
    """exp(w x0) N(0, 1) is N(w, 1): the ODE from noise below sigma = 1 moves the mean by w."""
    t = Tree()
    sigmas = np.linspace(0.999, 0.0, 400)
    t.leaf(t.chain(t.given(1, sigmas[0]), sigmas[1:], euler))
    model = RewardGuided(Standard(), {"r": tilted}, {"r": 0.7}, cap=math.inf)
    start = torch.zeros(1, 1, 4, dtype=torch.float64)
    leaves = rollout(t.plan(), model, [0], seed=0, given=start, dtype=torch.float64).leaves
    np.testing.assert_allclose(leaves, 0.7, atol=3e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"s": 1.0}}, r"weights must name the rewards \['r'\], got \['s'\]"),
        ({"cap": 0.0}, "cap must be positive, got 0.0"),
    ],
)
def test_guidance_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RewardGuided(Standard(), {"r": tilted}, **({"weights": {"r": 1.0}} | options))


def test_guidance_names_a_missing_cap_and_a_wrong_reward():
    at = torch.zeros(1, 4), torch.ones(1), None
    with pytest.raises(ValueError, match="cap must be finite at sigma = 1, got inf"):
        RewardGuided(Standard(), {"r": tilted}, {"r": 1.0}, cap=math.inf).velocity(*at)
    with pytest.raises(ValueError, match=r"r must be \(1,\), got \(1, 4\)"):
        RewardGuided(Standard(), {"r": lambda x, *_: x}, {"r": 1.0}).velocity(*at)
