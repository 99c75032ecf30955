"""The stages of one iteration as functions: collect a batch, then take its gradient.

A foreign trainer calls these alone; `trainer.Trainer` is the shortest complete use of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.clock import Clock, untimed
from branchcore.credit import EdgeCredit, Floats
from branchcore.forest import Forest
from branchcore.gradient import Anchor, Statistics, gradient, log_ratio_floor
from branchcore.leaf_weights import LeafWeight, edge_weight, without
from branchcore.model import Model, VelocityModel, decoded
from branchcore.noise import host_generator
from branchcore.objective import ClippedRatio
from branchcore.packing import check_groups
from branchcore.plan import Ints, Plan
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward, Scores, component_weights, score
from branchcore.rollout import rollout
from branchcore.stopping import Stopping


class Grown(NamedTuple):
    """Trees that are grown and decoded, not yet scored."""

    forest: Forest
    model: VelocityModel
    images: Tensor
    """(L, ...) decoded leaves, without those of stopped branches."""
    prompts: list[str]
    """(L,) prompt of every image."""
    uids: tuple[int, ...] = ()
    """(P,) global sample positions of the plan's prompts."""
    leaf_weight: LeafWeight = None
    """Where branches may be stopped."""
    components: tuple[str, ...] = ()
    """Of the reward, where previews were scored."""


class Batch(NamedTuple):
    """Trees that are grown and scored: all that updates need."""

    forest: Forest
    model: VelocityModel
    scores: Scores
    """Of all the plan's leaves, NaN where a branch was stopped or a leaf is masked."""
    credit: EdgeCredit
    """Advantages and value of every edge."""
    weight: Floats
    """(M,) edge weights, 0 = pruned."""
    uids: tuple[int, ...] = ()
    """(P,) global sample positions of the plan's prompts."""
    leaf_weight: LeafWeight = None
    """Of the statistics, where branches may be stopped or leaves are masked."""


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
    stopping: Stopping | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    clock: Clock = untimed,
) -> Grown:
    """Grows and decodes the trees of some prompts: the first part of `collect`, which has the rest.

    Arguments of the same name are those of `rollout`; `stopping` ends branches on the way;
    the stages of the clock are rollout and decode.

    Raises:
        FloatingPointError: the model returned NaN or Inf.
        RuntimeError, ValueError, TypeError: the reward of a preview failed.
    """
    check_groups(plan, recipe.objective.together, max_batch)
    view = model.with_prompts(prompts)
    previews = None
    if stopping is not None:
        previews = stopping.previews(plan, model, prompts, uids, iteration, max_batch, clock)
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
            stop=None if previews is None else previews.stop,
            dtype=dtype,
            device=device,
        )
    leaves = np.flatnonzero(plan.leaf & forest.alive)
    with clock("decode"):
        images = decoded(model, forest.states(leaves), max_batch)
    texts = [str(prompts[int(i)]) for i in plan.prompt[leaves]]
    grown = Grown(forest, view, images, texts, tuple(uids))
    if previews is None:
        return grown
    return grown._replace(
        leaf_weight=previews.leaf_weight(forest.alive), components=previews.components
    )


def finish(
    grown: Grown,
    scores: Scores,
    recipe: Recipe,
    *,
    iteration: int,
    reward_weights: Mapping[str, float] | None = None,
) -> Batch:
    """Turns scores of grown trees into edge advantages and weights: the last part of `collect`."""
    scored = scored_batch(grown, scores)
    return credited(scored, recipe, iteration=iteration, reward_weights=reward_weights)


def scored_batch(grown: Grown, scores: Scores) -> Batch:
    """Returns a batch without credit: scores of all leaves, NaN where there is none."""
    plan = grown.forest.plan
    scores = scores.among(grown.forest.alive[plan.leaf])
    leaf_weight = without(grown.leaf_weight, scores.masked)
    nothing = EdgeCredit(np.zeros((len(plan), 2)), np.zeros(len(plan)))
    weight = edge_weight(plan, leaf_weight)
    return Batch(grown.forest, grown.model, scores, nothing, weight, grown.uids, leaf_weight)


def credited(
    batch: Batch,
    recipe: Recipe,
    *,
    iteration: int,
    reward_weights: Mapping[str, float] | None = None,
) -> Batch:
    """Returns a scored batch with edge advantages and weights.

    An edge's weight is the recipe's pruner's times, where branches were stopped or leaves are
    masked, the mean weight of the leaves below it.
    """
    plan, scores = batch.forest.plan, batch.scores
    weights = component_weights(scores.names, reward_weights)
    log_prob = batch.forest.log_prob.double().cpu().numpy()
    known = {} if batch.leaf_weight is None else {"leaf_weight": batch.leaf_weight}
    credit = recipe.credit(plan, scores.values, weights, log_prob, **known)
    weight = recipe.prune(plan, credit.value, iteration) * edge_weight(plan, batch.leaf_weight)
    return batch._replace(credit=credit, weight=weight)


def accumulate(
    batch: Batch,
    recipe: Recipe,
    *,
    update: int = 0,
    anchor: Anchor = "auto",
    max_batch: int | None = None,
    max_tokens: int | None = None,
    num_planned: float | None = None,
    even: Callable[[int], int] | None = None,
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
        even=even,
    )


def noise_floor(
    batch: Batch, recipe: Recipe, *, max_batch: int | None = None, max_tokens: int | None = None
) -> float | None:
    """Measures |log ratio| of unchanged weights; a clip range below it clips at random.

    Args:
        batch: collected with the weights as they are now.
        recipe: its objective has the clip range.
        max_batch: parents of a model call; another batch shape than the rollout's gives other bits.
        max_tokens: tokens of a model call.

    Returns:
        None where no ratio of stored velocities is ever taken.
    """
    objective = recipe.objective
    if batch.forest.velocity is None or not isinstance(objective, ClippedRatio):
        return None
    limits = {"max_batch": max_batch, "max_tokens": max_tokens}
    return log_ratio_floor(batch.forest, batch.model, objective, **limits)
