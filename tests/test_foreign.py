"""A foreign trainer stays what it was at depth 1, and has the same gradient at depths 2 and 3."""

import difflib
import importlib
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from foreign.config import Config

from branchcore import ops, recipes, stages
from branchcore.forest import edge_noise, noise_rows

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "bench"))
from float64 import float64_throughout  # noqa: E402

for package in ("accelerate", "diffusers", "peft"):
    pytest.importorskip(package)

PROMPTS = ("a bold cat", "seven dogs on the red house")
GROUP, STEPS = 3, 4


def redness(images, prompts):
    assert images.shape[1:] == (3, 16, 32)
    assert len(prompts) == len(images)
    return {"reward": images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))}


class Recorder(torch.optim.AdamW):
    """Starts every trainer from the same LoRA, and keeps the gradients that it steps with."""

    seen: ClassVar = []

    def __init__(self, parameters, **options):
        parameters = list(parameters)
        rng = torch.Generator().manual_seed(1)
        for p in parameters:
            noise = torch.empty(p.shape, dtype=torch.float64).normal_(generator=rng)
            p.data.copy_(0.5 * noise / len(p) ** 0.5)
        super().__init__(parameters, **options)

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.seen.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        return super().step(closure)


@pytest.fixture
def recorded(tiny_folder, tmp_path, monkeypatch):
    """Returns a function: a trainer's name -> the gradients of its steps and what it logged."""
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)

    def run(name, dtype, **options):
        monkeypatch.setattr(Recorder, "seen", [])
        config = Config(
            **{
                "model": str(tiny_folder("sd3")), "prompts": PROMPTS, "out": str(tmp_path / name),
                "steps": STEPS, "group": GROUP, "batch": GROUP, "guidance": 3.0, "epochs": 1,
                "max_grad_norm": 1e9, "dtype": dtype, **options,
            }
        )  # fmt: skip
        log = []
        importlib.import_module(f"foreign.{name}").train(config, redness, log.append)
        assert any((tmp_path / name / "lora").iterdir())
        return Recorder.seen, log

    return run


@pytest.fixture
def exact(monkeypatch):
    """Everything in float64: modules, noise levels, timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    plain = Scheduler.set_timesteps

    def widened(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.sigmas = self.sigmas.double()
        self.timesteps = 1000 * self.sigmas[:-1]

    monkeypatch.setattr(Scheduler, "set_timesteps", widened)
    with float64_throughout():
        yield


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_depth_1_is_the_original_in_float64(recorded, exact):
    original, first = recorded("original", torch.float64, updates=2, clip=1e-6)
    converted, second = recorded("depth1", torch.float64, updates=2, clip=1e-6)
    assert len(original) == 2
    assert all(g.norm() > 0 for g in original)
    assert max(map(distance, converted, original)) <= 1e-10
    assert [row["reward"] for row in first] == pytest.approx([row["reward"] for row in second])
    unclipped = recorded("original", torch.float64, updates=2, clip=1.0)[0]
    assert distance(unclipped[1], original[1]) > 1e-6  # the clip takes part


def test_depth_1_is_the_original_in_float32(recorded):
    original = recorded("original", torch.float32)[0]
    converted = recorded("depth1", torch.float32)[0]
    assert len(original) == len(converted) == 1
    assert distance(converted[0], original[0]) <= 1e-4


@pytest.fixture
def same_noise(monkeypatch, exact):
    """Makes depth 1 draw the engine's noise of iteration 0, and choose its prompts."""
    order = stages.prompt_indices(len(PROMPTS), len(PROMPTS), seed=0, iteration=0)
    queue, shape = [], (GROUP, 4, 8, 16)

    def fill(model_sigmas):
        plan = recipes.flow_grpo(model_sigmas, group=GROUP).plan(range(2), seed=0, iteration=0)
        noise = edge_noise(plan, range(2), 0, 0, "cpu")
        for prompt in range(2):
            for lo, hi in plan.levels():
                drawn = ops.philox_normal(noise_rows(noise, lo, hi), 4 * 8 * 16, torch.float64)
                queue.append(drawn[plan.prompt[lo:hi] == prompt].view(shape))

    randn = torch.randn

    def replaced(*size, **options):
        flat = tuple(size[0]) if isinstance(size[0], (tuple, list, torch.Size)) else size
        return queue.pop(0).clone() if flat == shape else randn(*size, **options)

    monkeypatch.setattr(torch, "randn", replaced)
    for name in ("depth1", "depth2"):
        module = importlib.import_module(f"foreign.{name}")
        monkeypatch.setattr(
            module, "choose_prompts", lambda config, epoch: [PROMPTS[i] for i in order]
        )
    return fill, queue


def test_depths_2_and_3_have_the_gradient_of_depth_1(recorded, same_noise, monkeypatch):
    depth3 = importlib.import_module("foreign.depth3")
    fill, queue = same_noise
    make = depth3.make

    def in_float64(*args, **options):
        trainer = make(*args, **options)
        trainer.learner.pace.dtype = torch.float64
        return trainer

    monkeypatch.setattr(depth3, "make", in_float64)
    (second,), log_2 = recorded("depth2", torch.float64)
    (third,), log_3 = recorded("depth3", torch.float64)
    fill(_sigmas())
    (first,), log_1 = recorded("depth1", torch.float64)
    assert not queue
    assert first.norm() > 0
    assert distance(second, first) <= 1e-10
    assert distance(third, first) <= 1e-10
    rewards = [log[0]["reward"] for log in (log_1, log_2, log_3)]
    assert rewards == pytest.approx([rewards[0]] * 3, rel=1e-12)


def _sigmas():
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    scheduler = Scheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas.tolist()


def changed(name):
    """Returns the lines that a conversion adds and removes, blank ones apart."""
    before, after = ((HERE / "foreign" / f"{n}.py").read_text().splitlines() for n in
                     ("original", name))  # fmt: skip
    lines = [x for x in difflib.ndiff(before, after) if x[:1] in "+-" and x[1:].strip()]
    return [x for x in lines if x[0] == "+"], [x for x in lines if x[0] == "-"]


def test_a_conversion_changes_few_lines():
    written, removed = changed("depth1")
    assert len(written) <= 3
    assert len(removed) <= 3
    written, removed = changed("depth2")
    assert len(written) <= 10
    assert len(removed) > 50
    assert len((HERE / "foreign" / "depth3.py").read_text().splitlines()) < 40
    original = (HERE / "foreign" / "original.py").read_text()
    assert "branchcore" not in original
