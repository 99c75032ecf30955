"""The objective as scalar functions of two dot products, p = mean(D eps) and q = mean(D^2).

With D = v - v_old, p per edge and q per parent, every published likelihood ratio is
`exp(lin p - quad q)` and every KL to a reference is a multiple of q(v, v_ref).
Letters: E trained edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from branchcore.credit import Floats


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which scalar function of (p, q) is minimised."""

    ratio: Literal["gaussian", "guard", "cps"] = "gaussian"
    """gaussian: exact mean log-ratio, k p - k^2/2 q with k = b/s (PPO in all trainers); guard:
    GRPO-Guard's RatioNorm, b p; cps: Flow-CPS without 1/(2 s^2), 2 s b p - b^2 q."""
    clip: tuple[float, float] = (1e-4, 1e-4)
    """Ratio is clipped to [1 - low, 1 + high]; published 1e-4 (Dance, Flow), 1e-3 (Branch)."""
    kl: float = 0.0
    """Weight of the KL to the reference policy, per trained edge; 0 = no reference forward."""
    kl_form: Literal["gaussian", "flow_grpo", "velocity"] = "gaussian"
    """gaussian: b^2/(2 s^2) q, the KL of the two steps per latent element; flow_grpo: that times
    dt, as its released code divides by g^2; velocity: q itself."""

    def __post_init__(self) -> None:
        if self.ratio not in ("gaussian", "guard", "cps"):
            raise ValueError(f"Objective: ratio must be gaussian, guard or cps, got {self.ratio!r}")
        if self.kl_form not in ("gaussian", "flow_grpo", "velocity"):
            raise ValueError(
                f"Objective: kl_form must be gaussian, flow_grpo or velocity, got {self.kl_form!r}"
            )
        if len(self.clip) != 2 or not all(c > 0.0 for c in self.clip):
            raise ValueError(f"Objective: clip must be two positive numbers, got {self.clip}")
        if not (self.kl >= 0.0 and math.isfinite(self.kl)):
            raise ValueError(f"Objective: kl must be finite and >= 0, got {self.kl}")

    def exponent(self, row_E4: Floats) -> Floats:
        """Returns (E, 2) float64 (lin, quad) of the log ratio `lin p - quad q`."""
        b, s = row_E4[:, 1], row_E4[:, 3]
        if self.ratio == "guard":
            return np.stack([b, np.zeros_like(b)], axis=1)
        if self.ratio == "cps":
            return np.stack([2.0 * s * b, b**2], axis=1)
        return np.stack([b / s, (b / s) ** 2 / 2.0], axis=1)

    def kl_factor(self, row_E4: Floats, dt_E: Floats) -> Floats:
        """Returns (E,) factors of q(v, v_ref), `kl` included."""
        b, s = row_E4[:, 1], row_E4[:, 3]
        form = {
            "gaussian": b**2 / (2.0 * s**2),
            "flow_grpo": b**2 * dt_E / (2.0 * s**2),
            "velocity": np.ones_like(b),
        }[self.kl_form]
        return self.kl * form
