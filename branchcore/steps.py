"""Solver steps as rows of one affine edge, `y = a x + b v + c h + d h2 + s eps`.

A step is a function `(above, sigma, next_sigma) -> row` in float64: `above` are the noise levels
above the node, nearest first (empty at roots; only multistep solvers read them), h and h2 the x0
predictions made there. With dt = sigma - next_sigma > 0 and the velocity convention v = eps - x0.
Every row keeps the coefficient of the clean image, `a (1 - sigma) - b + c + d = 1 - next_sigma`,
which `Plan.validate` checks row by row.

Both SDEs are `mean = x (1 - g^2 dt / (2 sigma)) - v dt (1 + g^2 (1 - sigma) / (2 sigma))`,
`s = g sqrt(dt)`; g = 0 is Euler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """Coefficients of an edge, float64: y = a x + b v + c h + d h2 + s eps."""

    a: float
    b: float
    c: float
    s: float
    d: float = 0.0


Step = Callable[[Sequence[float], float, float], Row]


def euler(above: Sequence[float], sigma: float, next_sigma: float) -> Row:
    """Returns the Euler step of the probability-flow ODE; to sigma 0 it reads out x0."""
    del above
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
    return lambda _above, sigma, next_sigma: _sde(eta * eta, sigma, next_sigma)


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

    def step(_above: Sequence[float], sigma: float, next_sigma: float) -> Row:
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

    def step(_above: Sequence[float], sigma: float, next_sigma: float) -> Row:
        x0, x1 = 1.0 - next_sigma, next_sigma * cos
        return Row(x0 + x1, (1.0 - sigma) * x1 - sigma * x0, 0.0, next_sigma * sin)

    return step


def linear_sde(sigma_min: float, sigma_max: float) -> Step:
    """Returns Flash-GRPO's SDE step, `g = sigma_min + (sigma_max - sigma_min) sigma`.

    Args:
        sigma_min: diffusion at the image, >= 0.
        sigma_max: diffusion at pure noise.

    Source: Flash-GRPO, arXiv 2605.15980, released sampler.
    """
    _check_level("linear_sde", "sigma_max", sigma_max)
    if not 0.0 <= sigma_min <= sigma_max:
        raise ValueError(f"linear_sde: sigma_min must be in [0, sigma_max], got {sigma_min}")

    def step(_above: Sequence[float], sigma: float, next_sigma: float) -> Row:
        return _sde((sigma_min + (sigma_max - sigma_min) * sigma) ** 2, sigma, next_sigma)

    return step


def named_sde(name: str, noise_level: float, sigmas: Sequence[float]) -> Step:
    """Returns a stochastic step by name: what recipes offer as an option.

    Args:
        name: "flow_sde", "dance_sde", "cps", or "linear_sde" as Flow-GRPO has it for Wan,
            `g = noise_level * sigmas[1] * sigma`, noise_level 1.
        noise_level: its a or eta.
        sigmas: the schedule, whose second level flow_sde and linear_sde take.
    """
    kinds: dict[str, Callable[[], Step]] = {
        "flow_sde": lambda: flow_sde(noise_level, float(sigmas[1])),
        "dance_sde": lambda: dance_sde(noise_level),
        "cps": lambda: cps(noise_level),
        "linear_sde": lambda: linear_sde(0.0, noise_level * float(sigmas[1])),
    }
    if name not in kinds:
        raise ValueError(f"named_sde: name must be from {tuple(kinds)}, got {name!r}")
    return kinds[name]()


def dpmpp(order: int, *, warm_up: bool = False, curvature: float = 1.0) -> Step:
    """Returns the DPM-Solver++ multistep ODE step of order 1, 2 (midpoint) or 3.

    With lambda = log((1 - sigma) / sigma), h = lambda' - lambda and x0 predictions m0 (here), m1,
    m2 (above), order 2 is `y = (sigma'/sigma) x + (1 - sigma'/sigma) (m0 + h / (2 h0) (m0 - m1))`.
    Order 1 is Euler, and so is every step to sigma = 0, where the higher orders have no limit.

    Args:
        order: 1, 2 or 3; needs order - 1 levels above the node.
        warm_up: take the highest order that the levels above allow, as the first steps of a chain
            from a root must; without it, missing history is an error.
        curvature: share of the second-derivative term of order 3. The released third-order code
            (DPM-Solver, diffusers, MixGRPO) has half of it, 0.5, and converges with order 2: its
            error falls 3.8x per halving of the steps on an exact Gaussian velocity, ours 8x.

    Source: DPM-Solver++, arXiv 2211.01095, Algorithm 2 and appendix; MixGRPO `dpm_step`.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpmpp: order must be 1, 2 or 3, got {order}")

    def step(above: Sequence[float], sigma: float, next_sigma: float) -> Row:
        possible = min(order, 1 + len(above))
        if possible < order and not warm_up:
            raise ValueError(
                f"dpmpp: order {order} must have {order - 1} levels above the node, got "
                f"{len(above)} at sigma {sigma:.6g}; try warm_up=True or a lower order"
            )
        if possible == 1 or next_sigma == 0.0:
            return euler(above, sigma, next_sigma)
        if possible == 2:
            return _dpmpp_2m(above, sigma, next_sigma)
        return _dpmpp_3m(above, sigma, next_sigma, curvature)

    return step


