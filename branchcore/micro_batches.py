"""What an update's micro-batches need on the device, and the velocities they compare with.

Letters: M rows of the plan, N parents and E edges of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore.credit import Floats
from branchcore.forest import Forest, upload
from branchcore.model import VelocityModel, call_velocity
from branchcore.noise import Noise
from branchcore.objective import Edges, Objective
from branchcore.packing import MicroBatch, TokenBudget, runs
from branchcore.plan import Ints


class Terms(NamedTuple):
    """One micro-batch: rows of the plan on the host, all else on the device."""

    nodes: Ints
    rows: Tensor
    slots: Tensor
    local: Tensor
    edges: Edges
    kl: Tensor


def upload_terms(
    forest: Forest,
    batches: list[MicroBatch],
    advantage_M2: Floats,
    weight_M: Floats,
    objective: Objective,
) -> list[Terms]:
    """Uploads what all micro-batches need: one transfer of indices, one of floats."""
    if not batches:
        return []
    plan, device = forest.plan, forest.x.device
    together = plan.group(objective.together) if objective.together else np.zeros(len(plan), int)
    arrays: list[Ints] = []
    floats: list[Floats] = []
    numbers_EC = objective.numbers(plan, np.concatenate([batch.edges for batch in batches]))
    parts = np.split(numbers_EC, np.cumsum([len(batch.edges) for batch in batches])[:-1])
    for batch, numbers in zip(batches, parts, strict=True):
        nodes, edges, start = batch[:3]
        group = np.unique(together[edges], return_inverse=True)[1].reshape(-1)
        images = forest.slot[plan.parent[edges[plan.matching[edges]]]]
        arrays += [nodes, forest.slot[nodes], batch.local, start, edges, group, images]
        row, dt = plan.row[edges], plan.sigma[plan.parent[edges]] - plan.sigma[edges]
        kl_N = np.zeros(len(nodes))
        owner = np.repeat(np.arange(len(nodes)), np.diff(start))
        np.add.at(kl_N, owner, weight_M[edges] * objective.kl_factor(row, dt))
        floats += [numbers.ravel(), advantage_M2[edges].ravel(), weight_M[edges], kl_N]
    index, number = iter(upload(arrays, device)), iter(upload(floats, device))
    terms: list[Terms] = []
    for batch in batches:
        rows, slots, local, start, edges, group, images = (next(index) for _ in range(7))
        numbers, advantage, weight, kl = (next(number) for _ in range(4))
        edge_terms = Edges(
            child_start=start,
            noise=Noise(forest.noise.key, forest.noise.counter[edges], forest.noise.mix[edges]),
            image=forest.x[images],
            numbers=numbers.view(len(edges), numbers_EC.shape[1]),
            advantage=advantage.view(-1, 2),
            weight=weight,
            group=group,
        )
        terms.append(Terms(batch.nodes, rows, slots, local, edge_terms, kl.to(forest.x.dtype)))
    return terms


def velocity(
    forest: Forest, model: VelocityModel, terms: Sequence[Terms], *, reference: bool = False
) -> Tensor:
    """Returns the velocities of some micro-batches' parents, in one call of the model."""
    rows, slots = (
        torch.cat(parts) for parts in zip(*((t.rows, t.slots) for t in terms), strict=True)
    )
    nodes = np.concatenate([term.nodes for term in terms])
    host = (forest.plan.sigma[nodes], forest.plan.prompt[nodes])
    sigma, prompt = forest.sigma[rows], forest.prompt[rows]
    return call_velocity(model, forest.x[slots], sigma, prompt, reference=reference, host=host)


def rows_of_call(budget: TokenBudget | None, max_batch: int | None) -> int | None:
    """Returns how many rows of any length a call takes; None = any number."""
    if budget is None:
        return max_batch
    rows = max(1, budget.most // int(budget.tokens_M.max(initial=1)))
    return rows if max_batch is None else min(rows, max_batch)


def reference_velocities(
    forest: Forest,
    model: VelocityModel,
    terms: Sequence[Terms],
    batches: Sequence[MicroBatch],
    most: int | None,
) -> Generator[Tensor]:
    """Yields the reference policy's velocities of every micro-batch.

    Those on the tape are as small as the rollout's waves: neighbours share a call.

    Args:
        forest: of the update.
        model: the policy.
        terms: of all micro-batches.
        batches: the same on the host; those on the tape come first.
        most: rows of a shared call.
    """
    taped = sum(batch.part >= 0 for batch in batches)
    ranges = runs([len(batch.nodes) for batch in batches[:taped]], most)
    for first, last in [*ranges, *((i, i + 1) for i in range(taped, len(batches)))]:
        with torch.no_grad():
            v = velocity(forest, model, terms[first:last], reference=True)
        yield from v.split([len(term.nodes) for term in terms[first:last]])
