"""Losses, advantages and rewards of the host seams against the hosts' formulas, both ways."""

import asyncio
from types import SimpleNamespace

import host_formulas as host
import numpy as np
import pytest
import torch

from branchcore.hosts import (
    awm,
    dance_grpo,
    diffusion_nft,
    flow_factory_advantage,
    trl,
    verl_omni,
)
from branchcore.rewards import Rewards, score

EPS = torch.finfo(torch.float32).eps
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
SHAPES = pytest.mark.parametrize("shape", [(6, 3, 5), (4, 4, 6, 2), (2, 70, 33)], ids=str)


def normal(shape, dtype, seed, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype)


def both_ways(ours, formula, dtype, inputs, floor=4):
    """Loss and gradient: equal in float64; in fp32 as near to it as the host's fp32 is.

    `inputs(dtype)` gives the tensors, the first of which is differentiated.
    """
    found = []
    for call, kind in ((ours, dtype), (formula, dtype), (formula, torch.float64)):
        first, *rest = inputs(kind)
        first.requires_grad_()
        loss = call(first, *rest)
        (grad,) = torch.autograd.grad(loss, first)
        found.append((loss.detach(), grad))
    for mine, theirs, exact in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        miss = (mine.double() - exact).abs().max()
        size = exact.abs().max()
        if dtype == torch.float64:
            assert miss <= 1e-12 * size.clamp(min=1)
        else:
            their_miss = (theirs.double() - exact).abs().max()
            assert miss <= 2 * their_miss + floor * EPS * size.clamp(min=EPS)


def log_probs(count, scale=2e-4):
    """New and old log-probabilities whose ratios lie on both sides of the clip ranges."""

    def of(dtype):
        new = normal(count, dtype, 1, 0.5) + 1.4
        old = new - normal(count, dtype, 2, scale)
        return [new, old, normal(count, dtype, 3, 4.0)]

    return of


@DTYPES
@pytest.mark.parametrize("kl_coeff", [0.0, 0.01])
def test_dance_and_mix_grpo_loss(dtype, kl_coeff):
    def ours(new, old, advantages):
        call = (new, old, advantages)
        result = dance_grpo.policy_loss(*call, clip_range=1e-4, adv_clip_max=5, kl_coeff=kl_coeff)
        assert 0 < result.stats.clipped_low + result.stats.clipped_high < len(new)
        return result.loss

    def formula(new, old, advantages):
        loss = host.clipped_loss((new - old).exp(), advantages, 1e-4, 5)
        return loss + kl_coeff * 0.5 * ((new - old) ** 2).mean()

    both_ways(ours, formula, dtype, log_probs(64))


def config(**options):
    return SimpleNamespace(
        diffusion_loss=SimpleNamespace(clip_ratio=1e-4, adv_clip_max=3, **options)
    )


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_verl_omni_flow_grpo_loss_and_metrics(dtype, weighted):
    weights = normal(64, torch.float32, 5).abs().clamp(max=1) if weighted else None
    seen = {}

    def ours(new, old, advantages):
        loss, metrics = verl_omni.flow_grpo_loss(
            old_log_prob=old,
            log_prob=new,
            advantages=advantages,
            config=config(),
            rollout_is_weights=weights,
        )
        ratio = (new - old).detach().exp()
        seen.update(metrics)
        far = (ratio - 1).abs() > 1e-4
        exact = {
            "actor/ppo_kl": (old - new).detach().mean(),
            "actor/pg_clipfrac": far.double().mean(),
            "actor/pg_clipfrac_higher": (ratio - 1 > 1e-4).double().mean(),
            "actor/pg_clipfrac_lower": (1 - ratio > 1e-4).double().mean(),
            "actor/ratio_mean": ratio.mean(),
            "actor/ratio_std": ratio.std(),
        }
        assert metrics == pytest.approx({k: v.item() for k, v in exact.items()}, rel=1e-5, abs=1e-9)
        return loss

    def formula(new, old, advantages):
        terms = host.clipped_terms((new - old).exp(), advantages, 1e-4, 3)
        return (terms if weights is None else terms * weights.to(terms.dtype)).mean()

    both_ways(ours, formula, dtype, log_probs(64))
    assert all(isinstance(value, float) for value in seen.values())


