"""What only a GPU can show: graphs, streams, offsets past 2**31, large grids, and the engine on it.

The conformance of each implementation on a GPU is in test_ops_conformance, whose matrix grows by
itself. Here every op runs with every implementation that it has there.
"""

import importlib
import math
import pkgutil
from collections.abc import Generator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

import branchcore
from branchcore import _dispatch, ops, recipes, schedule, testing
from branchcore.noise import Noise
from branchcore.reference.philox_normal import box_muller, philox4x32
from branchcore.testing import Inputs, OpSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
SPECS: dict[str, OpSpec] = {
    module.name: importlib.import_module(f"branchcore.ops.{module.name}").SPEC
    for module in pkgutil.iter_modules(ops.__path__)
}
ON_GPU = [
    pytest.param(name, each, id=f"{name}-{each}")
    for name in SPECS
    for each in ("cuda", "triton")
    if each in _dispatch._ops[name]
]
every_op = pytest.mark.parametrize(("name", "forced"), ON_GPU, indirect=["forced"])
both = pytest.mark.parametrize("forced", ["cuda", "triton"], indirect=True)
GIB = 2**30


@pytest.fixture
def forced(request: pytest.FixtureRequest) -> Generator[str]:
    """Forces an implementation, or skips where this machine lacks it."""
    why = _dispatch.obstacle(request.param, GPU, F32)
    if why is not None:
        pytest.skip(f"{request.param} {why}")
    with _dispatch.use(request.param):
        yield request.param


def typical(name: str) -> Inputs:
    return testing.to(SPECS[name].build(**SPECS[name].cases[0].options), GPU)


def floats(inputs: Inputs) -> list[Tensor]:
    """The inputs that a kernel reads as numbers, one after the other in memory or not."""
    return [v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]


