"""One iteration inside a trainer that keeps everything else: its optimizer, accelerator, EMA, log.

for metrics in updates(model, recipe, prompts, reward, iteration=step):
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from branchcore import stages
from branchcore.distributed import Ranks
from branchcore.metrics import iteration_metrics
from branchcore.model import Model
from branchcore.parallel import Replicas
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward, score

UIDS_PER_PROCESS = 2**20
"""Default positions of prompts of different processes are so far apart."""


class _Limits(NamedTuple):
    tape: int | None
    max_batch: int | None
    dtype: torch.dtype


def updates(
    model: Model,
    recipe: Recipe,
    prompts: Sequence[str],
    reward: Reward,
    *,
    iteration: int,
    seed: int = 0,
    uids: Sequence[int] | None = None,
    reward_weights: Mapping[str, float] | None = None,
    tape: int | None = None,
    max_batch: int | None = None,
    dtype: torch.dtype | None = None,
) -> Generator[dict[str, float]]:
    """Grows, scores and credits an iteration's trees, then stops at every optimizer update.

    When it stops, the gradient of one update has been added to `.grad` of the trained parameters:
    the caller clips it, takes the optimizer's step and sets it to zero, and goes on.

    Under `torch.distributed` every process calls this with as many prompts of its own. Weights are
    replicated, a wrapper such as `DistributedDataParallel` is passed by, and gradients are averaged
    over all trained edges of all processes once per update. A std over several prompts
    (`global_std`) is that of this process.

    Args:
        model: the policy: what it trains is what the optimizer has.
        recipe: the method.
        prompts: (P,) of this iteration, each once: the recipe makes the group.
        reward: scores all leaves at once, `reward(images, prompts) -> {component: (L,)}`.
        iteration: of the run, from 0; noise and random choices depend on it.
        seed: of the run.
        uids: (P,) global sample positions, which name the noise; None = counted on every process.
        reward_weights: per component; None = 1 each.
        tape: trained nodes that keep their graph from the rollout; None = all. Fewer take less
            memory and another forward each.
        max_batch: rows per model call, and leaves per decode; None = all at once.
        dtype: of the states; None = float64 where the trained parameters have it, else float32.

    Yields:
        What `metrics.iteration_metrics` reports, with the ratio's statistics of this update.

    Raises:
        ValueError: arguments that do not fit, or nothing is trained.
        NotImplementedError: the recipe samples with another policy than the trained one, or
            weights are sharded; `Trainer` does both.
        FloatingPointError: the model returned NaN or Inf; no gradient was added.
        RuntimeError, TypeError: the reward failed.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    ranks = Ranks()
    if not parameters:
        raise ValueError("updates: module must have trainable parameters, got none")
    if recipe.sampler_decay is not None:
        raise NotImplementedError(
            f"updates: recipe must sample with the trained policy, got {recipe.name}; try Trainer"
        )
    if any(hasattr(p, "full_tensor") for p in parameters):
        raise NotImplementedError("updates: weights must be replicated, got shards; try Trainer")
    if uids is None:
        first = ranks.rank * UIDS_PER_PROCESS
        uids = range(first, first + len(prompts))
    if not prompts or len(uids) != len(prompts):
        raise ValueError(
            f"updates: prompts must be one or more, with as many uids, got {len(prompts)} and "
            f"{len(uids)}"
        )
    if dtype is None:
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    limits = _Limits(tape, max_batch, dtype)

    def begin() -> stages.Batch:
        grown = _grow(model, recipe, prompts, uids, seed, iteration, limits)
        scores = score(reward, grown.images, grown.prompts)
        weights = reward_weights
        return stages.finish(grown, scores, recipe, iteration=iteration, reward_weights=weights)

    def each() -> Generator[dict[str, float]]:
        batch = ranks.together(begin)
        for update in range(recipe.updates):
            yield _update(batch, recipe, update, parameters, ranks, max_batch, reward_weights)

    return each()


def _grow(
    model: Model,
    recipe: Recipe,
    prompts: Sequence[str],
    uids: Sequence[int],
    seed: int,
    iteration: int,
    limits: _Limits,
) -> stages.Grown:
    return stages.grow(
        recipe.plan(uids, seed=seed, iteration=iteration),
        model,
        recipe,
        prompts,
        uids,
        seed=seed,
        iteration=iteration,
        tape=limits.tape,
        max_batch=limits.max_batch,
        dtype=limits.dtype,
        device=next(model.module.parameters()).device,
    )


def _update(
    batch: stages.Batch,
    recipe: Recipe,
    update: int,
    parameters: Sequence[torch.Tensor],
    ranks: Ranks,
    max_batch: int | None,
    reward_weights: Mapping[str, float] | None,
) -> dict[str, float]:
    """Adds the gradient of one update, of all processes, and returns the metrics."""
    planned = ranks.sum(np.array([len(batch.forest.plan.trained(update))], dtype=np.float64))
    limits: dict[str, Any] = {"max_batch": max_batch, "num_planned": float(planned[0])}
    found = ranks.together(lambda: stages.accumulate(batch, recipe, update=update, **limits))
    if not ranks.alone:
        Replicas((), ranks).reduce(parameters, lambda: None)
    return iteration_metrics([batch], found, reward_weights, stack=ranks.stack)