@DTYPES
@SHAPES
def test_verl_omni_guard_moves_the_mean_and_the_log_prob(dtype, shape):
    """The gradient to the velocity passes through the log-probability and through the mean."""
    g, dt, bound = 2.2726, 0.0556, SimpleNamespace(clip_ratio=2e-6, adv_clip_max=3)
    std = g * dt**0.5

    def inputs(kind):
        mean = normal(shape, kind, 1)
        old_mean = mean + normal(shape, kind, 2, 1e-3)
        y = old_mean + std * normal(shape, kind, 3)
        return [mean, old_mean, y, normal(shape[0], kind, 4, 2.0)]

    def parts(mean, old_mean, y):
        new, old = (host.log_prob("flow", y, m, torch.tensor(std)) for m in (mean, old_mean))
        shown = torch.full((shape[0], *[1] * (len(shape) - 1)), g, dtype=mean.dtype)
        return new, old, shown, torch.full((shape[0],), dt, dtype=mean.dtype).sqrt()

    def ours(mean, old_mean, y, advantages):
        new, old, shown, root = parts(mean, old_mean, y)
        return verl_omni.grpo_guard_loss(
            old_log_prob=old,
            log_prob=new,
            advantages=advantages,
            config=SimpleNamespace(diffusion_loss=bound),
            old_prev_sample_mean=old_mean,
            prev_sample_mean=mean,
            std_dev_t=shown,
            sqrt_dt=root,
        )[0]

    def formula(mean, old_mean, y, advantages):
        new, old, shown, root = parts(mean, old_mean, y)
        log_ratio = host.guard_log_ratio(new, old, mean, old_mean, shown, root)
        return host.clipped_loss(log_ratio.exp(), advantages, 2e-6, 3) / root.mean() ** 2

    both_ways(ours, formula, dtype, inputs)


def pictures(shape):
    def of(kind):
        x0, noise = normal(shape, kind, 2), normal(shape, kind, 3)
        t = torch.linspace(0.2, 0.95, shape[0]).to(kind)
        return [noise - x0 + normal(shape, kind, 1, 0.3), x0, noise, t]

    return of


@DTYPES
@SHAPES
@pytest.mark.parametrize("weighting", awm.WEIGHTINGS)
def test_awm_log_prob(dtype, shape, weighting):
    weights = normal(shape[0], torch.float32, 9)

    def ours(v, x0, noise, t):
        # the script's times are (N, 1, 1, 1)
        times = t.view(-1, *[1] * (len(shape) - 1))
        value = awm.log_prob_awm(v, times, x0, noise, weighting, 0.25)
        return (value * weights.to(v.dtype)).sum()

    def formula(v, x0, noise, t):
        value = host.awm_log_prob(v, x0, noise, t, weighting, 0.25)
        return (value * weights.to(v.dtype)).sum()

    both_ways(ours, formula, dtype, pictures(shape))


@DTYPES
@SHAPES
@pytest.mark.parametrize("weight", awm.KL_WEIGHTS)
def test_awm_velocity_kl(dtype, shape, weight):
    def formula(v, other, _, t):
        kl = host.mean_over_elements((v - other) ** 2)
        std = torch.sqrt(t / (1 - t.clamp(0, 0.99))) * 0.7
        return (kl if weight == "Uniform" else kl / (2 * std**2)).mean()

    def ours(v, other, _, t):
        return awm.velocity_kl(v, other, weight, t)

    both_ways(ours, formula, dtype, pictures(shape))


@DTYPES
@pytest.mark.parametrize("loss_type", awm.LOSS_TYPES)
@pytest.mark.parametrize("top", [None, 1.0])
def test_awm_policy_loss(dtype, loss_type, top):
    train = SimpleNamespace(adv_clip_max=5, advantage_max=top, clip_range=0.2, loss_type=loss_type)

    def inputs(kind):
        new = normal((6, 8), kind, 1, 0.5)
        return [new, new - normal((6, 8), kind, 2, 0.3), normal(8, kind, 3, 4.0)]

    def ours(new, old, advantages):
        return awm.policy_loss(SimpleNamespace(train=train), new, old, advantages).loss

    def formula(new, old, advantages):
        advantages = advantages.clamp(-5, 5) * (1 if top is None else top / 5)
        if loss_type == "sum_first":
            new, old = new.mean(0), old.mean(0)
        ratio = (new - old).exp()
        return host.clipped_loss(ratio, advantages.expand(ratio.shape), 0.2, 99)

    both_ways(ours, formula, dtype, inputs)