def _lambda(sigma: float) -> float:
    return -math.inf if sigma == 1.0 else math.log((1.0 - sigma) / sigma)


def _from_predictions(sigma: float, next_sigma: float, m0: float, m1: float, m2: float) -> Row:
    """Returns the row of `y = (sigma'/sigma) x + m0 (x - sigma v) + m1 h + m2 h2`."""
    return Row(next_sigma / sigma + m0, -sigma * m0, m1, 0.0, m2)


def _dpmpp_2m(above: Sequence[float], sigma: float, next_sigma: float) -> Row:
    h, h0 = _lambda(next_sigma) - _lambda(sigma), _lambda(sigma) - _lambda(above[0])
    share, slope = 1.0 - next_sigma / sigma, h / (2.0 * h0)
    return _from_predictions(sigma, next_sigma, share * (1.0 + slope), -share * slope, 0.0)


def _dpmpp_3m(above: Sequence[float], sigma: float, next_sigma: float, curvature: float) -> Row:
    levels = [_lambda(s) for s in (next_sigma, sigma, above[0], above[1])]
    h, h0, h1 = (later - earlier for later, earlier in itertools.pairwise(levels))
    decay, alpha = math.exp(-h), 1.0 - next_sigma
    first = alpha * ((decay - 1.0) / h + 1.0)
    second = -2.0 * curvature * alpha * ((decay - 1.0 + h) / h**2 - 0.5)
    # D1_0 = (m0 - m1) h / h0 and D1_1 = (m1 - m2) h / h1 enter with these weights
    near = first * (1.0 + h0 / (h0 + h1)) + second * h / (h0 + h1)
    far = -first * h0 / (h0 + h1) - second * h / (h0 + h1)
    k0, k1 = near * h / h0, far * h / h1
    return _from_predictions(sigma, next_sigma, 1.0 - next_sigma / sigma + k0, k1 - k0, -k1)


def renoise(above: Sequence[float], sigma: float, next_sigma: float) -> Row:
    """Returns the edge from an image back to a noisy state, `y = (1 - sigma') x0 + sigma' eps`.

    It does not read the velocity (b = 0): a trained one is a matching term about the new node.

    Source: flow matching's forward process; AWM, DiffusionNFT, DGPO, Flow-DPO train on it.
    """
    del above
    if sigma != 0.0 or not 0.0 < next_sigma <= 1.0:
        raise ValueError(
            f"renoise: sigma must be 0 and next_sigma in (0, 1], got {sigma:.6g} and "
            f"{next_sigma:.6g}"
        )
    return Row(1.0 - next_sigma, 0.0, 0.0, next_sigma)
