"""Every family against its own diffusers pipeline, its rows one at a time, and naive gradients."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from torch.overrides import TorchFunctionMode

from branchcore import passes, recipes, schedule
from branchcore.gradient import gradient
from branchcore.models.runtime.checkpointing import checkpoint_blocks
from branchcore.rollout import rollout
from branchcore.steps import euler
from branchcore.tree import Tree

pytest.importorskip("diffusers")
PROMPTS = ["a bold cat", "seven dogs on the red house, thin", "blue"]
ROW_PROMPT = torch.tensor([0, 0, 1, 2, 1, 0])
ROW_SIGMA = torch.tensor([0.3, 0.3, 0.9, 0.9, 0.3, 0.3], dtype=torch.float64)
DISTINCT = {"prompt": 3, "sigma": 2, "node": 4}
RECIPE = recipes.branch_grpo(schedule.shifted_linear(3, 3), splits=(0, 1))
UIDS = [4, 9]
ALL = 10**6
F64 = {"dtype": torch.float64}


class Rows(TorchFunctionMode):
    """Counts the rows that every linear layer is evaluated on, by its weight."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.rows.setdefault(id(weight), []).append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=tiny_pipelines.names())
def tiny(request, tiny_folder):
    return tiny_pipelines.Tiny(request.param, tiny_folder(request.param))


@pytest.fixture(scope="module")
def shared(tiny):
    """One fp32 model for all tests that leave it as it is."""
    return tiny.load()


@pytest.fixture(scope="module")
def exact_model(tiny):
    model = tiny.load(guidance=tiny.guidances[-1])
    model.encode(PROMPTS, release=True)
    model.to(torch.float64)
    return model


def keep_double(method):
    """Makes a cast to fp32 leave fp64 tensors alone."""

    def cast(x, *args, **kwargs):
        if x.dtype != torch.float64 or torch.float32 not in (*args, *kwargs.values()):
            return method(x, *args, **kwargs)
        return x

    return cast


@pytest.fixture
def exact(exact_model, monkeypatch):
    """An fp64 model, every parameter trainable.

    diffusers computes rotary embeddings and RMS norms in fp32 whatever the weights are, and their
    backward rounds every edge's gradient on its own or all of a parent's together: 1e-10 (SD3) to
    6e-8 (Wan) of the gradient. These tests keep fp64 throughout, which leaves 5e-16.
    """
    to, single = torch.Tensor.to, torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "to", keep_double(to))
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x)
    )
    exact_model.module.requires_grad_(True)
    exact_model.module.zero_grad(set_to_none=True)
    exact_model.guidance = 1.0
    return exact_model


@pytest.fixture
def model(shared):
    shared.guidance = 1.0
    return shared


def states(model, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *model.latent_shape, generator=generator, dtype=dtype)


def gradients(model):
    return {
        name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None
    }


def relative(a, b):
    assert a.keys() == b.keys()
    assert a
    difference = sum(float((a[name] - b[name]).square().sum()) for name in b)
    return (difference / sum(float(g.square().sum()) for g in b.values())) ** 0.5


def test_velocity_is_the_pipelines_own_prediction(tiny, model):
    steps = 3
    for guidance in tiny.guidances:
        x, v, _ = tiny.sample(model, PROMPTS[:2], states(model, 2), guidance, steps)
        model.guidance = guidance
        view = model.with_prompts(PROMPTS[:2])
        sigma = torch.from_numpy(model.sigmas(steps)[:-1]).float().repeat_interleave(2)
        prompt = torch.arange(2).repeat(steps)
        with torch.no_grad():
            got = view.velocity(x.flatten(0, 1), sigma, prompt)
        assert float(v.std()) > 0.05
        assert float((got - v.flatten(0, 1)).abs().max()) <= 1e-5, guidance


def test_bf16_velocity_has_the_pipelines_bits(tiny):
    """Timesteps are rounded as there, too: sigma has other bits in bf16 than 1000 sigma."""
    model = tiny.load(dtype=torch.bfloat16)
    model.unshare()
    x, v, _ = tiny.sample(model, PROMPTS[:2], states(model, 2), 1.0, 3, model.pipe)
    view = model.with_prompts(PROMPTS[:2])
    for step, level in enumerate(model.sigmas(3)[:-1].tolist()):
        with torch.no_grad():
            got = view.velocity(x[step].float(), torch.full((2,), level), torch.arange(2))
        assert torch.equal(got.to(v.dtype), v[step]), level


def test_ode_rollout_reproduces_the_pipelines_sample(tiny, model):
    guidance, steps = tiny.guidances[-1], 3
    _, _, images = tiny.sample(model, PROMPTS[:2], states(model, 2), guidance, steps)
    model.guidance = guidance
    chain = Tree()
    sigmas = model.sigmas(steps)
    chain.leaf(chain.chain(chain.given(1, float(sigmas[0])), sigmas[1:], euler))
    plan = passes.concat([chain.plan()] * 2)
    x = states(model, 2)
    forest = rollout(
        plan, model.with_prompts(PROMPTS[:2]), UIDS, seed=0, given=x.flatten(1)[:, None]
    )
    got = model.decode(forest.leaves.view_as(x))
    assert got.shape == images.shape
    assert float(images.std()) > 0.01
    assert float((got - images).abs().max()) <= 1e-4


def call_rows(model, view, x, rows=slice(None)):
    with torch.no_grad():
        return view.velocity(x[rows], ROW_SIGMA[rows].to(x), ROW_PROMPT[rows])


