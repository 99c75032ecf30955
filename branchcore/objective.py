"""Objectives as scalar functions of two dot products, p = mean(D e) and q = mean(D^2).

D = v - v_old; e is the noise of the edge, or u - v_old on matching edges (`matching`). Every
published likelihood ratio is `exp(lin p - quad q)`, every KL to a reference a multiple of
q(v, v_ref). An objective is a class that turns these into a loss; the backward knows none of them.
Letters: N parents, E trained edges, D latent elements.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import ops
from branchcore.credit import Floats
from branchcore.noise import Noise
from branchcore.plan import Ints, Plan
from branchcore.reference import RatioLoss, RatioStats
from branchcore.reference.edges import parents
from branchcore.reference.ratio_loss import log_ratio

INFINITE = (math.inf, math.inf)


class Edges(NamedTuple):
    """The trained edges of one micro-batch, grouped by parent; tensors on the device."""

    child_start: Tensor
    """(N + 1,) int64, edges of parent n are child_start[n]:child_start[n + 1]."""
    noise: Noise
    """Noise names of the E edges."""
    image: Tensor
    """(E, D) on matching edges the image they were re-noised from; else (0, D)."""
    numbers: Tensor
    """(E, C) fp64, what `Objective.numbers` made of the plan."""
    advantage: Tensor
    """(E, 2) fp64 (A+, A-)."""
    weight: Tensor
    """(E,) fp64, divided by the planned edges."""
    group: Tensor
    """(E,) int64 group of every edge, from 0 without gaps, if the objective keeps groups."""


def check_clip(name: str, clip: tuple[float, float]) -> None:
    """Raises ValueError unless a clip range is two positive distances from 1."""
    if len(clip) != 2 or not all(c > 0.0 for c in clip):
        raise ValueError(f"{name}: clip must be two positive numbers, got {clip}")


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What is minimised: a loss per trained edge plus a KL to the reference policy."""

    kl: float = 0.0
    """Weight of the KL to the reference policy, per trained edge; 0 = no reference forward."""
    kl_form: Literal["gaussian", "flow_grpo", "velocity"] = "gaussian"
    """gaussian: b^2/(2 s^2) q, the KL of the two steps per latent element; flow_grpo: that times
    dt, as its released code divides by g^2; velocity: q itself."""
    matching: ClassVar[bool] = False
    """Trained edges are re-noised states (b = 0), about their own node, not sampling steps."""
    anchor: ClassVar[Literal["policy", "reference", "none"]] = "policy"
    """What v_old is: the policy that sampled, the frozen reference, or of no account."""

    @property
    def silent(self) -> bool:
        """Edges of zero advantage have no gradient (but for the KL): nobody forwards them."""
        return True

    @property
    def compares(self) -> bool:
        """Every pass has a forward of the reference policy, for a KL or a preference."""
        return self.kl > 0.0 or self.anchor == "reference"

    @property
    def together(self) -> tuple[str, ...]:
        """Columns of the plan whose groups must be in one micro-batch; () = none need."""
        return ()

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.kl_form not in ("gaussian", "flow_grpo", "velocity"):
            raise ValueError(
                f"{name}: kl_form must be gaussian, flow_grpo or velocity, got {self.kl_form!r}"
            )
        if not (self.kl >= 0.0 and math.isfinite(self.kl)):
            raise ValueError(f"{name}: kl must be finite and >= 0, got {self.kl}")

    @abstractmethod
    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, C) float64 that `loss` needs to know of each edge."""

    @abstractmethod
    def loss(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> RatioLoss:
        """Returns the summed weighted loss and its statistics.

        Args:
            v_ND: (N, D) velocities at the parents, differentiable.
            v_old_ND: (N, D) of `anchor`; None = v itself, stopped.
            edges: their trained edges.
        """

    def slope(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E,) size of dL/dv per advantage on policy, up to one factor, as rows tell it.

        1 for objectives whose rows do not tell.
        """
        del plan
        return np.ones(len(edges))

    def kl_factor(self, row_E4: Floats, dt_E: Floats) -> Floats:
        """Returns (E,) factors of q(v, v_ref), `kl` included."""
        b, s = row_E4[:, 1], row_E4[:, 3]
        form = {
            "gaussian": b**2 / (2.0 * s**2),
            "flow_grpo": b**2 * dt_E / (2.0 * s**2),
            "velocity": np.ones_like(b),
        }[self.kl_form]
        return self.kl * form


