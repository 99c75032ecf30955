"""Proof before timing: released loops and engine compute the same gradient, with the stated work.

In float64 every way of the engine to compute a gradient is compared with the released loop's; the
model is wrapped and its rows, backward rows and decodes are counted. A linear reward keeps the way
from latents to advantages in float64; in float32 every leaf has a fixed reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from float64 import float64_throughout
from plans import BASES, PLANS, RECIPES, REFERENCE, Run
from plans.exact import exact
from plans.task import Clock, Outcome
from torch import Tensor
from work import Work, closed_form
from workload import Workload, linear_reward

PROMPTS = {torch.float64: 2, torch.float32: 1}
WAYS: dict[str, Run] = {
    "tape": exact,
    "sibling-shared": partial(exact, tape=False),
    "packed": partial(exact, tape=False, max_batch=7),
    "stored v_old": partial(exact, tape=False, anchor="rollout"),
}
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
ADVANTAGE_LIMIT = 1e-9


class Check(NamedTuple):
    """A number of a plan and the limit it must keep; limit None = reported only."""

    kind: str
    plan: str
    value: Any
    limit: Any

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.plan}"

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        equal = isinstance(self.limit, list)
        return self.value == self.limit if equal else self.value <= self.limit


class Counting:
    """A model that counts what is asked of it, per stage of the clock."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self.inner, self.clock = model, clock
        self.view, self.latent_shape = model, model.latent_shape
        self.rows: Counter[str] = Counter()
        self.backward_rows, self.decodes, self.states = 0, 0, set()

    def with_prompts(self, prompts: Sequence[str]) -> Counting:
        self.view = self.inner.with_prompts(prompts)
        return self

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return self._counted(self.view.velocity, x, sigma, prompt)

    def released_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        released = getattr(self.view, "released_velocity", self.view.velocity)
        return self._counted(released, x, sigma, prompt)

    def _counted(self, call: Any, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        v = call(x, sigma, prompt)
        self.rows[self.clock.stage] += len(x)
        if v.requires_grad:
            rows = zip(x.detach().cpu().numpy(), sigma.tolist(), prompt.tolist(), strict=True)
            names = [(row.tobytes(), *key) for row, *key in rows]
            v.register_hook(partial(self._trained, names))
        return v

    def _trained(self, names: list[Any], _grad: Tensor) -> None:
        self.backward_rows += len(names)
        self.states.update(names)

    def decode(self, latents: Tensor) -> Tensor:
        self.decodes += len(latents)
        return self.inner.decode(latents)


class Ran(NamedTuple):
    """One run of a plan under the wrapped model."""

    outcome: Outcome
    gradient: Tensor
    work: Work


def run_counted(name: str, run: Run, load: Workload, model: Any, dtype: torch.dtype) -> Ran:
    clock = Clock(load.device)
    counting = Counting(model, clock)
    model.module.zero_grad(set_to_none=True)
    task = load.task(PLANS[name].recipe, counting, linear_reward, PROMPTS[dtype], dtype=dtype)
    if dtype == torch.float32:
        leaves = int(task.plan().leaf.sum())
        task = replace(task, rewards=np.random.default_rng(1).random(leaves))
    outcome = run(task, clock)
    grads = [p.grad.flatten() for p in model.module.parameters() if p.grad is not None]
    # edges, not forwards: siblings that share a forward are each a term of the objective
    forwards, trained = counting.rows["rollout"], len(counting.states)
    work = Work(forwards, outcome.edges, trained, counting.decodes)
    return Ran(outcome, torch.cat(grads).cpu(), work)


def gradient_gap(a: Ran, b: Ran) -> float:
    return float((a.gradient - b.gradient).norm() / b.gradient.norm())


def latent_gap(a: Ran, b: Ran) -> float:
    """Returns the largest relative difference of any latent that both keep."""
    states = b.outcome.states
    return max(
        float((x.flatten() - states[n].flatten()).abs().max() / states[n].abs().max())
        for n, x in a.outcome.states.items()
    )


def advantage_gap(a: Ran, b: Ran) -> float:
    gap = np.abs(a.outcome.advantage - b.outcome.advantage)
    return float(gap[a.outcome.plan.train].max())


def run_checks(load: Workload, names: Sequence[str]) -> list[Check]:
    """Checks the chosen plans, each against the released loop on its own trees."""
    checks: list[Check] = []
    for dtype in LIMITS:
        model = load.model(PROMPTS[dtype], dtype)
        for recipe in RECIPES:
            if any(PLANS[name].recipe == recipe for name in names):
                with float64_throughout() if dtype == torch.float64 else nullcontext():
                    checks += _recipe_checks(recipe, load, names, model, dtype)
    return sorted(checks, key=lambda check: check.kind[0])


def _recipe_checks(
    recipe: str, load: Workload, names: Sequence[str], model: Any, dtype: torch.dtype
) -> list[Check]:
    double, limit = dtype == torch.float64, LIMITS[dtype]
    letter, short = ("a", "fp64") if double else ("b", "fp32")
    released = run_counted(recipe, REFERENCE[recipe], load, model, dtype)
    checks: list[Check] = []
    for name in (n for n in names if PLANS[n].recipe == recipe):
        if name in BASES:
            # as released: BranchGRPO with its dead last edges, which no reward sees
            same = BASES[name] is REFERENCE[name] or not double
            full = released if same else run_counted(name, BASES[name], load, model, dtype)
            checks.append(Check(f"e max |ratio - 1| {short}", name, full.outcome.ratio_dev, None))
            checks += [_work(name, load, full)] * double
            continue
        taped = PLANS[name].trains == "tape"
        ways = WAYS if taped else {"batched": PLANS[name].run}
        for way, run in ways.items():
            if not double and way not in ("tape", "batched"):
                continue
            ran = run_counted(name, run, load, model, dtype)
            plan = f"{name}, {way}"
            exactly_one = 0.0 if taped and way != "stored v_old" else None
            checks += [
                Check(f"{letter} gradient {short}", plan, gradient_gap(ran, released), limit),
                Check(f"{letter} latents {short}", plan, latent_gap(ran, released), limit),
                Check(f"e max |ratio - 1| {short}", plan, ran.outcome.ratio_dev, exactly_one),
            ]
            if double:
                gap = advantage_gap(ran, released)
                checks.append(Check("d advantages fp64", plan, gap, ADVANTAGE_LIMIT))
                checks += [_work(name, load, ran)] * (way in ("tape", "batched"))
    return checks


def _work(name: str, load: Workload, ran: Ran) -> Check:
    prompts = PROMPTS[torch.float64]
    expected = closed_form(name, load, ran.outcome.plan, prompts)
    return Check(f"f F / E / P / D, {prompts} prompts", name, list(ran.work), list(expected))