def test_mixed_prompts_and_sigmas_equal_one_row_at_a_time(tiny, model):
    x = states(model, 6)
    for guidance in tiny.guidances:
        model.guidance = guidance
        whole = call_rows(model, model.with_prompts(PROMPTS), x)
        for i in range(6):
            alone = model.with_prompts([PROMPTS[ROW_PROMPT[i]]])
            with torch.no_grad():
                row = alone.velocity(x[i : i + 1], ROW_SIGMA[i : i + 1].to(x), torch.tensor([0]))
            assert float((whole[i] - row[0]).abs().max()) <= 1e-5, (guidance, i)


def linear_rows(model):
    """Returns the rows of every linear layer in one call of six rows, by its name."""
    view, names = model.with_prompts(PROMPTS), {}
    for name, layer in model.module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            names[id(layer.weight)] = name
    with Rows() as seen:
        call_rows(model, view, states(model, 6, model.dtype))
    return {names[weight]: rows for weight, rows in seen.rows.items()}


def test_only_distinct_rows_are_evaluated(model):
    rows, found = linear_rows(model), []
    for shared, kind in model.sharing.modules.items():
        inside = [name for name in rows if f"{name}.".startswith(f"{shared}.")]
        assert all(rows[name] == [DISTINCT[kind]] for name in inside), shared
        found += inside
    assert found
    assert any(rows[name] == [6] for name in rows.keys() - set(found))
    model.unshare()
    plain = linear_rows(model)
    model.share()
    assert all(plain[name] == [6] for name in found)


def check_sharing(tiny, model, tolerance):
    x = states(model, 6, model.dtype)
    for guidance in tiny.guidances:
        model.guidance = guidance
        view = model.with_prompts(PROMPTS)
        shared = call_rows(model, view, x)
        model.unshare()
        plain = call_rows(model, view, x)
        model.share()
        assert float((shared - plain).abs().max()) <= tolerance, guidance


def test_shared_evaluation_equals_the_plain_modules(tiny, model):
    check_sharing(tiny, model, 1e-5)


def test_shared_evaluation_equals_the_plain_modules_in_fp64(tiny, exact):
    check_sharing(tiny, exact, 1e-12)


def tree_gradient(model, view, tape, max_batch=None):
    """One GRPO iteration's gradient by the engine; also returns what the naive way needs."""
    model.module.zero_grad(set_to_none=True)
    plan = RECIPE.plan(UIDS, seed=5, iteration=3)
    rewards = np.random.default_rng(1).normal(size=(int(plan.leaf.sum()), 1))
    advantage = RECIPE.credit(plan, rewards, np.ones(1), np.zeros(len(plan))).advantage
    weight = np.ones(len(plan))
    forest = rollout(plan, view, UIDS, seed=5, iteration=3, tape=tape, max_batch=max_batch, **F64)
    stats = gradient(forest, view, advantage, weight, RECIPE.objective, max_batch=max_batch)
    assert float(stats.ratio.max_abs_dev) == 0.0
    return forest, advantage, weight, gradients(model)


def test_tree_gradient_equals_the_naive_one(tiny, exact, naive, all_states):
    model = exact
    model.guidance = tiny.guidances[-1]
    view = model.with_prompts(PROMPTS[:2])
    forest, advantage, weight, detached = tree_gradient(model, view, tape=0)
    taped = tree_gradient(model, view, tape=ALL)[-1]
    mixed = tree_gradient(model, view, tape=3, max_batch=4)[-1]
    model.unshare()
    model.module.zero_grad(set_to_none=True)
    x, v = all_states(forest.plan, view, forest.noise)
    naive(forest, view, advantage, weight, RECIPE.objective.clip, x, v)
    model.share()
    expected = gradients(model)
    for way in (detached, taped, mixed):
        assert relative(way, expected) <= 1e-10
    assert relative({n: -g for n, g in taped.items()}, expected) == pytest.approx(2.0)


def test_block_checkpointing_gives_the_same_gradient(exact, monkeypatch):
    view, blocks = exact.with_prompts(PROMPTS[:2]), []
    expected = tree_gradient(exact, view, tape=ALL, max_batch=3)[-1]
    checkpointed = exact.sharing.checkpointed
    monkeypatch.setattr(
        exact.sharing, "checkpointed", lambda *args: blocks.append(args[0]) or checkpointed(*args)
    )
    change = checkpoint_blocks(exact)
    got = tree_gradient(exact, view, tape=ALL, max_batch=3)[-1]
    change.undo()
    assert len(blocks) > len(set(blocks)) >= 1
    assert relative(got, expected) <= 1e-12


def test_the_unconditional_half_carries_a_gradient_only_where_asked(tiny, exact):
    if len(tiny.guidances) == 1:
        pytest.skip("a distilled model has no unconditional half")
    model, scale = exact, tiny.guidances[-1]
    model.guidance = scale
    view, x = model.with_prompts(PROMPTS), states(model, 6, torch.float64)
    found = {}
    for train_uncond in (False, True):
        model.train_uncond = train_uncond
        model.module.zero_grad(set_to_none=True)
        (x * view.velocity(x, ROW_SIGMA, ROW_PROMPT)).sum().backward()
        got = gradients(model)
        model.guidance, pack = 1.0, model.family.pack
        model.module.zero_grad(set_to_none=True)
        cond = view.velocity(x, ROW_SIGMA, ROW_PROMPT)
        uncond = view.velocity(x, ROW_SIGMA, torch.full_like(ROW_PROMPT, len(PROMPTS)))
        uncond = uncond if train_uncond else uncond.detach()
        v = model.family.guide(pack(cond), pack(uncond), scale)
        (pack(x) * v).sum().backward()
        model.guidance = scale
        assert relative(got, gradients(model)) <= 1e-10
        found[train_uncond] = got
    model.train_uncond = False
    assert relative(found[True], found[False]) > 0.01