@dataclass(frozen=True, kw_only=True)
class ClippedRatio(Objective):
    """PPO's clipped ratio of Gaussian steps: -A+ min(r, clip r) + A- max(r, clip r)."""

    ratio: Literal["gaussian", "guard", "cps"] = "gaussian"
    """gaussian: exact mean log-ratio, k p - k^2/2 q with k = b/s (PPO in all trainers); guard:
    GRPO-Guard's RatioNorm, b p; cps: Flow-CPS without 1/(2 s^2), 2 s b p - b^2 q."""
    clip: tuple[float, float] = (1e-4, 1e-4)
    """Ratio is clipped to [1 - low, 1 + high]; published 1e-4 (Dance, Flow), 1e-3 (Branch)."""
    floor: float = 0.0
    """Noise floor of the log ratio, once known: which of the clips are noise is counted by it."""
    log_ratio_penalty: float = 0.0
    """Weight of half the squared log ratio, MixGRPO's `kl_coeff`; its scripts pass 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip("ClippedRatio", self.clip)
        if self.ratio not in ("gaussian", "guard", "cps"):
            raise ValueError(
                f"ClippedRatio: ratio must be gaussian, guard or cps, got {self.ratio!r}"
            )
        if not (self.log_ratio_penalty >= 0.0 and math.isfinite(self.log_ratio_penalty)):
            raise ValueError(
                f"ClippedRatio: log_ratio_penalty must be finite and >= 0, got "
                f"{self.log_ratio_penalty}"
            )

    @property
    def silent(self) -> bool:
        """The penalty acts on edges of zero advantage too."""
        return self.log_ratio_penalty == 0.0

    def exponent(self, row_E4: Floats) -> Floats:
        """Returns (E, 2) float64 (lin, quad) of the log ratio `lin p - quad q`."""
        b, s = row_E4[:, 1], row_E4[:, 3]
        if self.ratio == "guard":
            return np.stack([b, np.zeros_like(b)], axis=1)
        if self.ratio == "cps":
            return np.stack([2.0 * s * b, b**2], axis=1)
        return np.stack([b / s, (b / s) ** 2 / 2.0], axis=1)

    def slope(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E,) lin: dL/dv = -A lin eps on policy."""
        return self.exponent(plan.row[edges])[:, 0]

    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, 2) (lin, quad) of the log ratio."""
        return self.exponent(plan.row[edges])

    def loss(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> RatioLoss:
        """Returns the clipped loss; see `ops.ratio_loss`."""
        p_E, q_N = ops.edge_dots(v_ND, v_old_ND, edges.child_start, edges.noise)
        exponent, start = edges.numbers[:, :2].contiguous(), edges.child_start
        advantage = self.advantage(p_E.detach(), q_N.detach(), edges)
        result = ops.ratio_loss(
            p_E, q_N, start, exponent, advantage, edges.weight, self.clip, self.floor
        )
        if not self.log_ratio_penalty:
            return result
        squares = log_ratio(p_E, q_N, start, exponent).square()
        penalty = 0.5 * self.log_ratio_penalty * (edges.weight * squares).sum()
        return RatioLoss(result.loss + penalty.to(result.loss.dtype), result.stats)

    def advantage(self, p_E: Tensor, q_N: Tensor, edges: Edges) -> Tensor:
        """Returns (E, 2) advantages (A+, A-) that take part."""
        del p_E, q_N
        return edges.advantage


@dataclass(frozen=True, kw_only=True)
class MaskedRatio(ClippedRatio):
    """Flow-DPPO: instead of clipping, terms that lead out of a trust region are dropped.

    An edge is dropped while mean(d^2) / (2 s^2) > trust, d = b D, and its advantage would push the
    ratio further from 1. Source: arXiv 2606.11025.
    """

    clip: tuple[float, float] = INFINITE
    """Not published for it; inf = the mask alone."""
    trust: float = 1e-7
    """Bound on the divergence of the two steps per latent element; 1e-7 SDE, 1e-6 CPS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trust > 0.0:
            raise ValueError(f"MaskedRatio: trust must be positive, got {self.trust}")

    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, 3): (lin, quad) of the log ratio, and the divergence per q."""
        b, s = plan.row[edges, 1], plan.row[edges, 3]
        divergence = b**2 / (2.0 * s**2)
        return np.concatenate([self.exponent(plan.row[edges]), divergence[:, None]], axis=1)

    def advantage(self, p_E: Tensor, q_N: Tensor, edges: Edges) -> Tensor:
        """Returns the advantages inside the trust region or on their way back, else 0."""
        ratio_E = log_ratio(p_E, q_N, edges.child_start, edges.numbers[:, :2]).exp()
        divergence_E = edges.numbers[:, 2] * q_N.double()[parents(edges.child_start, len(p_E))]
        away_E2 = torch.stack([ratio_E > 1.0, ratio_E < 1.0], dim=1)
        return edges.advantage.masked_fill(away_E2 & (divergence_E > self.trust)[:, None], 0.0)


def plain_statistics(loss: Tensor, weight_E: Tensor) -> RatioStats:
    """Returns the statistics of an objective without a ratio: the number of edges, else 0."""
    zero = torch.zeros_like(loss.detach())
    count = (weight_E != 0).sum().to(zero.dtype)
    return RatioStats(count, *(zero for _ in RatioStats._fields[1:]))
