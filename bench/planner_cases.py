"""Random runs that the planner has to foresee: digits and tiny pipelines of three families."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from branchcore import recipes, schedule
from branchcore.model import Model
from branchcore.models import weights
from branchcore.models.digits.model import load_digits_model
from branchcore.models.digits.prompts import PROMPTS
from branchcore.models.digits.rewards import DigitsReward
from branchcore.models.sizing.live_bytes import LiveBytes
from branchcore.planner.forecast import Forecast, forecast
from branchcore.planner.near import Impossible
from branchcore.planner.request import Request
from branchcore.planner.solve import Planned, Planner
from branchcore.rewards import Reward
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

MODELS = ("digits", "sd3", "flux", "wan")
TEXTS = ["a cat", "a dog", "red house", "blue dog", "a bold cat", "seven dogs on the red house"]
RECIPES = (
    *("branch_mix", "branch_grpo", "flow_grpo", "dance_grpo", "mix_grpo", "tempflow_grpo"),
    *("flow_grpo_fast_v1", "flow_grpo_fast_v2", "grpo_guard", "tree_grpo", "multi_grpo", "awm"),
)
SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "sd3": ({}, {"height": 32, "width": 32}, {"height": 64, "width": 64}),
    "flux": ({}, {"height": 32, "width": 32}, {"height": 64, "width": 64}),
    "wan": ({}, {"height": 48, "width": 48}, {"num_frames": 9}),
}
PAIRS, STEPS_MEASURED = 5, 3


class Case(NamedTuple):
    """One random run."""

    model: str
    options: dict[str, Any]
    """How the pipeline is loaded."""
    full: bool
    recipe: str
    recipe_options: dict[str, Any]
    steps: int
    fields: dict[str, Any]
    """Of `TrainerConfig`."""

    def words(self) -> str:
        """Returns it on one line."""
        given = " ".join(f"{k}={v}" for k, v in (self.options | self.fields).items())
        kind = "all weights" if self.full else "LoRA"
        return f"{self.model}, {kind}, {self.recipe}, T={self.steps}, {self.recipe_options} {given}"


def draw(rng: np.random.Generator, index: int) -> Case:
    """Draws a case; models take turns."""
    name = MODELS[index % len(MODELS)]
    recipe, steps = str(rng.choice(RECIPES)), int(rng.integers(5, 9))
    known = recipes.options_of(recipe)
    leaves = int(rng.choice([4, 6, 8, 12]))
    options = recipes.leaf_options(tuple(known), leaves, steps)
    if "kl" in known and "times" not in known:
        options["kl"] = float(rng.choice([0.0, 0.05]))
    prompts = int(rng.integers(2, 7))
    fields: dict[str, Any] = {"prompts_per_iteration": prompts}
    fields["prompts_per_round"] = int(rng.integers(1, prompts + 1))
    fields["max_batch"] = int(rng.choice([4, 6, 8, 16, 24, 32]))
    fields["tape"] = [None, 0, int(rng.integers(1, 20))][int(rng.integers(3))]
    if rng.random() < 0.5:
        fields["ema_decay"] = 0.9
    loaded: dict[str, Any] = {}
    full = name == "digits" or bool(rng.random() < 0.3 and not options.get("kl"))
    if name != "digits":
        loaded = dict(SIZES[name][int(rng.integers(3))])
        if name != "flux":
            loaded["guidance"] = float(rng.choice([1.0, 3.0]))
    return Case(name, loaded, full, recipe, options, steps, fields)


def mean_pixel(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Rewards the mean."""
    del prompts
    return {"mean": images.flatten(1).mean(1)}


