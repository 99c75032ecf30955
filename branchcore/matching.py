"""Objectives on re-noised leaves: flow matching to the policy's own images, weighed by reward.

At x_t = (1 - t) x0 + t eps the target is u = eps - x0. With D = v - v_old, e = u - v_old and means
over the elements, p = mean(D e), q = mean(D^2), m = mean(e^2):

    mean (u - v)^2 = m - 2 p + q.

Letters: E trained edges, each about its own node (N = E), D latent elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore import ops
from branchcore.credit import Floats
from branchcore.objective import Edges, Objective, check_clip, plain_statistics
from branchcore.plan import Ints, Plan
from branchcore.reference import RatioLoss
from branchcore.reference.edges import wide


class Misses(NamedTuple):
    """How far the old and the new velocity are from the target."""

    p_E: Tensor
    """(E,) mean(D e), differentiable."""
    q_E: Tensor
    """(E,) mean(D^2), differentiable."""
    m_E: Tensor
    """(E,) mean(e^2)."""
    delta_ED: Tensor
    """(E, D) D, without gradient."""
    error_ED: Tensor
    """(E, D) e."""


@dataclass(frozen=True, kw_only=True)
class Matching(Objective):
    """What the matching objectives share; their KL is |v - v_ref|^2."""

    kl_form: Literal["gaussian", "flow_grpo", "velocity"] = "velocity"
    """Re-noising has no step density: only velocity."""
    matching: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_form != "velocity":
            raise ValueError(
                f"{type(self).__name__}: kl_form must be velocity, got {self.kl_form!r}"
            )

    def misses(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> Misses:
        """Returns the dot products of each edge's own node; noise is drawn again, not stored."""
        dtype = wide(v_ND.dtype)
        old_ED = (v_ND.detach() if v_old_ND is None else v_old_ND).to(dtype)
        delta_ED = v_ND.to(dtype) - old_ED
        noise_ED = ops.philox_normal(edges.noise, v_ND.shape[1], dtype)
        error_ED = noise_ED - edges.image.to(dtype) - old_ED
        return Misses(
            (delta_ED * error_ED).mean(1),
            delta_ED.square().mean(1),
            error_ED.square().mean(1),
            delta_ED.detach(),
            error_ED,
        )


def _times(plan: Plan, edges: Ints) -> Floats:
    return plan.sigma[edges][:, None]