@DTYPES
@SHAPES
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_diffusion_nft_policy_loss(dtype, shape, beta):
    def inputs(kind):
        v, x0, noise, t = pictures(shape)(kind)
        xt = (1 - host.spread(t, x0)) * x0 + host.spread(t, x0) * noise
        old, ref = (v + normal(shape, kind, seed, 0.05) for seed in (5, 6))
        return [v, old, ref, x0, xt, t, torch.linspace(0, 1, shape[0]).to(kind)]

    def ours(*args):
        found = diffusion_nft.policy_loss(*args, beta=beta, adv_clip_max=5, kl_weight=1e-2)
        whole = found.policy_loss + 1e-2 * found.kl_div_loss
        torch.testing.assert_close(found.loss.detach(), whole)
        return found.loss

    def formula(*args):
        return host.nft_loss(*args, beta, 5, 1e-2)

    both_ways(ours, formula, dtype, inputs)


def test_diffusion_nft_without_a_reference_and_from_noise_that_fits_exactly():
    v, x0, noise, t = pictures((4, 3, 5))(torch.float64)
    exact = noise - x0
    xt = (1 - host.spread(t, x0)) * x0 + host.spread(t, x0) * noise
    r = torch.ones(4, dtype=torch.float64)
    call = {"beta": 1.0, "adv_clip_max": 5, "kl_weight": 0.0}
    assert diffusion_nft.policy_loss(exact, exact, None, x0, xt, t, r, **call).loss < 1e-20
    # so near that the smallest weight, 1e-5, divides
    close, ref = exact + 4e-6, torch.zeros_like(x0)
    found = diffusion_nft.policy_loss(close, exact, ref, x0, xt, t, r, **call).policy_loss
    formula = host.nft_loss(close, exact, ref, x0, xt, t, r, 1.0, 5, 0.0)
    torch.testing.assert_close(found, formula, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"kl_weight 0\.1, got None"):
        diffusion_nft.policy_loss(v, v, None, x0, xt, t, r, **{**call, "kl_weight": 0.1})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.4, 0.5, 0.7, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.7, 1.0]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_diffusion_nft_shares(mode, expected):
    advantages = torch.tensor([-9.0, -1.0, 0.0, 2.0, 5.0])
    shares = diffusion_nft.reward_probability(advantages, adv_clip_max=5, adv_mode=mode)
    assert shares.tolist() == pytest.approx(expected)


@DTYPES
def test_trl_ddpo_loss(dtype):
    call = {"train_clip_range": 1e-4, "train_adv_clip_max": 5.0}

    def ours(new, old, advantages):
        found = trl.policy_loss(new, old, advantages, **call)
        log_ratio = (new - old).detach()
        torch.testing.assert_close(found.approx_kl, 0.5 * (log_ratio**2).mean())
        far = (log_ratio.exp() - 1).abs() > 1e-4
        assert found.clipfrac == far.to(dtype).mean()
        return found.loss

    def formula(new, old, advantages):
        return host.clipped_loss((new - old).exp(), advantages, 1e-4, 5)

    both_ways(ours, formula, dtype, log_probs(64))


def test_a_weight_of_zero_and_an_empty_batch_leave_nothing():
    new, old, advantages = log_probs(4)(torch.float32)
    new.requires_grad_()
    loss, _ = verl_omni.flow_grpo_loss(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        config=config(),
        rollout_is_weights=torch.zeros(4),
    )
    loss.backward()
    assert loss == 0
    assert torch.equal(new.grad, torch.zeros(4))
    none = torch.zeros(0)
    empty = dance_grpo.policy_loss(none, none, none, clip_range=1e-4, adv_clip_max=5)
    assert empty.loss == 0


