"""The stages of one iteration as functions: collect a batch, then take its gradient.

A foreign trainer calls these alone; `trainer.Trainer` is the shortest complete use of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.clock import Clock, untimed
from branchcore.credit import EdgeCredit, Floats
from branchcore.forest import Forest
from branchcore.gradient import Anchor, Statistics, gradient, log_ratio_floor
from branchcore.model import Model, VelocityModel
from branchcore.noise import host_generator
from branchcore.objective import ClippedRatio
from branchcore.packing import check_groups
from branchcore.plan import Ints, Plan
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import (
    Reward,
    Scores,
    Scoring,
    component_weights,
    score,
    score_async,
)
from branchcore.rollout import rollout


class Grown(NamedTuple):
    """Trees that are grown and decoded, not yet scored."""

    forest: Forest
    model: VelocityModel
    images: Tensor
    """(L, ...) decoded leaves."""
    prompts: list[str]
    """(L,) prompt of every leaf."""
    uids: tuple[int, ...] = ()
    """(P,) global sample positions of the plan's prompts."""


class Batch(NamedTuple):
    """Trees that are grown and scored: all that updates need."""

    forest: Forest
    model: VelocityModel
    scores: Scores
    credit: EdgeCredit
    """Advantages and value of every edge."""
    weight: Floats
    """(M,) edge weights, 0 = pruned."""
    uids: tuple[int, ...] = ()
    """(P,) global sample positions of the plan's prompts."""


