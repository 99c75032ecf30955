"""What an execution plan is given, what it hands back, and the clock it reports its stages to.

Letters: P prompts, M rows of the shared Plan, L leaves, D latent elements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import Noise, Plan, Recipe, ops
from branchcore.forest import edge_noise
from branchcore.model import Model, VelocityModel

STAGES = ("rollout", "decode", "reward", "advantage", "train", "optimizer")
SEED, ITERATION = 2026, 0


class Clock:
    """Wall and process-CPU seconds per stage; waits for the device at both ends of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stage = device, ""
        self.wall, self.cpu = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.stage = stage
        wall, cpu = self._now()
        yield
        wall_end, cpu_end = self._now()
        self.wall[stage] += wall_end - wall
        self.cpu[stage] += cpu_end - cpu

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


class Outcome(NamedTuple):
    """What the checks compare."""

    plan: Plan
    states: dict[int, Tensor]
    """(D,) latents by row of the plan: all that the plan kept."""
    advantage: np.ndarray
    """(M,) advantage of every edge; nan where the plan has none."""
    ratio_dev: float
    """max |ratio - 1| of the trained edges."""
    edges: int
    """Trained edges, i.e. terms of the objective."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Some prompts of one recipe: same model, noise, reward and optimizer for every plan."""

    recipe: Recipe
    model: Model
    view: VelocityModel
    reward: Callable[[Tensor, Sequence[str]], dict[str, Tensor]]
    prompts: tuple[str, ...]
    eta: float
    optimizer: torch.optim.Optimizer | None = None
    """None = leave the gradient where it is (checks)."""
    rewards: np.ndarray | None = None
    """(L,) by leaf of the plan, in the place of what the reward says (checks in float32: a z-score
    would magnify the rounding of the latents that it is made from)."""
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_batch: int | None = None
    """Rows of a model call at most, where the plan may choose; None = no limit."""
    tape: int | None = None
    """States whose graph fits in memory at once; None = all."""

    @property
    def sigmas(self) -> list[float]:
        """(T + 1,) the schedule, of which a tree may use a part."""
        return self.recipe.options["sigmas"]

    @property
    def uids(self) -> list[int]:
        return list(range(len(self.prompts)))

    def plan(self) -> Plan:
        return self.recipe.plan(self.uids, seed=SEED, iteration=ITERATION)

    def noise(self, plan: Plan) -> Callable[[np.ndarray], Tensor]:
        """Returns the draw of some rows, (n, *latent_shape): what torch.randn is in a release."""
        names = edge_noise(plan, self.uids, SEED, ITERATION, self.device)
        size = int(np.prod(self.view.latent_shape))

        def draw(rows: np.ndarray) -> Tensor:
            rows = torch.from_numpy(rows).to(self.device)
            some = Noise(names.key, names.counter[rows], names.mix[rows])
            return ops.philox_normal(some, size, self.dtype).view(-1, *self.view.latent_shape)

        return draw

    def velocity(self, plan: Plan, rows: np.ndarray, x: Tensor) -> Tensor:
        """Calls the model at x (n, *latent_shape), the states of rows."""
        return self.velocity_at(plan.sigma[rows], plan.prompt[rows], x)

    def velocity_at(self, sigma: np.ndarray, prompt: np.ndarray, x: Tensor) -> Tensor:
        """Calls the model at x (n, *latent_shape), whatever a plan says, as the release does."""
        levels = torch.tensor(sigma, dtype=self.dtype, device=self.device)
        index = torch.tensor(prompt, dtype=torch.int64, device=self.device)
        released = getattr(self.view, "released_velocity", self.view.velocity)
        return released(x, levels, index)

    def score(self, clock: Clock, plan: Plan, rows: np.ndarray, x: Tensor) -> Tensor:
        """Decodes and scores leaves in one batch, (n,) rewards."""
        found = self.judge(clock, plan.prompt[rows], x)
        if self.rewards is None:
            return found
        return torch.from_numpy(self.rewards[np.cumsum(plan.leaf)[rows] - 1]).to(found)

    def judge(self, clock: Clock, prompt: np.ndarray, x: Tensor) -> Tensor:
        """Decodes and scores states in one batch, (n,) rewards."""
        with clock("decode"), torch.no_grad():
            images = self.model.decode(x)
        with clock("reward"), torch.no_grad():
            return self.reward(images, [self.prompts[p] for p in prompt])["reward"]

    def step(self, clock: Clock) -> None:
        """Ends an iteration: one clipped optimizer step, as every plan takes here."""
        with clock("optimizer"):
            if self.optimizer is not None:
                parameters = self.optimizer.param_groups[0]["params"]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
