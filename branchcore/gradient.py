"""The backward: one forward and backward per parent serves all its edges.

Letters: M rows of the plan, E trained edges, N parents of a micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import ops
from branchcore.credit import Floats
from branchcore.forest import Forest
from branchcore.idle import idle_passes
from branchcore.micro_batches import (
    Terms,
    reference_velocities,
    rows_of_call,
    upload_terms,
    velocity,
)
from branchcore.model import VelocityModel, token_budget
from branchcore.objective import ClippedRatio, Objective
from branchcore.packing import pack_parents
from branchcore.plan import Ints, Plan
from branchcore.reference import RatioStats

Anchor = Literal["auto", "detach", "rollout"]


class Statistics(NamedTuple):
    """Sums over the edges of an update: 0-d tensors on the device; `parents` is a host count."""

    loss: Tensor
    """Objective with its KL, already divided by the planned edges."""
    kl: Tensor
    """The KL term of `loss`."""
    ratio: RatioStats
    parents: int
    """Forward and backward passes."""

    def plus(self, other: Statistics) -> Statistics:
        """Returns the statistics of both sets of edges."""
        ratio = RatioStats(*(a + b for a, b in zip(self.ratio, other.ratio, strict=True)))
        largest = torch.maximum(self.ratio.max_abs_dev, other.ratio.max_abs_dev)
        return Statistics(
            self.loss + other.loss,
            self.kl + other.kl,
            ratio._replace(max_abs_dev=largest),
            self.parents + other.parents,
        )

    @staticmethod
    def zero(device: torch.device) -> Statistics:
        """Returns the statistics of no edges."""
        zero = torch.zeros((), device=device)
        return Statistics(zero, zero, RatioStats(*(zero for _ in RatioStats._fields)), 0)


def live_edges(
    plan: Plan, advantage_M2: Floats, weight_M: Floats, objective: Objective, update: int
) -> Ints:
    """Returns the trained edges of an update that can matter: weight, and advantage or KL, not 0.

    Raises:
        ValueError: the edges are not of the objective's kind.
    """
    edges = plan.trained(update)
    wrong = plan.matching[edges] != objective.matching
    if wrong.any():
        wanted = "re-noised states (b = 0)" if objective.matching else "sampling steps (b != 0)"
        raise ValueError(
            f"gradient: trained edges must be {wanted} for {type(objective).__name__}, got "
            f"b = {plan.row[edges[wrong][0], 1]:g} at row {edges[wrong][0]}"
        )
    matters = advantage_M2[edges].any(1) | (objective.kl > 0.0) | (not objective.silent)
    return edges[matters & (weight_M[edges] != 0.0)]


def gradient(
    forest: Forest,
    model: VelocityModel,
    advantage_M2: Floats,
    weight_M: Floats,
    objective: Objective,
    *,
    update: int = 0,
    anchor: Anchor = "auto",
    max_batch: int | None = None,
    max_tokens: int | None = None,
    num_planned: float | None = None,
    even: Callable[[int], int] | None = None,
) -> Statistics:
    """Adds the objective's gradient of one optimizer update to the model's parameters.

    loss = sum over edges of weight * (the objective's term + KL) / num_planned; the clipped ratio's
    term is -A+ min(r, clip r) + A- max(r, clip r).

    Args:
        forest: of `rollout`; its tape serves update 0 and is emptied by it.
        model: the same prompts as in the rollout.
        advantage_M2: (M, 2) float64 (A+, A-) of `credit.split_sign`.
        weight_M: (M,) float64 edge weights of `prune`; 0 costs nothing.
        objective: what is minimised on these edges.
        update: which of the plan's updates.
        anchor: v_old of nodes that are not on the tape: "detach" takes the new velocity itself
            (ratio exactly 1; right before any update), "rollout" the stored one; "auto" is detach
            for update 0 and rollout later. Objectives without an old policy ignore it.
        max_batch: parents of a model call at most.
        max_tokens: tokens of a model call at most, for models that count them (`CountsTokens`):
            parents of all trees and steps are packed densely. The tape's calls are made already.
        num_planned: the normaliser; None = planned trained edges of this update in this plan.
            Over several rounds or ranks: their sum.
        even: (passes of this process) -> passes of every process, at least as many; those that
            this one has not get weight 0. None = as many as there are.

    Returns:
        Statistics on the device; reading them is the caller's sync.
    """
    plan = forest.plan
    if objective.anchor != "policy":
        anchor = "detach"
    elif anchor == "auto":
        anchor = "detach" if update == 0 else "rollout"
    if anchor == "detach" and update > 0 and objective.anchor == "policy":
        raise ValueError(f"gradient: anchor must be 'rollout' after an update, got update {update}")
    if anchor == "rollout" and forest.velocity is None:
        raise ValueError(
            "gradient: anchor 'rollout' needs stored velocities, got none; "
            "try rollout(keep_velocity=True)"
        )
    _check_edges(plan, advantage_M2, weight_M)
    edges = live_edges(plan, advantage_M2, weight_M, objective, update)
    if anchor == "rollout" and not forest.evaluated[plan.action[edges]].all():
        row = int(edges[np.argmin(forest.evaluated[plan.action[edges]])])
        raise ValueError(
            f"gradient: anchor 'rollout' needs stored velocities, got none at row {row}; "
            "try rollout(keep_velocity=True)"
        )
    planned = len(plan.trained(update)) if num_planned is None else num_planned
    tape = [part.velocity for part in forest.tape] if update == 0 else []
    parts = [part.nodes for part in forest.tape] if update == 0 else []
    together = plan.group(objective.together) if objective.together else None
    budget = token_budget(model, plan.prompt, max_tokens)
    batches = pack_parents(plan, edges, max_batch, parts, together, budget)
    terms = upload_terms(forest, batches, advantage_M2, weight_M / (planned or 1), objective)
    v_refs: Iterator[Tensor | None] = itertools.repeat(None)
    if objective.compares:
        shared = 1 if even is not None else rows_of_call(budget, max_batch)
        v_refs = reference_velocities(forest, model, terms, batches, shared)
    missing = 0 if even is None else even(len(batches)) - len(batches)
    total = Statistics.zero(forest.x.device)
    for batch, term in zip(batches, terms, strict=True):
        on_tape = batch.part >= 0
        v = tape[batch.part][term.local] if on_tape else velocity(forest, model, [term])
        stored = None if anchor == "detach" or on_tape else forest.velocity
        v_old = None if stored is None else stored[term.slots]
        total = total.plus(_backward(term, v, v_old, next(v_refs), objective))
    if update == 0:
        forest.tape.clear()
    idle_passes(model, missing, forest.x.device, forest.x.dtype, reference=objective.compares)
    return total


def _check_edges(plan: Plan, advantage_M2: Floats, weight_M: Floats) -> None:
    for name, value, shape in (
        ("advantage_M2", advantage_M2, (len(plan), 2)),
        ("weight_M", weight_M, (len(plan),)),
    ):
        if value.shape != shape:
            raise ValueError(f"gradient: {name} must be {shape}, got {value.shape}")
        if not (np.isfinite(value).all() and (value >= 0.0).all()):
            bad = int(np.argmin(np.isfinite(value) & (value >= 0.0)))
            raise ValueError(
                f"gradient: {name} must be finite and >= 0, got {value.flat[bad]} at {bad}"
            )


def log_ratio_floor(
    forest: Forest,
    model: VelocityModel,
    objective: ClippedRatio,
    *,
    max_batch: int | None = None,
    max_tokens: int | None = None,
) -> float:
    """Measures the largest |log ratio| that unchanged weights give against stored velocities.

    Other batch shapes give other bits; a clip range below this floor clips at random. Evaluates
    one micro-batch of the second update's edges, or of the only one's, and syncs.

    Args:
        forest: with stored velocities.
        model: weights unchanged since the rollout.
        objective: defines the ratio.
        max_batch: parents of the micro-batch; None = all.
        max_tokens: tokens of the micro-batch; None = any.
    """
    plan = forest.plan
    if forest.velocity is None:
        raise ValueError("log_ratio_floor: forest must have stored velocities, got none")
    edges = plan.trained(1 if plan.num_updates > 1 else 0)
    edges = edges[forest.evaluated[plan.action[edges]]]
    if not len(edges):
        return 0.0
    budget = token_budget(model, plan.prompt, max_tokens)
    batch = pack_parents(plan, edges, max_batch, budget=budget)[0]
    ones = np.ones((len(plan), 2))
    (term,) = upload_terms(forest, [batch], ones, ones[:, 0], objective)
    with torch.no_grad():
        v = velocity(forest, model, [term])
        v_old, start = forest.velocity[term.slots], term.edges.child_start
        p_E, q_N = ops.edge_dots(v, v_old, start, term.edges.noise)
    owner = np.repeat(np.arange(len(batch.nodes)), np.diff(batch.child_start))
    lin, quad = objective.exponent(plan.row[batch.edges]).T
    p, q = p_E.double().cpu().numpy(), q_N.double().cpu().numpy()
    return float(np.abs(lin * p - quad * q[owner]).max())


def _backward(
    term: Terms,
    v: Tensor,
    v_old: Tensor | None,
    v_ref: Tensor | None,
    objective: Objective,
) -> Statistics:
    anchor = v_ref if objective.anchor == "reference" else v_old
    loss, stats = objective.loss(v, anchor, term.edges)
    kl = torch.zeros_like(loss)
    if objective.kl > 0.0:
        kl = (term.kl * ops.edge_dots(v, v_ref).q_N).sum()
    total = loss + kl
    total.backward()
    return Statistics(total.detach(), kl.detach(), stats, parents=len(term.rows))
