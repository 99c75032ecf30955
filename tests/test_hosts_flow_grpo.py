"""Flow-GRPO's seam equals the host's own formulas, values and gradients, and says what it lacks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from branchcore.hosts.flow_grpo import clipped_loss, kl_loss, sde_step_with_logprob
from branchcore.schedule import flow_match_euler

STEPS, BATCH = 10, 5
LAYOUTS = {"sd3": (4, 8, 8), "flux": (16, 12), "wan": (4, 3, 4, 4)}
# SD3.5-M's schedule of 10 steps with a = 0.7: g of every step
PUBLISHED_G = [3.5057, 3.4351, 2.2726, 1.7185, 1.3592, 1.0881, 0.8612, 0.6524, 0.4344, 0.0664]


def scheduler(dtype=torch.float32, steps=STEPS):
    sigmas = torch.from_numpy(flow_match_euler(steps)).to(dtype)
    return SimpleNamespace(sigmas=sigmas, timesteps=1000 * sigmas[:-1])


def host_step(sched, v, timestep, x, noise_level, y, kind, noise=None):
    """The released formulas, in the dtype of the states."""
    shape = (-1, *[1] * (x.ndim - 1))
    places = [int((sched.timesteps == t).nonzero()) for t in timestep]
    sigma = sched.sigmas[places].to(x).view(shape)
    below = sched.sigmas[[i + 1 for i in places]].to(x).view(shape)
    second, dt = sched.sigmas[1].to(x), below - sigma
    if kind == "sde":
        std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, second, sigma))) * noise_level
        mean = x * (1 + std**2 / (2 * sigma) * dt)
        mean = mean + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        scale = std * torch.sqrt(-dt)
        y = mean + scale * noise if y is None else y
        log_prob = -((y.detach() - mean) ** 2) / (2 * scale**2) - torch.log(scale)
        log_prob = log_prob - math.log(math.sqrt(2 * math.pi))
    else:
        std = below * math.sin(noise_level * math.pi / 2)
        clean, noisy = x - sigma * v, x + v * (1 - sigma)
        mean = clean * (1 - below) + noisy * torch.sqrt(below**2 - std**2)
        y = mean + std * noise if y is None else y
        log_prob = -((y.detach() - mean) ** 2)
    return y, log_prob.mean(tuple(range(1, x.ndim))), mean, std, torch.sqrt(-dt)


def case(layout, dtype, places, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = (BATCH, *LAYOUTS[layout])
    x, v, y = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    return scheduler(dtype).timesteps[places], x.to(dtype), v.to(dtype), (x + 0.3 * y).to(dtype)


def pulled(step, v, weights):
    """Values of a step, and the gradient of all that is differentiable in it."""
    v = v.clone().requires_grad_()
    found = step(v)
    scalar = (weights[0] * found[1]).sum() + (weights[1] * found[2]).sum()
    scalar.backward()
    return [value.detach().double() for value in (*found, v.grad)]


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("places", [[0], [7], [0, 3, 8, 9, 1]], ids=str)
def test_a_stored_step_is_scored_as_the_host_does(kind, layout, places):
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(BATCH, generator=rng), torch.randn(1, *LAYOUTS[layout], generator=rng)
    found, exact = {}, {}
    for dtype in (torch.float64, torch.float32):
        # the host's fp32 levels in both
        sched = scheduler(torch.float32)
        sched.sigmas = sched.sigmas.to(dtype)
        sched.timesteps = 1000 * sched.sigmas[:-1]
        t, x, v, y = case(layout, dtype, places)
        t = sched.timesteps[places]

        def ours(v, sched=sched, t=t, x=x, y=y):
            return sde_step_with_logprob(sched, v, t, x, 0.7, y, sde_type=kind, return_sqrt_dt=True)

        def host(v, sched=sched, t=t, x=x, y=y):
            return host_step(sched, v, t, x, 0.7, y, kind)

        scales = [w.to(dtype) for w in weights]
        found[dtype], exact[dtype] = pulled(ours, v, scales), pulled(host, v, scales)
        assert all(value.dtype == dtype for value in ours(v))
        assert ours(v)[3].shape == (len(places), *[1] * len(LAYOUTS[layout]))
    for ours, host in zip(found[torch.float64], exact[torch.float64], strict=True):
        assert ours.shape == host.shape
        torch.testing.assert_close(ours, host, rtol=1e-12, atol=1e-12)
    # in fp32 no further from the truth than the host itself
    triples = (found[torch.float32], exact[torch.float32], exact[torch.float64])
    for ours, host, truth in zip(*triples, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (host - truth).abs().max() + floor


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_new_step_draws_the_hosts_noise(kind):
    sched = scheduler(torch.float64)
    t, x, v, _ = case("sd3", torch.float64, [4])
    torch.manual_seed(7)
    ours = sde_step_with_logprob(sched, v, t, x, sde_type=kind)
    torch.manual_seed(7)
    noise = torch.randn(x.shape, dtype=x.dtype)
    host = host_step(sched, v, t, x, 0.7, None, kind, noise)
    for a, b in zip(ours, host, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    generators = [torch.Generator().manual_seed(i) for i in range(BATCH)]
    drawn = sde_step_with_logprob(sched, v, t, x, sde_type=kind, generator=generators)[0]
    for i in (0, 3):
        one = torch.Generator().manual_seed(i)
        alone = sde_step_with_logprob(
            sched, v[i : i + 1], t, x[i : i + 1], sde_type=kind, generator=one
        )[0]
        assert torch.equal(alone, drawn[i : i + 1])


def test_the_diffusion_is_that_of_the_published_table():
    sched = scheduler(torch.float64)
    found = []
    for t in sched.timesteps:
        x = torch.ones(1, 4, dtype=torch.float64)
        found.append(float(sde_step_with_logprob(sched, x, t[None], x)[3]))
    np.testing.assert_allclose(found, PUBLISHED_G, rtol=2e-3, atol=1e-4)


def test_the_ratio_is_one_on_policy_in_any_batch():
    sched = scheduler()
    t, x, v, _ = case("sd3", torch.float32, [2])
    y, rollout, mean, _ = sde_step_with_logprob(sched, v, t, x)
    rows = [4, 1]
    _, training, again, _ = sde_step_with_logprob(
        sched, v[rows], t.repeat(2), x[rows], prev_sample=y[rows]
    )
    assert torch.equal(training, rollout[rows])
    assert torch.equal(again, mean[rows])


def test_sixteen_bit_velocities_are_widened_as_the_host_does():
    sched = scheduler()
    t, x, v, y = case("sd3", torch.float32, [2])
    for dtype in (torch.bfloat16, torch.float16):
        low = v.to(dtype)
        ours = sde_step_with_logprob(sched, low, t, x.to(dtype), 0.7, y.to(dtype))
        wide = sde_step_with_logprob(
            sched, low.float(), t, x.to(dtype).float(), 0.7, y.to(dtype).float()
        )
        for a, b in zip(ours, wide, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_without_noise_it_is_the_euler_step(kind):
    sched = scheduler(torch.float64)
    t, x, v, _ = case("sd3", torch.float64, [3, 0, 9, 8, 1])
    y, log_prob, mean, std = sde_step_with_logprob(sched, v, t, x, 0.0, sde_type=kind)
    dt = (sched.sigmas[:-1] - sched.sigmas[1:])[[3, 0, 9, 8, 1]].view(-1, 1, 1, 1)
    torch.testing.assert_close(y, x - dt * v, rtol=1e-14, atol=1e-14)
    assert torch.equal(y, mean)
    assert not std.any()
    assert not log_prob.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_hosts(dtype):
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(64, generator=rng, dtype=dtype)
    new = (old + 2e-4 * torch.randn(64, generator=rng, dtype=dtype)).requires_grad_()
    advantages = 4 * torch.randn(64, generator=rng, dtype=dtype)
    advantages[5] = 0.0
    loss, stats = clipped_loss(new, old, advantages, 1e-4)
    loss.backward()
    ours, new.grad = new.grad, None
    a = advantages.clamp(-5, 5)
    ratio = torch.exp(new - old)
    host = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
    host.backward()
    tiny = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, host, rtol=4 * tiny, atol=4 * tiny)
    torch.testing.assert_close(ours, new.grad, rtol=8 * tiny, atol=tiny)
    cut = (new.grad == 0) & (a != 0)
    assert cut.sum() > 10
    assert float(stats.clipped_low + stats.clipped_high) == cut.sum()
    assert float(stats.edges) == 64


def test_the_kl_is_the_hosts_and_with_dt_the_true_one():
    sched = scheduler(torch.float64)
    t, x, v, y = case("sd3", torch.float64, [0, 3, 8, 9, 1])
    v.requires_grad_()
    _, _, mean, g, root = sde_step_with_logprob(sched, v, t, x, 0.7, y, return_sqrt_dt=True)
    base = sde_step_with_logprob(sched, 0.9 * v.detach(), t, x, 0.7, y)[2]
    kl_loss(mean, base, g).backward(retain_graph=True)
    ours, v.grad = v.grad, None
    host = (((mean - base) ** 2).mean((1, 2, 3), keepdim=True) / (2 * g**2)).mean()
    host.backward(retain_graph=True)
    torch.testing.assert_close(kl_loss(mean, base, g), host, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours, v.grad, rtol=1e-13, atol=1e-20)
    normal = torch.distributions.Normal
    true = torch.distributions.kl_divergence(normal(mean, g * root), normal(base, g * root))
    torch.testing.assert_close(kl_loss(mean, base, g, root), true.mean(), rtol=1e-13, atol=0)


T0 = torch.tensor([1000.0])
X = torch.zeros(2, 4, 3, 3)
BAD = [
    (
        {"timestep": torch.tensor([501.0])},
        ValueError,
        r"timestep must be of the scheduler's 10.*501",
    ),
    (
        {"timestep": torch.tensor(1000.0)},
        ValueError,
        r"timestep must be \(1,\) or \(2,\), got \(\)",
    ),
    ({"timestep": T0.repeat(3)}, ValueError, r"timestep must be \(1,\) or \(2,\), got \(3,\)"),
    ({"model_output": X[:, :2]}, ValueError, r"model_output must have the shape of sample, \(2, 4"),
    ({"prev_sample": X[:1]}, ValueError, r"prev_sample must have .* got \(1, 4, 3, 3\)"),
    ({"sample": X.clone().requires_grad_()}, NotImplementedError, "sample must not require a"),
    ({"sde_type": "dance"}, ValueError, "sde_type must be one of sde, cps, got 'dance'"),
    ({"noise_level": -1.0}, ValueError, "noise_level must be finite and >= 0, got -1"),
    ({"noise_level": 1.5, "sde_type": "cps"}, ValueError, r"eta must be in \(0, 1\], got 1.5"),
    ({"generator": [torch.Generator()] * 3}, ValueError, "generator must be one or 2"),
    ({"determistic": True}, TypeError, r"must be those of Flow-GRPO 54809b5, .*got 'determistic'"),
    ({"self": SimpleNamespace(sigmas=None)}, ValueError, "must have tensors timesteps and sigmas"),
    (
        {"self": SimpleNamespace(sigmas=torch.ones(10), timesteps=torch.ones(10))},
        ValueError,
        r"T timesteps and T \+ 1 sigmas that fall .* got 10 and 10 .*try set_timesteps",
    ),
]


@pytest.mark.parametrize(("changed", "error", "text"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_wrong_is_said(changed, error, text):
    given = {"self": scheduler(), "model_output": X, "timestep": T0, "sample": X}
    sde_step_with_logprob(**given)
    with pytest.raises(error, match=text):
        sde_step_with_logprob(**(given | changed))


def test_losses_refuse_other_shapes():
    one = torch.zeros(3)
    with pytest.raises(ValueError, match=r"advantages must be \(3,\) like log_prob, got \(3, 1\)"):
        clipped_loss(one, one, one[:, None])
    with pytest.raises(ValueError, match="clip must be two positive numbers"):
        clipped_loss(one, one, one, 0.0)
    with pytest.raises(ValueError, match="must have the shape of prev_sample_mean_ref"):
        kl_loss(X, X[:1], torch.ones(1))
    with pytest.raises(ValueError, match="std_dev_t must have 1 or 2 elements, got 3"):
        kl_loss(X, X, torch.ones(3))