@dataclass(frozen=True, kw_only=True)
class AdvantageMatching(Matching):
    """AWM: PPO with log p = -w(t) mean (u - v)^2, or a power of it.

    On policy its gradient is A grad[w mean (u - v)^2].
    Source: Advantage Weighted Matching, arXiv 2509.25050; its repository's weightings.
    """

    weighting: Literal["uniform", "t", "t2", "ghuber"] = "ghuber"
    """w = 1, t, t^2, or log p = -t/h ((m + 1e-10)^h - 1e-10^h) with h = `power`."""
    power: float = 0.25
    """h of ghuber; 1 is w = t."""
    clip: tuple[float, float] = (1.0, 1.0)
    """Ratio is clipped to [1 - low, 1 + high]; 1 in the repository."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip("AdvantageMatching", self.clip)
        if self.weighting not in ("uniform", "t", "t2", "ghuber"):
            raise ValueError(
                "AdvantageMatching: weighting must be uniform, t, t2 or ghuber, got "
                f"{self.weighting!r}"
            )
        if not 0.0 < self.power <= 1.0:
            raise ValueError(f"AdvantageMatching: power must be in (0, 1], got {self.power}")

    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, 2): the power of the miss, and its factor."""
        t = _times(plan, edges)
        power = self.power if self.weighting == "ghuber" else 1.0
        factor = {"uniform": t**0, "t": t, "t2": t**2, "ghuber": t / power}[self.weighting]
        return np.concatenate([np.full_like(t, power), factor], axis=1)

    def slope(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E,) power times factor: what multiplies the miss, taken as equal everywhere."""
        return self.numbers(plan, edges).prod(1)

    def loss(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> RatioLoss:
        """Returns the clipped loss of the matching log-ratio."""
        p_E, q_E, m_E, *_ = self.misses(v_ND, v_old_ND, edges)
        power_E, factor_E = edges.numbers.unbind(1)
        m_E = m_E.double()

        def log_prob(miss_E: Tensor) -> Tensor:
            return -factor_E * ((miss_E + 1e-10) ** power_E - (1e-10) ** power_E)

        l_E = log_prob(m_E - 2.0 * p_E.double() + q_E.double()) - log_prob(m_E)
        l_E = l_E.to(p_E.dtype)
        linear = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=l_E.device)
        return ops.ratio_loss(
            l_E,
            torch.zeros_like(l_E),
            edges.child_start,
            linear.expand(len(l_E), 2).contiguous(),
            edges.advantage,
            edges.weight,
            self.clip,
        )


@dataclass(frozen=True, kw_only=True)
class ContrastiveMatching(Matching):
    """DiffusionNFT: pulls v_old + beta D towards good images and v_old - beta D towards bad ones.

    With r = clip(A / (2 A_max) + 1/2, 0, 1) per edge, w = mean |x0_hat - x0| held fixed:
    loss = A_max / beta * t^2 (r mean(e - beta D)^2 / w+ + (1 - r) mean(e + beta D)^2 / w-).
    On policy its gradient is A grad[t^2 mean (u - v)^2 / w] whatever beta.
    Source: DiffusionNFT, arXiv 2509.16117, NVlabs/DiffusionNFT.
    """

    beta: float = 1.0
    """How far the two contrasted policies are from the old one; 1, or 0.1 for several rewards."""
    advantage_max: float = 5.0
    """A_max: advantages are clipped to it before."""

    @property
    def silent(self) -> bool:
        """Away from the old policy an advantage of 0 still contrasts."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 < self.beta < math.inf and 0.0 < self.advantage_max < math.inf):
            raise ValueError(
                "ContrastiveMatching: beta and advantage_max must be positive, got "
                f"{self.beta} and {self.advantage_max}"
            )

    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, 1): the times t."""
        return _times(plan, edges)

    def loss(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> RatioLoss:
        """Returns the contrastive loss."""
        p_E, q_E, m_E, delta_ED, error_ED = self.misses(v_ND, v_old_ND, edges)
        t_E, beta = edges.numbers[:, 0], self.beta
        plus, minus = edges.advantage.unbind(1)
        good_E = ((plus - minus) / (2.0 * self.advantage_max) + 0.5).clamp(0.0, 1.0)
        total_E = torch.zeros_like(t_E)
        for sign, share_E in ((1.0, good_E), (-1.0, 1.0 - good_E)):
            scale_E = (error_ED - sign * beta * delta_ED).abs().mean(1).double()
            scale_E = (t_E * scale_E).clamp(min=1e-5)
            miss_E = m_E - 2.0 * sign * beta * p_E + beta**2 * q_E
            total_E = total_E + share_E * t_E.square() * miss_E.double() / scale_E
        loss = (self.advantage_max / beta * edges.weight * total_E).sum().to(p_E.dtype)
        return RatioLoss(loss, plain_statistics(loss, edges.weight))


@dataclass(frozen=True, kw_only=True)
class Preference(Matching):
    """DGPO and Flow-DPO: -log sigmoid(-beta sum_i A_i (miss_i - reference miss_i)) per group.

    Source: DGPO, arXiv 2510.08425 (a group with its advantages); Flow-DPO, arXiv 2501.13918 (a
    pair with A = 1, -1 and half its beta).
    """

    beta: float = 100.0
    """Inverse temperature of the group's sum."""
    anchor: ClassVar[Literal["policy", "reference", "none"]] = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta > 0.0 and math.isfinite(self.beta)):
            raise ValueError(f"Preference: beta must be positive, got {self.beta}")

    @property
    def together(self) -> tuple[str, ...]:
        """A prompt's edges of one label share a term: they have the same time and noise."""
        return ("prompt", "label")

    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, 1): planned over given edges of the group, so that a group counts whole."""
        group = plan.group(self.together)
        planned = np.bincount(group[plan.trained()], minlength=len(plan))
        given = np.bincount(group[edges], minlength=len(plan))
        return (planned / np.maximum(given, 1))[group[edges]][:, None]

    def loss(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> RatioLoss:
        """Returns the preference loss of whole groups."""
        p_E, q_E, *_ = self.misses(v_ND, v_old_ND, edges)
        plus, minus = edges.advantage.unbind(1)
        gain_E = (plus - minus) * (q_E - 2.0 * p_E).double()
        total = torch.zeros_like(gain_E).index_add(0, edges.group, gain_E)
        share_E = edges.weight * edges.numbers[:, 0]
        loss = share_E * torch.nn.functional.softplus(self.beta * total)[edges.group]
        value = loss.sum().to(p_E.dtype)
        return RatioLoss(value, plain_statistics(value, edges.weight))


@dataclass(frozen=True, kw_only=True)
class RewardWeighted(Matching):
    """Flow-RWR: A+ mean (u - v)^2, with A+ = exp of the standardised reward.

    Source: arXiv 2501.13918, sec. 4.
    """

    anchor: ClassVar[Literal["policy", "reference", "none"]] = "none"

    def numbers(self, plan: Plan, edges: Ints) -> Floats:
        """Returns (E, 0)."""
        del plan
        return np.zeros((len(edges), 0))

    def loss(self, v_ND: Tensor, v_old_ND: Tensor | None, edges: Edges) -> RatioLoss:
        """Returns the weighted matching loss."""
        p_E, q_E, m_E, *_ = self.misses(v_ND, v_old_ND, edges)
        miss_E = (m_E - 2.0 * p_E + q_E).double()
        loss = (edges.weight * edges.advantage[:, 0] * miss_E).sum().to(p_E.dtype)
        return RatioLoss(loss, plain_statistics(loss, edges.weight))
