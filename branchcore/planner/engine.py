"""Times what the engine itself does in an iteration: all that is no call of the model or reward.

The same trees, states, credit and updates run with a model of one weight.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from branchcore.distributed import Ranks
from branchcore.learner import Learner
from branchcore.parallel import ParallelConfig
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig

_STAGE = {"rollout": "rollout", "decode": "decode", "reward": "reward", "update": "update"}


class _OneWeight:
    """A model whose velocity is its state times a weight."""

    module: nn.Module

    def __init__(self, latent_shape: tuple[int, ...], device: torch.device) -> None:
        self.latent_shape = latent_shape
        self.weight = nn.Parameter(torch.ones((), device=device))
        self.module = nn.ParameterList([self.weight])

    def with_prompts(self, prompts: Sequence[str]) -> _OneWeight:
        del prompts
        return self

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        del sigma, prompt
        return x * self.weight

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        del sigma, prompt
        return x.clone()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.flatten(1)[:, :64].mean(1)


def _score(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    del prompts
    return {"score": images}


class Overhead(NamedTuple):
    """What an iteration takes beside calls of model and reward."""

    seconds: Mapping[str, float]
    """By stage of `speed.STAGES`."""
    backwards: int
    """Rows with a gradient in all passes, after the recipe's own pruning, before the run's."""

    @property
    def total(self) -> float:
        """All stages."""
        return sum(self.seconds.values())


def overhead(
    latent_shape: tuple[int, ...],
    recipe: Recipe,
    config: TrainerConfig,
    *,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = 3.0,
) -> Overhead:
    """Runs iterations of these settings, or of fewer prompts where they take too long.

    Args:
        latent_shape: of the model that is planned for.
        recipe: of the run.
        config: of the run; whole rounds are run.
        device: where.
        clock: seconds.
        seconds: an iteration of one prompt may take of an iteration of all before prompts are left
            out; time is then taken to grow with their number.
    """
    total, each = config.prompts_per_iteration, config.prompts_per_round
    first = _run(latent_shape, recipe, config, 1, device, clock)
    if total == 1:
        return first
    most = max(1, min(total, int(seconds / max(first.total, 1e-9))))
    if each is not None and most < total:
        most = max(each, most // each * each)
    found = first if most == 1 else _run(latent_shape, recipe, config, most, device, clock)
    if most == total:
        return found
    grows = {k: v * total / most for k, v in found.seconds.items()}
    return Overhead(grows, round(found.backwards * total / most))


def _run(
    latent_shape: tuple[int, ...],
    recipe: Recipe,
    config: TrainerConfig,
    prompts: int,
    device: torch.device,
    clock: Callable[[], float],
) -> Overhead:
    """Times the faster of two iterations after the first."""
    alone = prompts if config.prompts_per_round is None else min(prompts, config.prompts_per_round)
    config = dataclasses.replace(
        config,
        prompts_per_iteration=prompts,
        prompts_per_round=alone,
        max_tokens=None,
        reward_weights=None,
        overlap_rewards=False,
        ema_decay=None,
        prune=PruningConfig(),
    )
    learner = Learner(
        _OneWeight(latent_shape, device),
        [str(i) for i in range(prompts)],
        _score,
        recipe,
        config,
        Ranks(),
        ParallelConfig(),
    )
    runs: list[Overhead] = []
    for iteration in range(3):
        learner.watch.clock.lap()
        start = clock()
        learner.step(iteration)
        took, backwards = clock() - start, learner.watch.work.backwards
        laps = learner.watch.clock.lap()
        whole = sum(laps.values())
        parts: dict[str, float] = {}
        for stage, part in laps.items():
            name = _STAGE.get(stage, "rest")
            parts[name] = parts.get(name, 0.0) + took * part / whole
        runs.append(Overhead(parts, backwards))
    return min(runs[1:], key=lambda run: run.total)