class Accelerator:
    """Two processes in one: gathers the other's part, adds its sums."""

    def __init__(self, gathered=None, reduced=None, index=0, processes=1):
        self.device, self.num_processes, self.process_index = "cpu", processes, index
        self.gathered, self.reduced = gathered or (lambda x: x), reduced or (lambda x: x)

    def gather(self, tensor):
        return self.gathered(tensor)

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return self.reduced(tensor)


def processor(global_std, same_rank, accelerator=None, size=4):
    return SimpleNamespace(
        accelerator=accelerator or Accelerator(),
        group_on_same_rank=same_rank,
        group_size=size,
        global_std=global_std,
        reward_weights={"hps": 0.7, "clip": 1.4, "unused": 1.0},
    )


def samples(ids):
    return [SimpleNamespace(unique_id=i, extra_kwargs={}) for i in ids]


IDS = [7, 3, 7, 3, 3, 7, 3, 7, 9, 9, 9, 9]


def rewards(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.rand(len(IDS), generator=generator).double() for k in ("hps", "clip")}


def per_group(values, ids, spread=None):
    """The host's (r - mean) / max(std, 1e-6), std biased, of the group or given."""
    out = np.zeros_like(values)
    for group in set(ids):
        where = np.array(ids) == group
        std = values[where].std() if spread is None else spread
        out[where] = (values[where] - values[where].mean()) / max(std, 1e-6)
    return out


def hosts_advantages(kind, found, global_std):
    if kind == "weighted_sum":
        total = 0.7 * found["hps"].numpy() + 1.4 * found["clip"].numpy()
        return per_group(total, IDS, total.std() if global_std else None)
    total = sum(w * per_group(found[k].numpy(), IDS) for k, w in (("hps", 0.7), ("clip", 1.4)))
    return (total - total.mean()) / max(total.std(), 1e-6)


@pytest.mark.parametrize("kind", ["weighted_sum", "gdpo"])
@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("same_rank", [False, True])
def test_flow_factory_advantages(kind, global_std, same_rank):
    found, mine = rewards(), samples(IDS)
    aggregate = getattr(flow_factory_advantage, kind)
    advantages = aggregate(processor(global_std, same_rank), mine, found, True)
    np.testing.assert_allclose(advantages, hosts_advantages(kind, found, global_std), atol=1e-12)
    assert [s.extra_kwargs["advantage"].item() for s in mine] == advantages.tolist()
    kept = samples(IDS)
    aggregate(processor(global_std, same_rank), kept, found, False)
    assert not any(s.extra_kwargs for s in kept)


def test_flow_factory_advantages_of_two_processes():
    found = rewards()
    halves = [slice(0, 6), slice(6, 12)]
    exact = hosts_advantages("gdpo", found, True)
    ids, both = torch.tensor(IDS), torch.stack([found["hps"], found["clip"]], dim=1)
    for index, half in enumerate(halves):
        accelerator = Accelerator(lambda x: ids if x.dtype == torch.int64 else both, None, index, 2)
        part = {k: v[half] for k, v in found.items()}
        call = (processor(True, False, accelerator), samples(IDS[half]), part, False)
        np.testing.assert_allclose(flow_factory_advantage.gdpo(*call), exact[half], atol=1e-12)


def test_flow_factory_sums_over_processes_keep_their_digits():
    """Rewards around 1e4: sqrt(E r^2 - (E r)^2) of fp32 sums is off or fails, as the host's is."""
    near_ = torch.tensor([0.0, 1.0, 2.0, 4.0] * 3, dtype=torch.float64) * 1e-2
    found = {"hps": 1e4 + near_}
    ids = [1] * 4 + [2] * 4 + [3] * 4
    sums = [12.0, float(found["hps"].sum()), float((found["hps"] ** 2).sum())]
    fp32 = torch.tensor(sums, dtype=torch.float32)
    theirs = (fp32[2] / fp32[0]).item() - (fp32[1] / fp32[0]).item() ** 2
    exact = (0.7 * found["hps"]).std(correction=0).item()
    assert abs(abs(theirs) ** 0.5 * 0.7 - exact) > 0.1 * exact
    call = (processor(True, True), samples(ids), found, False)
    advantages = flow_factory_advantage.weighted_sum(*call)
    mean = near_[:4].mean()
    torch.testing.assert_close(advantages, 0.7 * (near_ - mean) / exact, rtol=1e-9, atol=1e-9)


