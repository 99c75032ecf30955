"""What the chain methods share: chains with stochastic steps, re-noised states, common settings.

A chain has no branches: G chains per prompt make the group. Written literally, `passes.share`
merges what a common root noise makes equal: every step up to the first stochastic one, whose
velocity is common too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from branchcore.plan import Ints
from branchcore.steps import Step, euler, renoise
from branchcore.tree import Tree

FLOW_GRPO_TRAINER: Mapping[str, Any] = {
    "lr": 3e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}
"""AdamW of yifan123/flow_grpo's base configuration, which most of the family starts from."""

FLOW_GRPO_EMA = 0.9**0.25
"""Its average: 0.9 every 8 updates, which is this every iteration of 2 updates."""


def grow_chains(
    t: Tree,
    sigmas: Sequence[float],
    step: Step,
    window: Collection[int],
    *,
    group: int,
    same_noise: bool = False,
    updates: int = 1,
    train: NDArray[np.bool_] | None = None,
) -> Ints:
    """Grows chains that are stochastic and trained in a window of steps, Euler elsewhere.

    Args:
        t: the tree.
        sigmas: noise levels from 1 to where the chains end.
        step: the stochastic step.
        window: steps that use it; step i goes from sigmas[i] to sigmas[i + 1].
        group: chains.
        same_noise: all start from one root noise.
        updates: optimizer updates that the chains are dealt to, in equal consecutive parts.
        train: (T, group) which stochastic steps each chain trains; None = all.

    Returns:
        (group,) ids of the last nodes.
    """
    x = t.roots(group, same_noise=same_noise)
    update = np.arange(group) * updates // group
    for i, sigma in enumerate(sigmas[1:]):
        if i in window:
            x = t.grow(x, sigma, step, train=True if train is None else train[i], update=update)
        else:
            x = t.grow(x, sigma, euler)
    return x


def ratio_of(name: str) -> Literal["gaussian", "cps"]:
    """Returns the published ratio of a step: without 1 / (2 s^2) for "cps", else exact."""
    return "cps" if name == "cps" else "gaussian"


def check_group(name: str, group: int) -> None:
    """Raises ValueError unless a group has at least two leaves to compare."""
    if group < 2:
        raise ValueError(f"{name}: group must be at least 2 leaves, got {group}")


def check_window(name: str, window: int, room: int, where: str) -> None:
    """Raises ValueError unless 1 <= window <= room."""
    if not 1 <= window <= room:
        raise ValueError(f"{name}: window must be in 1..{room}, the steps {where}, got {window}")


def check_times(name: str, times: int | None, steps: int, shift: float) -> int:
    """Returns how many levels to train at, int(0.99 T) unless said.

    Raises:
        ValueError: none, or a shift of the levels that is not positive.
    """
    count = int(0.99 * steps) if times is None else times
    if count < 1:
        raise ValueError(f"{name}: times must be at least 1, got {count}")
    if not shift > 0.0:
        raise ValueError(f"{name}: shift must be positive, got {shift}")
    return count


def renoise_at(
    t: Tree, leaves: Ints, times: Sequence[NDArray[np.float64]], *, updates: int = 1
) -> None:
    """Grows one trained re-noised state per leaf and array of times, each with its own noise.

    Args:
        t: the tree.
        leaves: (L,) images at sigma 0.
        times: (L,) noise levels in (0, 1], one array per training time.
        updates: optimizer updates that the images are dealt to, in equal consecutive parts.
    """
    update = np.arange(len(leaves)) * updates // len(leaves)
    for levels in times:
        t.grow(leaves, levels, renoise, train=True, update=update)


def logit_normal(rng: np.random.Generator, count: int, shift: float) -> NDArray[np.float64]:
    """Draws (count,) times sigmoid(z), z standard normal, shifted by `k t / (1 + (k - 1) t)`.

    Source: Stable Diffusion 3, arXiv 2403.03206; Flow-DPO and Flow-RWR train at these.
    """
    t = 1.0 / (1.0 + np.exp(-rng.standard_normal(count)))
    return shift * t / (1.0 + (shift - 1.0) * t)