def copied(inputs: Inputs) -> Inputs:
    """Inputs in memory of their own."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def names(num_draws: int) -> Noise:
    """Plain draws whose counters and keys use all of their bits."""
    counter = torch.arange(num_draws * 3, dtype=torch.int64).view(-1, 3) * 715_827_881 % 2**31
    counter[:, 1] = -1
    mix = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(num_draws, 1)
    key = torch.tensor([2**32 - 5, 2**31 + 7, 2**32 - 1])
    return Noise(key, counter.int(), mix)


def words(noise: Noise, blocks: Tensor) -> tuple[Tensor, ...]:
    own, _, uid = (column.long()[:, None] for column in noise.counter.unbind(1))
    seed, iteration, purpose = noise.key
    return philox4x32((blocks[None], purpose, own, uid), (seed, iteration))


@both
@pytest.mark.usefixtures("forced")
def test_integers_seen_through_the_normals() -> None:
    """Normals give back the 24 bits of each word that they are made of, to 64 in 2**24.

    A single wrong bit before the last round changes all bits of a word.
    """
    noise, num_blocks = names(5), 2**16
    z = ops.philox_normal(testing.to({"noise": noise}, GPU)["noise"], 4 * num_blocks)
    a, b = z.double().cpu().view(5, num_blocks, 2, 2).unbind(3)
    w0, w1, w2, w3 = words(noise, torch.arange(num_blocks))
    radius_word, angle_word = torch.stack((w0, w2), 2) >> 8, torch.stack((w1, w3), 2) >> 8
    squared = a.square() + b.square()
    found = (torch.exp(-squared / 2) * 2**24).round() - 1
    assert (found - radius_word).abs().max() <= 64
    turns = torch.atan2(b, a) / (2 * math.pi) * 2**24
    # an angle is seen where the radius is not tiny, and ends where it began
    off = (turns - angle_word + 2**23) % 2**24 - 2**23
    assert off[squared > 0.25].abs().max() <= 64


@every_op
@pytest.mark.usefixtures("forced")
def test_a_graph_replays_what_a_launch_does(name: str) -> None:
    """Captured once, replayed on other inputs: the bits of an eager call on those."""
    spec, inputs = SPECS[name], copied(typical(name))
    stream = torch.cuda.Stream(GPU)
    with torch.cuda.stream(stream):
        # compiles, and fills whatever is kept between calls
        testing.ones(spec, inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = testing.ones(spec, inputs)
    for value in floats(inputs):
        # rows of steps and exponents stay what they are: their signs have a meaning
        if value.dtype != torch.float64:
            value.mul_(0.5)
    for value in captured.values():
        value.fill_(float("nan"))
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, testing.ones(spec, inputs))


@every_op
@pytest.mark.usefixtures("forced")
def test_work_follows_the_current_stream(name: str) -> None:
    """Inputs arrive late on another stream: a launch anywhere else would read NaN."""
    spec, good = SPECS[name], typical(name)
    late, expected = copied(good), testing.ones(spec, good)
    for value in floats(late):
        value.fill_(float("nan"))
    stream = torch.cuda.Stream(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for value, source in zip(floats(late), floats(good), strict=True):
            value.copy_(source)
        found = testing.ones(spec, late)
    stream.synchronize()
    assert_same_bits(found, expected)


LARGE = {
    "branch_step": {"counts": (1,) * 70_000, "num_elements": 40},
    "edge_dots": {"counts": (1,) * 70_000, "num_elements": 40},
    "sde_log_prob": {"counts": (1,) * 70_000, "num_elements": 40},
    "philox_normal": {"num_draws": 70_000, "num_elements": 40, "dtype": F32},
    "ratio_loss": {"counts": (3, 0, 5) * 30_000},
    "gate_norm_modulate": {"counts": (40_000, 30_000), "num_tokens": 1, "num_elements": 24},
    "qk_norm_rope": {"sizes": (70_000, 1), "heads": (1, 1), "num_channels": 8},
    "group_norm_silu": {"num_images": 70_000, "sizes": (1, 2), "num_channels": 4, "num_groups": 2},
}
"""More rows than the second and third axis of a grid have places."""
LONG = {
    "branch_step": {"counts": (3,) * 16, "num_elements": 262_148},
    "edge_dots": {"counts": (3,) * 16, "num_elements": 262_148},
    "sde_log_prob": {"counts": (3,) * 16, "num_elements": 262_148},
    "philox_normal": {"num_draws": 48, "num_elements": 262_148, "dtype": F32},
    "ratio_loss": {"counts": (4,) * 4096},
    "gate_norm_modulate": {"counts": (3, 5), "num_tokens": 1024, "num_elements": 1536},
    "qk_norm_rope": {"sizes": (4, 1024), "heads": (24, 24), "num_channels": 64},
    "group_norm_silu": {
        "num_images": 4, "sizes": (128, 128), "num_channels": 256, "num_groups": 32
    },
}  # fmt: skip
"""Many tiles to a row, as real latents and activations have."""


def test_every_op_has_a_large_case() -> None:
    assert LARGE.keys() == LONG.keys() == SPECS.keys()


@every_op
@pytest.mark.usefixtures("forced")
def test_many_rows_match_float64(name: str) -> None:
    outcomes = testing.check(SPECS[name], testing.to(SPECS[name].build(**LARGE[name]), GPU))
    assert all(outcome.passed for outcome in outcomes), outcomes


@every_op
@pytest.mark.usefixtures("forced")
def test_long_rows_match_float64_and_themselves(name: str) -> None:
    """Many blocks at work at once, three times: a race would show in some bit."""
    spec, inputs = SPECS[name], testing.to(SPECS[name].build(**LONG[name]), GPU)
    outcomes = testing.check(spec, inputs)
    assert all(outcome.passed for outcome in outcomes), outcomes
    first = testing.evaluate(spec, spec.op, inputs)
    for _ in range(3):
        assert_same_bits(testing.evaluate(spec, spec.op, inputs), first)


@pytest.mark.parametrize("name", SPECS)
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    """Each tensor but the first in turn: the message names both devices."""
    inputs = typical(name)
    tensors = [n for n, value in inputs.items() if isinstance(value, Tensor | Noise)]
    astray = tensors if name == "philox_normal" else tensors[1:]
    assert astray
    for each in astray:
        value = inputs[each]
        moved = value._replace(mix=value.mix.cpu()) if isinstance(value, Noise) else value.cpu()
        with pytest.raises(ValueError, match=rf"{name}: .* must be on cuda:0.*, got cpu"):
            SPECS[name].op(**{**inputs, each: moved})


needs_memory = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 * GIB,
    reason="needs 40 GiB of free GPU memory",
)
# workers of pytest-xdist share the memory: one of them runs all of these
alone = pytest.mark.xdist_group("memory") if find_spec("xdist") else needs_memory
LAST = 4096


@pytest.fixture
def returned() -> Generator[None]:
    """Hands freed memory back, which other processes want."""
    yield
    torch.cuda.empty_cache()


def tail_of_draw(noise: Noise, num_elements: int) -> Tensor:
    """The last normals of the first draw, in float64."""
    first = (num_elements - LAST) // 4
    w0, w1, w2, w3 = words(noise, torch.arange(first, num_elements // 4))
    pairs = (*box_muller(w0, w1, torch.float64), *box_muller(w2, w3, torch.float64))
    return torch.stack(pairs, dim=2).flatten(1)[0]


@alone
@needs_memory
@both
@pytest.mark.usefixtures("forced", "returned")
def test_one_row_past_2_to_the_31() -> None:
    """Step and loss of a single latent of 2**31 + 8192 elements, judged at its end."""
    num_elements, noise = 2**31 + 8192, names(1)
    on_gpu = testing.to({"noise": noise}, GPU)["noise"]
    x, v = (torch.full((1, num_elements), c, dtype=BF16, device=GPU) for c in (2.0, 1.0))
    ramp = torch.arange(LAST, device=GPU).div(LAST).to(BF16)
    v[0, -LAST:] = ramp
    row = torch.tensor([[0.5, -0.25, 0.0, 0.125]], dtype=torch.float64, device=GPU)
    child_start = torch.tensor([0, 1], device=GPU)
    y, log_prob = ops.branch_step(x, v, row, child_start, on_gpu)
    del x
    eps = tail_of_draw(noise, num_elements)
    expected = 1.0 - 0.25 * ramp.double().cpu() + 0.125 * eps
    torch.testing.assert_close(y[0, -LAST:].double().cpu(), expected, atol=2e-6, rtol=0)
    # the mean of eps^2 / 2 is 1 / 2 to 5 parts in 2**15.5
    constant = -0.5 - math.log(0.125) - 0.5 * math.log(2 * math.pi)
    assert abs(log_prob.item() - constant) < 1e-4
    del y
    v.requires_grad_()
    v_old = v.detach() - 0.5
    p, q = ops.edge_dots(v, v_old, child_start, on_gpu)
    assert q.item() == pytest.approx(0.25, rel=1e-5)
    assert abs(p.item()) < 5 * 0.5 / 2**15.5
    (dv,) = torch.autograd.grad(2.0 * p.sum(), v)
    scaled = dv[0, -LAST:].double().cpu() * num_elements / 2.0
    torch.testing.assert_close(scaled, eps, atol=1e-4, rtol=2**-8)


@alone
@needs_memory
@both
@pytest.mark.usefixtures("returned")
def test_activations_past_2_to_the_31(forced: str) -> None:
    """The last tokens and rows of tensors that large have the bits of a small call on them."""
    tokens, channels, ran = 2**21 + 3, 1024, 0
    if forced in _dispatch._ops["gate_norm_modulate"]:
        x, y = (torch.randn(1, tokens, channels, device=GPU, dtype=BF16) for _ in range(2))
        tables = [torch.randn(1, channels, device=GPU, dtype=BF16) for _ in range(3)]
        row = torch.zeros(1, dtype=torch.int64, device=GPU)

        def site(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            scale, shift, gate = tables
            return ops.gate_norm_modulate(x, scale, shift, row, y_BSC=y, gate_RC=gate)

        for whole, part in zip(site(x, y), site(x[:, -5:], y[:, -5:]), strict=True):
            assert torch.equal(whole[:, -5:], part)
        ran += 1
        del x, y, whole, part
    if forced in _dispatch._ops["qk_norm_rope"]:
        q, k = (torch.randn(1, tokens, 8, 128, device=GPU, dtype=BF16) for _ in range(2))
        weight = torch.ones(128, device=GPU)
        found = ops.qk_norm_rope(q, k, weight, weight)
        few = ops.qk_norm_rope(q[:, -5:], k[:, -5:], weight, weight)
        for whole, part in zip(found, few, strict=True):
            assert torch.equal(whole[:, -5:], part)
        ran += 1
        del q, k, found, whole, part
    if forced in _dispatch._ops["group_norm_silu"]:
        small = torch.randn(1, 128, 2, 4096, device=GPU, dtype=BF16)
        small = small.to(memory_format=torch.channels_last)
        # the same two lines over and over have the moments of two
        large = small.repeat(1, 1, 2052, 1).to(memory_format=torch.channels_last)
        weight, bias = torch.ones(128, device=GPU), torch.zeros(128, device=GPU)
        whole = ops.group_norm_silu(large, weight, bias, 32, 1e-6)[:, :, -2:]
        part = ops.group_norm_silu(small, weight, bias, 32, 1e-6)
        torch.testing.assert_close(whole, part, atol=1e-2, rtol=1e-2)
        ran += 1
    if not ran:
        pytest.skip(f"no op on activations has {forced}")


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("forced")
def test_launch_on_a_device_that_is_not_current(name: str) -> None:
    spec, here = SPECS[name], typical(name)
    there = testing.to(here, torch.device("cuda", 1))
    with torch.cuda.device(0):
        found = testing.ones(spec, there)
        assert torch.cuda.current_device() == 0
    expected = testing.ones(spec, here)
    assert_same_bits({n: value.to(GPU) for n, value in found.items()}, expected)


def iteration(model, device: torch.device, dtype: torch.dtype, tape: int) -> dict[str, np.ndarray]:
    """One branching iteration of the toy: states, log-probabilities, ratios and the gradient."""
    sigmas = schedule.shifted_linear(6, 3.0)
    recipe = recipes.build("branch_grpo", sigmas, splits=(0, 2), branching=(2, 3), eta=0.3)
    plan = recipe.plan([0, 1], seed=1, iteration=0)
    model.module.to(device)
    view = model.with_prompts(["a", "b"])
    where = {"device": device, "dtype": dtype}
    forest = branchcore.rollout(plan, view, [0, 1], seed=1, iteration=0, tape=tape, **where)
    scores = np.random.default_rng(0).random((int(plan.leaf.sum()), 1))
    log_prob = forest.log_prob.double().cpu().numpy()
    credit = recipe.credit(plan, scores, np.ones(1), log_prob)
    weight = recipe.prune(plan, credit.value, 0)
    stats = branchcore.gradient(forest, view, credit.advantage, weight, recipe.objective)
    return {
        "leaves": forest.leaves.double().cpu().numpy(),
        "log_prob": log_prob,
        "ratio_dev": np.array(float(stats.ratio.max_abs_dev)),
        "gradient": model.gradient().double().cpu().numpy(),
    }


@pytest.mark.parametrize("tape", [0, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (F32, 1e-4)])
def test_an_iteration_is_that_of_the_cpu(toy, dtype, tolerance, tape) -> None:
    """With the kernels of each machine in fp32, whose normals agree to 4e-6; in fp64 the same."""
    on_cpu, on_gpu = (iteration(toy(dtype), device, dtype, tape) for device in (CPU, GPU))
    assert on_cpu["ratio_dev"] == on_gpu["ratio_dev"] == 0.0
    for name in ("leaves", "log_prob", "gradient"):
        scale = np.abs(on_cpu[name]).max()
        np.testing.assert_allclose(on_gpu[name], on_cpu[name], rtol=0, atol=tolerance * scale)