def test_flow_factory_keeps_prompts_apart_whose_ids_are_long():
    base = 2**40
    ids = [base, base, base + 1, base + 1]
    assert torch.tensor(ids).float().unique().numel() == 1
    found = {"hps": torch.tensor([1.0, 2.0, 5.0, 9.0])}
    call = (processor(False, False, size=2), samples(ids), found, False)
    assert flow_factory_advantage.weighted_sum(*call).tolist() == pytest.approx([-1, 1, -1, 1])


def test_flow_factory_gives_nothing_for_rewards_equal_up_to_rounding():
    found = {"hps": torch.full((4,), 0.1, dtype=torch.float64)}
    found["hps"][1] += 1e-16
    call = (processor(False, True), samples([1] * 4), found, False)
    assert flow_factory_advantage.weighted_sum(*call).tolist() == [0.0] * 4


@pytest.mark.parametrize("global_std", [False, True])
def test_flow_factory_divides_by_no_less_than_a_millionth(global_std):
    values = 1e-8 * torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    call = (processor(global_std, True), samples([1] * 4), {"hps": values}, False)
    exact = 0.7 * (values - values.mean()) / 1e-6
    torch.testing.assert_close(flow_factory_advantage.weighted_sum(*call), exact)


IMAGES = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a cat"]


def length(prompts, completions, answer, **extra):
    """A GRPO reward with a column, that says nothing about dogs."""
    assert not extra
    zipped = zip(prompts, completions, answer, strict=True)
    return [None if "dog" in p else float(c.mean()) + a for p, c, a in zipped]


def test_trl_grpo_rewards_are_branchcore_s():
    reward = trl.GRPOReward(length, columns={"answer": {"a cat": 1, "a dog": 2}})
    scores = score(reward, IMAGES, PROMPTS)
    assert scores.names == ("length",)
    assert scores.masked.tolist() == [False, True, False]
    assert "length returned None" in scores.because
    exact = IMAGES.mean((1, 2, 3)).double() + 1
    np.testing.assert_allclose(scores.values[[0, 2], 0], exact[[0, 2]], atol=1e-6)
    both = Rewards({"a": reward, "b": trl.GRPOReward(lambda prompts, completions: [1, 2, 3])})
    together = score(both, IMAGES, PROMPTS)
    assert together.names == ("a", "b")
    assert together.masked.tolist() == [False, True, False]


def test_trl_ddpo_rewards_are_branchcore_s():
    def brightness(images, prompts, metadata):
        assert isinstance(prompts, tuple)
        return images.mean((1, 2, 3)) * torch.tensor([m.get("by", 1.0) for m in metadata]), {}

    reward = trl.DDPOReward(brightness, metadata={"a dog": {"by": 2.0}}, name="light")
    scores = score(reward, IMAGES, PROMPTS)
    exact = IMAGES.mean((1, 2, 3)) * torch.tensor([1.0, 2.0, 1.0])
    np.testing.assert_allclose(scores.values[:, 0], exact, atol=1e-7)
    assert scores.names == ("light",)


def test_trl_rewards_that_do_not_fit():
    with pytest.raises(TypeError, match=r"must need no more than .*, got answer; try columns"):
        trl.GRPOReward(length)
    with pytest.raises(TypeError, match="got completion_ids"):
        trl.GRPOReward(lambda prompts, completions, completion_ids: [])
    with pytest.raises(NotImplementedError, match="must not be asynchronous"):
        trl.GRPOReward(asyncio.sleep)
    with pytest.raises(NotImplementedError, match="got the module"):
        trl.DDPOReward(torch.nn.Linear(1, 1))
    lacking = trl.GRPOReward(length, columns={"answer": {"a cat": 1}})
    with pytest.raises(ValueError, match="must have every prompt, got none for 'a dog'"):
        lacking(IMAGES, PROMPTS)
    short = trl.GRPOReward(lambda prompts, completions: [None])
    with pytest.raises(ValueError, match="must return 3 numbers, got 1"):
        short(IMAGES, PROMPTS)
    with pytest.raises(TypeError, match=r"must return \(rewards, metadata\), got Tensor"):
        trl.DDPOReward(lambda images, prompts, metadata: images.mean())(IMAGES, PROMPTS)