class Zoo:
    """Loads models; tiny pipelines are written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pipeline(self, name: str) -> Path:
        """Returns the folder of a tiny pipeline, written where it is missing."""
        folder = self.folder / name
        if not folder.exists():
            importlib.import_module(f"tiny_pipelines.{name}").build(folder)
        return folder

    def load(self, case: Case) -> tuple[Model, list[str], Reward]:
        """Returns model, prompts and reward of a case."""
        if case.model == "digits":
            return load_digits_model(), list(PROMPTS), DigitsReward()
        tiny_pipelines: Any = importlib.import_module("tiny_pipelines")
        folder = self.pipeline(case.model)
        model = tiny_pipelines.Tiny(case.model, folder).load(**case.options)
        model.encode(TEXTS, release=True)
        if case.full:
            weights.train_all(model)
        else:
            weights.add_lora(model, rank=4)
        return model, TEXTS, mean_pixel


def trainer_of(zoo: Zoo, case: Case, out: str) -> Trainer:
    """Returns the trainer of a case."""
    model, prompts, reward = zoo.load(case)
    sigmas = schedule.shifted_linear(case.steps)
    recipe = recipes.build(case.recipe, sigmas, **case.recipe_options)
    config = TrainerConfig(iterations=99, **case.fields)
    return Trainer(model, prompts, reward, recipe, config, out)


def live_peak(zoo: Zoo, case: Case) -> int:
    """Returns the most bytes of tensors at any time of the second iteration."""
    with tempfile.TemporaryDirectory() as out, LiveBytes() as live:
        trainer = trainer_of(zoo, case, out)
        parts = [getattr(trainer.model, n, None) for n in ("module", "vae", "frozen", "base")]
        for module in parts:
            if isinstance(module, nn.Module):
                live.watch([*module.parameters(), *module.buffers()])
        trainer.step()
        live.restart()
        trainer.step()
        return live.peak


def compare(zoo: Zoo, case: Case) -> dict[str, Any]:
    """Forecasts a case and runs it, by turns: machines are not always equally fast."""
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(zoo, case, out)
        trainer.step()
        pairs = [_pair(trainer) for _ in range(PAIRS)]
    peak = live_peak(zoo, case)
    found = pairs[0].forecast
    steps = [seconds for pair in pairs for seconds in pair.steps]
    ratios = [pair.forecast.total / median(pair.steps) for pair in pairs]
    return {
        "case": case.words(),
        "model": case.model,
        "memory_mb": found.peak / 1e6,
        "memory_mb_measured": peak / 1e6,
        "memory_ratio": found.peak / peak,
        "cpu_s": median(pair.forecast.total for pair in pairs),
        "cpu_s_measured": median(steps),
        "cpu_s_spread": (max(steps) - min(steps)) / median(steps),
        "time_ratio": median(ratios),
        "time_ratios": ratios,
        "stages": dict(found.seconds),
        "forecast_cpu_s": median(pair.took for pair in pairs),
    }


class _Pair(NamedTuple):
    """A forecast and what was measured right after it, CPU seconds."""

    forecast: Forecast
    took: float
    steps: list[float]


def _pair(trainer: Trainer) -> _Pair:
    start = time.process_time()
    found = forecast(
        trainer.model,
        trainer.prompts,
        trainer.recipe,
        trainer.config,
        reward=trainer.learner.reward,
        clock=time.process_time,
    )
    took = time.process_time() - start
    steps: list[float] = []
    for _ in range(STEPS_MEASURED):
        start = time.process_time()
        trainer.step()
        steps.append(time.process_time() - start)
    return _Pair(found, took, steps)


def valid(case: Case) -> bool:
    """Tells whether a drawn case can be built at all."""
    try:
        recipes.build(case.recipe, schedule.shifted_linear(case.steps), **case.recipe_options).plan(
            [0], seed=0, iteration=0
        )
        dataclasses.replace(TrainerConfig(iterations=9, **case.fields))
    except (ValueError, TypeError):
        return False
    return True


def random_cases(count: int, seed: int) -> list[Case]:
    """Draws cases; what cannot be built is drawn again."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        case = draw(rng, len(cases))
        if valid(case):
            cases.append(case)
    return cases


SMALL = {"prompts_per_iteration": 2}
SD3 = {
    "height": 16, "width": 32, "max_text_tokens": 24, "dtype": "fp32", "guidance": 1.0, "steps": 3,
}  # fmt: skip
WAN = {"height": 32, "width": 48, "frames": 5, "max_text_tokens": 24, "dtype": "fp32", "steps": 3}
FLUX = {"height": 16, "width": 32, "max_text_tokens": 24, "dtype": "fp32", "steps": 3}
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "memory": ({"memory": 200_000, "model": "sd3", "flags": SD3, "leaves": 4}, "--memory"),
    "tape in memory": (
        {"leaves": 4, "memory": 13_900_000, "recipe": "dance_grpo",
         "fields": {**SMALL, "tape": 100}},
        "--set tape=",
    ),
    "height": ({"model": "sd3", "flags": {**SD3, "height": 20}, "leaves": 4}, "--height 16"),
    "frames": ({"model": "wan", "flags": {**WAN, "frames": 6}, "leaves": 4}, "--frames 5"),
    "group": ({"leaves": 1}, "--leaves 2"),
    "shards": ({"gpus": 8, "parallel": {"kind": "shard", "shards": 3}}, "--shards 4"),
    "offload": ({"parallel": {"kind": "replicate", "offload": True}}, "--parallel shard"),
    "guidance": ({"model": "flux", "flags": FLUX | {"guidance": 3.0}, "leaves": 4}, "--guidance 1"),
    "overlap": (
        {"fields": {"prompts_per_iteration": 1, "overlap_rewards": True}},
        "no --set overlap_rewards",
    ),
    "together": (
        {"recipe": "dgpo", "leaves": 4, "fields": {**SMALL, "max_batch": 3}}, "max_batch=4",
    ),
    "steps": ({"recipe": "branch_grpo", "flags": {"steps": 1}}, "--steps"),
    "reference": (
        {"model": "sd3", "flags": {**SD3, "full": True}, "leaves": 4},
        "--reference",
    ),
}  # fmt: skip
"""What cannot run, and what the nearest that can is called."""


def asked(**given: Any) -> Request:
    """Returns a request of a small run."""
    settings: dict[str, Any] = {"fields": SMALL, "recipe": "flow_grpo", **given}
    return Request(**settings)


def runs(planned: Planned, out: str | Path) -> bool:
    """Tells whether an iteration of what was planned comes to its end."""
    subject = planned.subject
    reward = subject.reward or mean_pixel
    options = (subject.model, subject.prompts, reward, planned.recipe, planned.local, out)
    return Trainer(*options).step()["iteration"] == 1


def refused(zoo: Zoo, name: str) -> dict[str, Any]:
    """Asks for something impossible, then runs the nearest that is not."""
    given, said = IMPOSSIBLE[name]
    if "model" in given:
        flags = {**given["flags"], "path": str(zoo.pipeline(given["model"]))}
        given = {**given, "flags": flags}
    planner = Planner(clock=time.process_time, seconds=1.0)
    try:
        planner.plan(asked(**given))
    except Impossible as error:
        if error.nearest is None or said not in str(error):
            raise
        with tempfile.TemporaryDirectory() as out:
            done = runs(planner.plan(error.nearest), out)
        return {"asked": name, "refusal": str(error), "nearest_ran": done}
    return {"asked": name, "refusal": None, "nearest_ran": False}


def one_thread() -> None:
    """Makes CPU seconds those of one thread."""
    torch.set_num_threads(1)
