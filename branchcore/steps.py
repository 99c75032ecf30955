"""Solver steps as rows (a, b, c, s) of one affine edge, `y = a x + b v + c h + s eps`.

A step is a function `(prev_sigma, sigma, next_sigma) -> row` in float64: `prev_sigma` is the noise
level of the parent's parent (None at roots; only multistep solvers read it). With dt = sigma -
next_sigma > 0 and the velocity convention v = eps - x0. Every row keeps the coefficient of the
clean image, `a (1 - sigma) - b + c = 1 - next_sigma`, which `Plan.validate` checks row by row.

Both SDEs are `mean = x (1 - g^2 dt / (2 sigma)) - v dt (1 + g^2 (1 - sigma) / (2 sigma))`,
`s = g sqrt(dt)`; g = 0 is Euler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """Coefficients of an edge, float64: y = a x + b v + c h + s eps."""

    a: float
    b: float
    c: float
    s: float


Step = Callable[["float | None", float, float], Row]


def euler(prev_sigma: float | None, sigma: float, next_sigma: float) -> Row:
    """Returns the Euler step of the probability-flow ODE; to sigma 0 it reads out x0."""
    del prev_sigma
    return Row(1.0, next_sigma - sigma, 0.0, 0.0)


def _sde(g2: float, sigma: float, next_sigma: float) -> Row:
    dt = sigma - next_sigma
    a = 1.0 - g2 * dt / (2.0 * sigma)
    b = -dt * (1.0 + g2 * (1.0 - sigma) / (2.0 * sigma))
    return Row(a, b, 0.0, math.sqrt(g2 * dt))


def _check_level(name: str, argument: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(
            f"{name}: {argument} must be positive, got {value}; try euler for no noise"
        )


def dance_sde(eta: float) -> Step:
    """Returns DanceGRPO's SDE step, constant diffusion g = eta (published: 0.3; Hunyuan 0.25).

    Source: DanceGRPO `flux_step`; BranchGRPO uses the same.
    """
    _check_level("dance_sde", "eta", eta)
    return lambda _prev, sigma, next_sigma: _sde(eta * eta, sigma, next_sigma)


def flow_sde(noise_level: float, sigma_1: float) -> Step:
    """Returns Flow-GRPO's SDE step, `g = noise_level * sqrt(sigma / (1 - sigma))`.

    Args:
        noise_level: the paper's a; 0.7 for SD3.5, 0.9 for FLUX, 1.2 for Qwen-Image.
        sigma_1: second sigma of the schedule; replaces sigma inside the root where sigma = 1.

    Source: Flow-GRPO eq. 9, `sde_step_with_logprob`.
    """
    _check_level("flow_sde", "noise_level", noise_level)
    if not 0.0 < sigma_1 < 1.0:
        raise ValueError(f"flow_sde: sigma_1 must be inside (0, 1), got {sigma_1}")

    def step(_prev: float | None, sigma: float, next_sigma: float) -> Row:
        inner = sigma_1 if sigma == 1.0 else sigma
        return _sde(noise_level**2 * sigma / (1.0 - inner), sigma, next_sigma)

    return step


def cps(eta: float) -> Step:
    """Returns the coefficients-preserving step: the noise is a fixed share of next_sigma.

    `s = next_sigma sin(eta pi / 2)`, `mean = (1 - next_sigma) x0 + next_sigma cos(eta pi / 2) x1`
    with x0 = x - sigma v and x1 = x + (1 - sigma) v. At next_sigma = 0 it is Euler.

    Args:
        eta: in (0, 1]; 0.8 in Flow-GRPO's configurations.

    Source: Flow-CPS, arXiv 2509.05952; Flow-GRPO `sde_type="cps"`.
    """
    if not 0.0 < eta <= 1.0:
        raise ValueError(f"cps: eta must be in (0, 1], got {eta}; try euler for no noise")
    cos, sin = math.cos(eta * math.pi / 2.0), math.sin(eta * math.pi / 2.0)

    def step(_prev: float | None, sigma: float, next_sigma: float) -> Row:
        x0, x1 = 1.0 - next_sigma, next_sigma * cos
        return Row(x0 + x1, (1.0 - sigma) * x1 - sigma * x0, 0.0, next_sigma * sin)

    return step