def prompt_indices(num_prompts: int, batch: int, *, seed: int, iteration: int) -> Ints:
    """Returns (batch,) prompt indices of an iteration: endless shuffled epochs, no state.

    Args:
        num_prompts: in the data set.
        batch: prompts per iteration.
        seed: of the run.
        iteration: 0-based.
    """
    if num_prompts < 1 or batch < 1:
        raise ValueError(
            f"prompt_indices: num_prompts and batch must be at least 1, got {num_prompts}, {batch}"
        )
    first, last = iteration * batch, (iteration + 1) * batch
    epochs = range(first // num_prompts, (last - 1) // num_prompts + 1)
    orders = [host_generator(seed, e, 2**32 - 1).permutation(num_prompts) for e in epochs]
    start = first - epochs[0] * num_prompts
    return np.concatenate(orders)[start : start + batch]


def collect(
    plan: Plan,
    model: Model,
    recipe: Recipe,
    prompts: Sequence[str],
    uids: Sequence[int],
    reward: Reward,
    *,
    seed: int,
    iteration: int,
    reward_weights: Mapping[str, float] | None = None,
    tape: int | None = None,
    max_batch: int | None = None,
    keep_velocity: bool | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Grows and scores the trees of some prompts and turns rewards into edge advantages.

    Args:
        plan: of `recipe.plan(uids, ...)`.
        model: the policy.
        recipe: credit and pruning.
        prompts: (P,) texts.
        uids: (P,) global sample positions.
        reward: scores all leaves at once.
        seed: of the run.
        iteration: of the run.
        reward_weights: per component; None = 1 each.
        tape: trained nodes that keep their graph; None = all.
        max_batch: rows per model call, and leaves per decode; None = all at once.
        keep_velocity: as in `rollout`; never where the objective has no old policy.
        device: where the model lives.

    Raises:
        RuntimeError, ValueError, TypeError: the reward failed.
        FloatingPointError: the model returned NaN or Inf.
    """
    grown = grow(
        plan,
        model,
        recipe,
        prompts,
        uids,
        seed=seed,
        iteration=iteration,
        tape=tape,
        max_batch=max_batch,
        keep_velocity=keep_velocity,
        device=device,
    )
    scores = score(reward, grown.images, grown.prompts)
    return finish(grown, scores, recipe, iteration=iteration, reward_weights=reward_weights)


def grow(
    plan: Plan,
    model: Model,
    recipe: Recipe,
    prompts: Sequence[str],
    uids: Sequence[int],
    *,
    seed: int,
    iteration: int,
    tape: int | None = None,
    max_batch: int | None = None,
    keep_velocity: bool | None = None,
    off_tape: NDArray[np.bool_] | None = None,
    masked_backward: bool = False,
    device: torch.device | str = "cpu",
    clock: Clock = untimed,
) -> Grown:
    """Grows and decodes the trees of some prompts: the first part of `collect`, which has the rest.

    `off_tape` and `masked_backward` are those of `rollout`; the stages are rollout and decode.

    Raises:
        FloatingPointError: the model returned NaN or Inf.
    """
    check_groups(plan, recipe.objective.together, max_batch)
    view = model.with_prompts(prompts)
    with clock("rollout"):
        forest = rollout(
            plan,
            view,
            uids,
            seed=seed,
            iteration=iteration,
            tape=len(plan) if tape is None else tape,
            max_batch=max_batch,
            keep_velocity=keep_velocity if recipe.objective.anchor == "policy" else False,
            off_tape=off_tape,
            masked_backward=masked_backward,
            device=device,
        )
    with clock("decode"), torch.no_grad():
        latents = forest.leaves.view(-1, *model.latent_shape)
        images = torch.cat([model.decode(x) for x in latents.split(max_batch or len(latents))])
    texts = [str(prompts[int(i)]) for i in plan.prompt[plan.leaf]]
    return Grown(forest, view, images, texts, tuple(uids))


def finish(
    grown: Grown,
    scores: Scores,
    recipe: Recipe,
    *,
    iteration: int,
    reward_weights: Mapping[str, float] | None = None,
) -> Batch:
    """Turns scores of grown trees into edge advantages and weights: the last part of `collect`."""
    plan = grown.forest.plan
    weights = component_weights(scores.names, reward_weights)
    log_prob = grown.forest.log_prob.double().cpu().numpy()
    credit = recipe.credit(plan, scores.values, weights, log_prob)
    weight = recipe.prune(plan, credit.value, iteration)
    return Batch(grown.forest, grown.model, scores, credit, weight, grown.uids)


def score_rounds(
    rounds: Iterable[Grown],
    reward: Reward,
    finish_round: Callable[[Grown, Scores], Batch],
    *,
    overlap: bool,
    clock: Clock = untimed,
) -> Generator[Batch]:
    """Scores rounds one after the other, with the same scores whether overlapped or not.

    Args:
        rounds: grows the next round when asked for it.
        reward: scores all leaves of a round at once; never called twice at a time.
        finish_round: `finish`, with all but its first two arguments.
        overlap: score in a thread, while the next round is grown and the batch of the one before is
            used: two rounds are alive at a time. Close the iterator to wait for that thread.
        clock: times the stage reward, which with overlap is the wait for the thread.

    Raises:
        RuntimeError, ValueError, TypeError: the reward failed; no thread is left.
    """
    if not overlap:
        for grown in rounds:
            with clock("reward"):
                scores = score(reward, grown.images, grown.prompts)
            batch = finish_round(grown, scores)
            del grown  # images are not to live as long as the batch is used
            yield batch
        return
    last: tuple[Grown, Scoring] | None = None
    with ExitStack() as threads:
        for grown in rounds:
            with clock("reward"):
                scores = None if last is None else last[1].result()
            scoring = threads.enter_context(score_async(reward, grown.images, grown.prompts))
            batch = None if last is None or scores is None else finish_round(last[0], scores)
            last = grown, scoring
            del grown
            if batch is not None:
                yield batch
        if last is not None:
            with clock("reward"):
                scores = last[1].result()
            batch = finish_round(last[0], scores)
            del last
            yield batch


def accumulate(
    batch: Batch,
    recipe: Recipe,
    *,
    update: int = 0,
    anchor: Anchor = "auto",
    max_batch: int | None = None,
    max_tokens: int | None = None,
    num_planned: int | None = None,
) -> Statistics:
    """Adds the gradient of one update of a batch to the parameters; see `gradient.gradient`."""
    return gradient(
        batch.forest,
        batch.model,
        batch.credit.advantage,
        batch.weight,
        recipe.objective,
        update=update,
        anchor=anchor,
        max_batch=max_batch,
        max_tokens=max_tokens,
        num_planned=num_planned,
    )


def noise_floor(batch: Batch, recipe: Recipe, *, max_batch: int | None = None) -> float | None:
    """Measures |log ratio| of unchanged weights; a clip range below it clips at random.

    Args:
        batch: collected with the weights as they are now.
        recipe: its objective has the clip range.
        max_batch: parents of a model call; another batch shape than the rollout's gives other bits.

    Returns:
        None where no ratio of stored velocities is ever taken.
    """
    objective = recipe.objective
    if batch.forest.velocity is None or not isinstance(objective, ClippedRatio):
        return None
    return log_ratio_floor(batch.forest, batch.model, objective, max_batch=max_batch)
