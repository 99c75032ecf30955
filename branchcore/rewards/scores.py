"""Calls a reward and refuses what it must not return: wrong counts, NaN, Inf, missing components.

A reward is `reward(images, prompts) -> {component: (L,) tensor}`; any failure stops the iteration
before it changes a weight. Letters: L leaves, R components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore.credit import Floats

Reward = Callable[[Tensor, list[str]], Mapping[str, Tensor]]


class Scores(NamedTuple):
    """Rewards of all leaves, in the order of the plan's leaves."""

    names: tuple[str, ...]
    values: Floats
    """(L, R) float64."""


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scores:
    """Scores images, each with its prompt.

    Args:
        reward: the user's callable.
        images: (L, ...) decoded leaves.
        prompts: (L,) prompt of every image.

    Returns:
        Scores; components sorted as the reward returned them.

    Raises:
        RuntimeError: the reward raised; its exception is the cause.
        ValueError, TypeError: it returned something else than {name: (L,) finite floats}.
    """
    try:
        with torch.no_grad():
            result = reward(images, list(prompts))
    except Exception as error:
        raise RuntimeError(
            f"reward: must score {len(images)} images, raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, Mapping) or not result:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"reward: result must be a mapping of component names to tensors, "
            f"got {type(result).__name__}"
        )
    columns: list[Floats] = []
    for name, value in result.items():
        column = torch.as_tensor(value).detach().double().cpu()
        if tuple(column.shape) != (len(images),):
            raise ValueError(
                f"reward: {name} must be ({len(images)},), one per image, got {tuple(column.shape)}"
            )
        finite = torch.isfinite(column)
        if not bool(finite.all()):
            i = int((~finite).nonzero()[0])
            raise ValueError(
                f"reward: {name} must be finite, got {column[i].item()} for image {i} "
                f"({prompts[i]!r}) and {int((~finite).sum()) - 1} more"
            )
        columns.append(column.numpy())
    return Scores(tuple(result), np.stack(columns, axis=1))


def component_weights(names: Sequence[str], weights: Mapping[str, float] | None) -> Floats:
    """Returns (R,) weights in the order of the components; None = 1 each.

    Raises:
        ValueError: a weight is missing, negative or for an unknown component.
    """
    if weights is None:
        return np.ones(len(names))
    if set(weights) != set(names):
        raise ValueError(
            f"reward: weights must name the components {sorted(names)}, got {sorted(weights)}"
        )
    values = np.array([float(weights[name]) for name in names])
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(f"reward: weights must be >= 0 and not all 0, got {dict(weights)}")
    return values
