"""Invariants of a plan, one line each; an error names the first row that breaks one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from branchcore.plan import Plan

_TOLERANCE = 1e-9


def _require(ok: ArrayLike, plan: Plan, wanted: str, got: NDArray[np.generic]) -> None:
    good = np.asarray(ok)
    if not good.all():
        i = int(np.argmin(good))
        value = np.asarray(got)[i]
        where = f"row {i} (prompt {plan.prompt[i]}, sigma {plan.sigma[i]:.6g})"
        raise ValueError(f"plan: {where}: {wanted}, got {value}")


def check_plan(plan: Plan, noisy_leaves: bool) -> None:
    """Raises ValueError unless the plan can run."""
    if len(plan) == 0:
        raise ValueError("plan: must have at least one row, got 0; try Tree.roots and Tree.leaf")
    _check_order(plan)
    _check_rows(plan)
    _check_noise(plan)
    _check_roles(plan, noisy_leaves)


def _check_order(plan: Plan) -> None:
    index, parent = np.arange(len(plan)), plan.parent
    rises = np.concatenate([[True], np.diff(parent) >= 0])
    _require(rises, plan, "parents must be sorted", parent)
    _require((parent < index) & (parent >= -1), plan, "parent must be an earlier row or -1", parent)
    inner, up = parent >= 0, np.maximum(parent, 0)
    same_prompt = ~inner | (plan.prompt[up] == plan.prompt)
    _require(same_prompt, plan, "a tree must stay in one prompt", plan.prompt)


def _check_rows(plan: Plan) -> None:
    a, b, c, s = plan.row.T
    inner, up = plan.parent >= 0, np.maximum(plan.parent, 0)
    sigma, above = plan.sigma, plan.sigma[up]
    finite = np.isfinite(plan.row).all(1) & np.isfinite(plan.older)
    _require(finite, plan, "row (a, b, c, s) must be finite", plan.row)
    _require((sigma >= 0) & (sigma <= 1), plan, "sigma must be in [0, 1]", sigma)
    _require(s >= 0, plan, "s must be >= 0", s)
    empty = (a == 0) & (b == 0) & (c == 0)
    _require(inner | empty, plan, "a root row must be (0, 0, 0, s)", plan.row)
    falls = ~inner | (b == 0) | (sigma < above)
    _require(falls, plan, "sigma must decrease along an edge with b != 0", sigma)
    image = np.abs(a * (1 - above) - b + c + plan.older - (1 - sigma))
    kept = ~inner | (image < _TOLERANCE)
    _require(kept, plan, "a (1 - sigma_p) - b + c + d must be 1 - sigma", image)
    noise = (a * above + b) ** 2 + s**2 - sigma**2
    kept = ~inner | (noise > -_TOLERANCE)
    _require(kept, plan, "(a sigma_p + b)^2 + s^2 must be >= sigma^2", noise)
    grand = np.where(inner, plan.parent[up], -1)
    _require(~plan.history | (grand >= 0), plan, "c != 0 must have a parent's parent", c)
    great = np.where(grand >= 0, plan.parent[grand], -1)
    older = (plan.older == 0) | (great >= 0)
    _require(older, plan, "d != 0 must have a parent's parent's parent", plan.older)


def _check_noise(plan: Plan) -> None:
    root = plan.parent < 0
    draws = plan.row[:, 3] > 0
    own, shared = plan.stream.T
    _require((own >= 0) == (draws | root), plan, "own stream must be set exactly where s > 0", own)
    mixes = plan.mix[:, 1] != 0
    _require(
        (shared >= 0) == mixes, plan, "shared stream must be set exactly where mix1 != 0", shared
    )


def _check_roles(plan: Plan, noisy_leaves: bool) -> None:
    s, below = plan.row[:, 3], plan.leaves_below
    trained = plan.train
    _require(~trained | (s > 0), plan, "a trained edge must have s > 0", s)
    _require(~trained | (plan.parent >= 0), plan, "a trained edge must have a parent", plan.parent)
    _require(~trained | (plan.update >= 0), plan, "update must be >= 0", plan.update)
    scored = ~trained | (below > 0) | (plan.row[:, 1] == 0)
    _require(scored, plan, "a trained edge must have a leaf below it", below)
    work = below + trained
    for lo, hi in plan.levels()[:0:-1]:
        np.add.at(work, plan.parent[lo:hi], work[lo:hi])
    _require(work > 0, plan, "a node must have a leaf or a trained edge below it", work)
    if not noisy_leaves:
        clean = ~plan.leaf | (plan.sigma == 0)
        _require(
            clean, plan, "a leaf must be at sigma 0 (noisy_leaves=True allows more)", plan.sigma
        )
    if trained.any():
        leaves = np.bincount(plan.prompt[plan.leaf], minlength=plan.num_prompts)
        enough = ~trained | (leaves[plan.prompt] >= 2)
        _require(enough, plan, "a trained prompt must have at least 2 leaves", leaves[plan.prompt])
