"""The hosts' formulas in plain torch, as their code has them, in the dtype of their inputs."""

import math

import torch

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def spread(numbers, like):
    """A number or (B,) as (1, 1, ...) or (B, 1, ...) in the dtype of `like`."""
    if not isinstance(numbers, torch.Tensor):
        numbers = torch.tensor(numbers, dtype=torch.float64)
    numbers = numbers.to(like.dtype).reshape(-1)
    return numbers.view(-1, *[1] * (like.dim() - 1))


def mean_over_elements(value):
    return value.mean(dim=tuple(range(1, value.dim())))


def flow_sde(x, v, sigma, after, level, second):
    """Flow-GRPO eq. 9: the mean, g and the std of the step."""
    dt = after - sigma
    g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, second, sigma))) * level
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g, g * torch.sqrt(-dt)


def dance_sde(x, v, sigma, after, eta, solver=True):
    """DanceGRPO: Euler plus half eta^2 times the score."""
    dt = after - sigma
    mean, x0, std = x + dt * v, x - sigma * v, eta * torch.sqrt(-dt)
    if solver:
        score = -(x - x0 * (1 - sigma)) / sigma**2
        mean = mean - 0.5 * eta**2 * score * dt
    return mean, std, std


def cps(x, v, sigma, after, eta):
    """Flow-CPS."""
    std = after * torch.sin(torch.as_tensor(eta * math.pi / 2, dtype=x.dtype))
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    return x0 * (1 - after) + x1 * torch.sqrt(after**2 - std**2), std, std


def mean_and_std(kind, x, v, sigma, after, level, second):
    """(mean, the host's std_dev_t, std of the step) of a kind of step."""
    sigma, after, second = (spread(value, x) for value in (sigma, after, second))
    level = spread(level, x) if isinstance(level, torch.Tensor) else level
    if kind == "flow":
        return flow_sde(x, v, sigma, after, level, second)
    if kind == "cps":
        return cps(x, v, sigma, after, level)
    return dance_sde(x, v, sigma, after, level, solver=kind == "dance")


def log_prob(kind, y, mean, std, constants=True):
    """Mean log-probability of y; CPS without 1 / (2 s^2)."""
    square = -((y.detach() - mean) ** 2)
    if kind == "cps":
        return mean_over_elements(square)
    value = square / (2 * std**2)
    if constants:
        value = value - torch.log(std) - HALF_LOG_2PI
    return mean_over_elements(value)


def clipped_terms(ratio, advantages, clip, bound):
    """(B,) terms of the clipped loss."""
    advantages = advantages.clamp(-bound, bound)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped_loss(ratio, advantages, clip, bound):
    return clipped_terms(ratio, advantages, clip, bound).mean()


def guard_log_ratio(new, old, mean, mean_old, g, root):
    """GRPO-Guard's RatioNorm, batch means and all."""
    scale = root.mean() * g.mean()
    drift = mean_over_elements((mean - mean_old) ** 2) / (2 * scale**2)
    return (new - old + drift) * scale


def awm_log_prob(v, x0, noise, t, weighting, power):
    m = mean_over_elements((v - (noise - x0)) ** 2)
    return {
        "Uniform": lambda: -m,
        "t": lambda: -m * t,
        "t**2": lambda: -m * t**2,
        "huber": lambda: -(torch.sqrt(m + 1e-10) - 1e-5) * t,
        "ghuber": lambda: -((m + 1e-10) ** power - 1e-10**power) * t / power,
    }[weighting]()


def nft_loss(v, old, ref, x0, xt, t, r, beta, bound, kl_weight):
    t, terms = spread(t, x0), []
    for sign in (1, -1):
        # v+ = beta v + (1 - beta) v_old, v- = (1 + beta) v_old - beta v
        x0_hat = xt - t * (sign * beta * v + (1 - sign * beta) * old)
        weight = mean_over_elements((x0_hat - x0).abs()).detach().clamp(min=1e-5)
        terms.append(mean_over_elements((x0_hat - x0) ** 2) / weight)
    policy = ((r * terms[0] + (1 - r) * terms[1]) / beta * bound).mean()
    return policy + kl_weight * mean_over_elements((v - ref) ** 2).mean()
