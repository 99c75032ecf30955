"""Steps and log-probabilities of the host seams against the hosts' formulas, values and gradients.

In float64 to 1e-12; in fp32 no further from float64 than twice what the host's own fp32 makes.
"""

from types import SimpleNamespace

import host_formulas as host
import pytest
import torch

from branchcore import ops
from branchcore.hosts import branch_grpo, dance_grpo, flow_factory, mix_grpo, verl_omni
from branchcore.noise import NO_STREAM, Noise

SHAPES = [(2, 3, 5), (3, 4, 6, 2), (1, 7), (2, 3, 2, 5, 4)]
# FLUX's shifted schedule of six steps, as the hosts hold it
T = torch.linspace(1, 0, 7)
SIGMAS = 3 * T / (1 + 2 * T)
LAST = len(SIGMAS) - 2
EPS = torch.finfo(torch.float32).eps


def tensors(shape, dtype, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    # fp32 values in both dtypes
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def near(ours, theirs, exact):
    """Ours equals the host in float64, and in fp32 is as near to float64 as the host is."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    miss = (ours.double() - exact).abs().max()
    if ours.dtype == torch.float64:
        assert miss <= 1e-12 * exact.abs().max().clamp(min=1)
    else:
        theirs_miss = (theirs.double() - exact).abs().max()
        assert miss <= 2 * theirs_miss + 4 * EPS * exact.abs().max().clamp(min=EPS)


def both_ways(ours, formula, dtype, shape, seed=0):
    """Compares named results and dL/dv of `ours(x, v, y)` and `formula(x, v, y)`, dicts."""
    weights, found = {}, []
    for call, kind in ((ours, dtype), (formula, dtype), (formula, torch.float64)):
        x, v, y = tensors(shape, kind, seed=seed)
        v.requires_grad_()
        results = call(x, v, y)
        for name, value in results.items():
            if name not in weights:
                generator = torch.Generator().manual_seed(len(weights))
                weights[name] = torch.randn(value.shape, generator=generator)
        moving = {k: r for k, r in results.items() if r.requires_grad}
        total = sum((r * weights[k].to(kind)).sum() for k, r in moving.items())
        (grad,) = torch.autograd.grad(total, v)
        found.append(({k: r.detach() for k, r in results.items()}, set(moving), grad))
    (mine, my_moving, my_grad), (theirs, _, their_grad), (exact, moving, exact_grad) = found
    assert my_moving == moving
    for name in exact:
        near(mine[name], theirs[name], exact[name])
    near(my_grad, their_grad, exact_grad)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def at(kind, x, v, index, level):
    return host.mean_and_std(kind, x, v, SIGMAS[index], SIGMAS[index + 1], level, SIGMAS[1])


def original(x, v, index):
    return x - host.spread(SIGMAS[index], x) * v


@DTYPES
@EVERY_SHAPE
@pytest.mark.parametrize("solver", [True, False])
@pytest.mark.parametrize("index", [0, 3, LAST])
def test_dance_grpo_flux_step_scores_as_the_host(dtype, shape, solver, index):
    def ours(x, v, y):
        step = dance_grpo.flux_step(v, x, 0.3, SIGMAS, torch.tensor(index), y, True, solver)
        mean = dance_grpo.flux_step(v, x, 0.3, SIGMAS, index, None, False, solver)
        assert step[0] is y
        return {"x0": step[1], "log_prob": step[2], "mean": mean[0], "again": mean[1]}

    def formula(x, v, y):
        mean, _, std = at("dance" if solver else "euler", x, v, index, 0.3)
        lp, x0 = host.log_prob("dance", y, mean, std, constants=False), original(x, v, index)
        return {"x0": x0, "log_prob": lp, "mean": mean, "again": x0}

    both_ways(ours, formula, dtype, shape)


@DTYPES
@EVERY_SHAPE
@pytest.mark.parametrize(("kind", "level"), [("sde", None), ("sde", 0.4), ("cps", None)])
@pytest.mark.parametrize("index", [0, 2, LAST])
def test_mix_grpo_flow_step_scores_as_the_host(dtype, shape, kind, level, index):
    def ours(x, v, y):
        step = mix_grpo.flow_grpo_step(
            v, x, 0.7, SIGMAS, index, y, sde_type=kind, noise_level=level
        )
        return dict(zip(("y", "x0", "log_prob", "mean", "std"), step, strict=True))

    def formula(x, v, y):
        name = "flow" if kind == "sde" else kind
        default = 0.7 if kind == "sde" else 0.8
        mean, _, std = at(name, x, v, index, level or default)
        lp = host.log_prob(name, y, mean, std)
        x0 = original(x, v, index)
        return {"y": y, "x0": x0, "log_prob": lp, "mean": mean, "std": std.reshape(())}

    both_ways(ours, formula, dtype, shape)


@DTYPES
@EVERY_SHAPE
@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("solver", [True, False])
def test_mix_grpo_dance_step_scores_as_the_host(dtype, shape, kind, solver):
    def ours(x, v, y):
        step = mix_grpo.dance_grpo_step(v, x, 0.3, SIGMAS, 2, y, True, solver, sde_type=kind)
        mean, _ = mix_grpo.dance_grpo_step(v, x, 0.3, SIGMAS, 2, y, False, solver, sde_type=kind)
        return {"x0": step[1], "log_prob": step[2], "mean": mean}

    def formula(x, v, y):
        name = "cps" if kind == "cps" else "dance" if solver else "euler"
        mean, _, std = at(name, x, v, 2, 0.8 if kind == "cps" else 0.3)
        lp = host.log_prob(kind, y, mean, std, constants=False)
        return {"x0": original(x, v, 2), "log_prob": lp, "mean": mean}

    both_ways(ours, formula, dtype, shape)


@DTYPES
@EVERY_SHAPE
def test_branch_grpo_scores_with_constants(dtype, shape):
    def ours(x, v, y):
        step = branch_grpo.flux_step_with_split(v, x, 0.3, SIGMAS, 1, y, True, True)
        return {"x0": step[1], "log_prob": step[2]}

    def formula(x, v, y):
        mean, _, std = at("dance", x, v, 1, 0.3)
        return {"x0": original(x, v, 1), "log_prob": host.log_prob("dance", y, mean, std)}

    both_ways(ours, formula, dtype, shape)


def test_branch_grpo_splits_as_released_and_as_asked():
    x, v, _ = tensors((2, 3, 5), torch.float64)
    call = (v, x, 0.3, SIGMAS, 1, None, True, True, 3, 4.0)
    mean, _, std = at("dance", x, v, 1, 0.3)
    torch.manual_seed(5)
    children = [mean + 4.0 * torch.randn_like(mean) * std for _ in range(3)]
    for scored, scale in (("released", 1.0), ("drawn", 4.0)):
        torch.manual_seed(5)
        y, x0, lp = branch_grpo.flux_step_with_split(*call, scored=scored)
        torch.testing.assert_close(y, torch.cat(children), rtol=0, atol=1e-12)
        torch.testing.assert_close(x0, original(x, v, 1).repeat(3, 1, 1), rtol=0, atol=1e-12)
        exact = [host.log_prob("dance", child, mean, scale * std) for child in children]
        torch.testing.assert_close(lp, torch.cat(exact), rtol=0, atol=1e-10)
        again = branch_grpo.one_step_log_prob(
            SimpleNamespace(eta=0.3), v, x, y[:2], 1, SIGMAS, noise_scale=scale
        )
        assert torch.equal(again, lp[:2])
    # the released rounding to bf16 after the score moves the ratio; rounding before it does not
    x, v, _ = tensors((2, 3, 5), torch.float32)
    args = SimpleNamespace(eta=0.3)
    for stored, moved in ((None, True), (torch.bfloat16, False)):
        y, _, lp = branch_grpo.flux_step_with_split(
            v, x, 0.3, SIGMAS, 1, None, True, True, stored=stored
        )
        kept = y.to(torch.bfloat16)
        trained = branch_grpo.one_step_log_prob(args, v, x, kept, 1, SIGMAS)
        assert torch.equal(trained, lp) != moved


def test_branch_grpo_has_a_smallest_std():
    x, v, y = tensors((2, 3, 5), torch.float64)
    mean, _, _ = at("dance", x, v, 1, 1e-9)
    step = branch_grpo.flux_step_with_split(v, x, 1e-9, SIGMAS, 1, y, True, True)
    exact = host.log_prob("dance", y, mean, torch.tensor(1e-8, dtype=torch.float64))
    torch.testing.assert_close(step[2], exact)


# exact in fp32, in which the host keeps them
FF = {"Flow-SDE": ("flow", 0.75), "Dance-SDE": ("dance", 0.25), "CPS": ("cps", 0.75)}


class Scheduler:
    """What the seams read of a flow-matching scheduler with an SDE step."""

    def __init__(self, dynamics_type="Flow-SDE", sde_steps=range(1, 5), noise_level=0.75):
        self.sigmas, self.timesteps = SIGMAS, SIGMAS[:-1] * 1000
        self.dynamics_type, self.is_eval, self.step_index = dynamics_type, False, 2
        self.sde_steps, self.noise_level = torch.tensor(list(sde_steps)), noise_level

    def index_for_timestep(self, timestep):
        return int((self.timesteps == timestep).nonzero()[0, 0])

    def get_noise_level_for_sigma(self, sigma):
        where = (sigma.unsqueeze(-1) == self.sigmas).int().argmax(-1)
        return torch.where(torch.isin(where, self.sde_steps), self.noise_level, 0.0)


NAMES = ("y", "mean", "v", "log_prob", "std", "dt")


@DTYPES
@EVERY_SHAPE
@pytest.mark.parametrize("kind", FF)
@pytest.mark.parametrize("given", [False, True], ids=["scheduler's next", "given next"])
def test_flow_factory_scores_every_sample_at_its_own_time(dtype, shape, kind, given):
    name, level = FF[kind]
    where = torch.arange(shape[0]) % 2 + 2
    scheduler = Scheduler(kind, noise_level=level)
    times = scheduler.timesteps[where]
    after = (SIGMAS * 1000)[where + 1]

    def ours(x, v, y):
        extra = {"timestep_next": after, "noise_level": level} if given else {}
        found = flow_factory.step(scheduler, v, times, x, y, return_dict=False, **extra)
        found = dict(zip(NAMES, found, strict=True))
        assert found["v"] is v
        return {n: found[n].to(x.dtype) for n in ("y", "mean", "log_prob")}

    def formula(x, v, y):
        sigma, nxt = SIGMAS[where], SIGMAS[where + 1]
        if given:
            sigma, nxt = times.to(x.dtype) / 1000, after.to(x.dtype) / 1000
        mean, _, std = host.mean_and_std(name, x, v, sigma, nxt, level, SIGMAS[1])
        return {"y": y, "mean": mean, "log_prob": host.log_prob(name, y, mean, std)}

    both_ways(ours, formula, dtype, shape)


@pytest.mark.parametrize("sigma_max", [None, 0.9])
def test_flow_factory_replaces_sigma_one_inside_the_root(sigma_max):
    x, v, y = tensors((2, 3, 5), torch.float64)
    scheduler, second = Scheduler(), SIGMAS[1] if sigma_max is None else sigma_max
    options = {"noise_level": 0.75, "sigma_max": sigma_max}
    out = flow_factory.step(scheduler, v, scheduler.timesteps[0], x, y, **options)
    mean, _, std = host.mean_and_std("flow", x, v, SIGMAS[0], SIGMAS[1], 0.75, second)
    exact = host.log_prob("flow", y, mean, std)
    torch.testing.assert_close(out.log_prob, exact, rtol=1e-12, atol=0)


def test_flow_factory_returns_g_and_dt_and_what_is_asked_for():
    x, v, y = tensors((2, 3, 5), torch.float32)
    scheduler = Scheduler()
    out = flow_factory.step(scheduler, v, scheduler.timesteps[2], x, y)
    _, g, _ = at("flow", x, v, 2, 0.75)
    torch.testing.assert_close(out.std_dev_t, g)
    torch.testing.assert_close(out.dt, (SIGMAS[3] - SIGMAS[2]).view(1, 1, 1))
    some = flow_factory.step(scheduler, v, scheduler.timesteps[2], x, y, return_kwargs=["log_prob"])
    assert torch.equal(some.log_prob, out.log_prob)
    assert some.next_latents is None
    none = flow_factory.step(scheduler, v, scheduler.timesteps[2], x, y, compute_log_prob=False)
    assert none.log_prob is None


@pytest.mark.parametrize("kind", [*FF, "ODE"])
def test_flow_factory_has_no_nan_where_there_is_no_noise(kind):
    x, v, _ = tensors((2, 3, 5), torch.float64)
    # step 0 is outside of sde_steps; step 2 of the second sample is not
    scheduler = Scheduler(kind)
    v.requires_grad_()
    out = flow_factory.step(scheduler, v, scheduler.timesteps[torch.tensor([0, 0])], x)
    euler = x + host.spread(SIGMAS[1] - SIGMAS[0], x) * v
    torch.testing.assert_close(out.next_latents, euler, rtol=0, atol=1e-6)
    assert torch.equal(out.log_prob, torch.zeros(2, dtype=torch.float64))
    out.log_prob.sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))
    scheduler.is_eval = True
    off = flow_factory.step(scheduler, v, scheduler.timesteps[2], x)
    assert torch.equal(off.log_prob, torch.zeros(2, dtype=torch.float64))


VERL = {"sde": ("flow", 0.7), "dance_sde": ("dance", 0.3), "cps": ("cps", 0.8)}


@DTYPES
@EVERY_SHAPE
@pytest.mark.parametrize("kind", VERL)
@pytest.mark.parametrize("normalizer", [True, False])
@pytest.mark.parametrize("timed", [True, False], ids=["times", "step index"])
def test_verl_omni_scores_as_the_host(dtype, shape, kind, normalizer, timed):
    name, level = VERL[kind]
    scheduler = Scheduler()
    where = torch.arange(shape[0]) % 3 if timed else torch.tensor([scheduler.step_index])
    times = scheduler.timesteps[where] if timed else None

    def ours(x, v, y):
        options = {"include_logprob_normalizer": normalizer, "return_sqrt_dt": True}
        found = verl_omni.sample_previous_step(
            scheduler, x, v, times, noise_level=level, prev_sample=y, sde_type=kind, **options
        )
        return dict(zip(("y", "log_prob", "mean", "std", "root"), found, strict=True))

    def formula(x, v, y):
        sigma, after = SIGMAS[where], SIGMAS[where + 1]
        mean, shown, std = host.mean_and_std(name, x, v, sigma, after, level, SIGMAS[1])
        lp = host.log_prob(name, y, mean, std, constants=normalizer)
        root = (sigma.to(x.dtype) - after.to(x.dtype)).sqrt().expand(len(x))
        shown = shown if timed else shown.reshape(())
        return {"y": y, "log_prob": lp, "mean": mean, "std": shown, "root": root}

    both_ways(ours, formula, dtype, shape)


def calls(x, v, y, **options):
    """Every step seam at step 2 of the schedule: (prev_sample, log_prob)."""
    scheduler, times = Scheduler(), (SIGMAS * 1000)[torch.full((len(x),), 2)]
    dance = dance_grpo.flux_step(v, x, 0.3, SIGMAS, 2, y, True, True, **options)
    flow = mix_grpo.flow_grpo_step(v, x, 0.7, SIGMAS, 2, y, **options)
    mixed = mix_grpo.dance_grpo_step(v, x, 0.3, SIGMAS, 2, y, True, True, **options)
    factory = flow_factory.step(scheduler, v, times, x, y, **options)
    verl = verl_omni.sample_previous_step(scheduler, x, v, times, prev_sample=y, **options)
    return {
        "dance": (dance[0], dance[2]),
        "flow": (flow[0], flow[2]),
        "mixed": (mixed[0], mixed[2]),
        "factory": (factory.next_latents, factory.log_prob),
        "verl": (verl[0], verl[1]),
    }


KINDS = {"dance": ("dance", 0.3), "mixed": ("dance", 0.3), "factory": ("flow", 0.75)}


def test_draws_are_those_of_torch_in_the_host_s_order():
    x, v, _ = tensors((3, 4, 5), torch.float32)
    torch.manual_seed(3)
    drawn = calls(x, v, None)
    torch.manual_seed(3)
    for name, (sample, _) in drawn.items():
        kind, level = KINDS.get(name, ("flow", 0.7))
        mean, _, std = at(kind, x, v, 2, level)
        torch.testing.assert_close(sample, mean + std * torch.randn_like(mean), msg=name)


def test_a_generator_of_the_host_draws_instead_of_the_global_one():
    x, v, _ = tensors((3, 4, 5), torch.float32)
    mean, _, std = at("flow", x, v, 2, 0.7)
    exact = mean + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    source = torch.Generator().manual_seed(8)
    step = mix_grpo.flow_grpo_step(v, x, 0.7, SIGMAS, 2, None, source)
    torch.testing.assert_close(step[0], exact)
    source = torch.Generator().manual_seed(8)
    step = verl_omni.sample_previous_step(Scheduler(), x, v, generator=source)
    torch.testing.assert_close(step[0], exact)


def test_generators_per_sample_draw_alone():
    x, v, _ = tensors((3, 4, 5), torch.float32)
    many = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    scheduler = Scheduler()
    together = flow_factory.step(scheduler, v, scheduler.timesteps[2], x, generator=many)
    for i, seed in enumerate((1, 2, 3)):
        one = torch.Generator().manual_seed(seed)
        alone = flow_factory.step(
            scheduler, v[i : i + 1], scheduler.timesteps[2], x[i : i + 1], generator=one
        )
        assert torch.equal(together.next_latents[i : i + 1], alone.next_latents)
        assert torch.equal(together.log_prob[i : i + 1], alone.log_prob)
    with pytest.raises(ValueError, match=r"generator must be one or 3, .*got 2"):
        flow_factory.step(scheduler, v, scheduler.timesteps[2], x, generator=many[:2])


def test_named_noise_is_the_engine_s_and_fused():
    x, v, _ = tensors((3, 4, 5), torch.float64)
    streams = torch.tensor([[4, NO_STREAM, 9], [5, NO_STREAM, 9], [6, NO_STREAM, 9]])
    mix = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    noise = Noise(torch.tensor([7, 1, 0]), streams.int(), mix)
    eps = ops.philox_normal(noise, 20, torch.float64).view(x.shape)
    for name, (sample, _) in calls(x, v, None, noise=noise).items():
        kind, level = KINDS.get(name, ("flow", 0.7))
        mean, _, std = at(kind, x, v, 2, level)
        torch.testing.assert_close(sample, mean + std * eps, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_exactly_one_at_any_batch_size(dtype):
    x, v, _ = tensors((4, 3, 70, 33), torch.float32)
    v = v.to(dtype)
    torch.manual_seed(0)
    drawn = calls(x, v, None)
    for name, (sample, rolled) in drawn.items():
        for part in (slice(0, 4), slice(1, 3), slice(3, 4)):
            scored = calls(x[part], v[part], sample[part])[name][1]
            assert torch.equal(scored, rolled[part]), name
    args = SimpleNamespace(eta=0.3)
    again = dance_grpo.one_step_log_prob(args, v, x, drawn["dance"][0], 2, SIGMAS)
    assert torch.equal(again, drawn["dance"][1])


@pytest.mark.parametrize(("flow", "kind"), [(True, "sde"), (True, "cps"), (False, "sde")])
def test_mix_grpo_s_training_score_is_its_step_s(flow, kind):
    x, v, y = tensors((2, 3, 5), torch.float32)
    args = SimpleNamespace(
        eta=0.7, flow_grpo_sampling=flow, sde_type=kind, noise_level=0.6, dpm_algorithm_type="null"
    )
    scored = mix_grpo.one_step_log_prob(args, v, x, y, 2, SIGMAS)
    options = {"sde_type": kind, "noise_level": 0.6}
    if flow:
        step = mix_grpo.flow_grpo_step(v, x, 0.7, SIGMAS, 2, y, **options)
    else:
        step = mix_grpo.dance_grpo_step(v, x, 0.7, SIGMAS, 2, y, True, True, **options)
    assert torch.equal(scored, step[2])


def test_mix_grpo_s_other_ways_to_the_next_state():
    x, v, _ = tensors((2, 3, 5), torch.float64)
    step = mix_grpo.flow_grpo_step(v, x, 0.7, SIGMAS, 2, None, determistic=True)
    mean, _, std = at("flow", x, v, 2, 0.7)
    euler = x + host.spread(SIGMAS[3].double() - SIGMAS[2].double(), x).double() * v
    torch.testing.assert_close(step[0], euler, rtol=0, atol=1e-6)
    exact = host.log_prob("flow", step[0], mean, std)
    torch.testing.assert_close(step[2], exact, rtol=0, atol=1e-12)
    still = mix_grpo.dance_grpo_step(v, x, 0.3, SIGMAS, 2, None, True, False)
    torch.testing.assert_close(still[0], euler, rtol=0, atol=1e-6)
    assert torch.equal(still[2], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_multiplied_in_fp32(dtype):
    x, v, y = tensors((2, 3, 5), torch.float32)
    half = v.to(dtype)
    for name, (_, scored) in calls(x, half, y).items():
        assert torch.equal(scored, calls(x, half.float(), y)[name][1]), name
