"""Calls a reward and refuses what it must not return: wrong counts, NaN, Inf, missing components.

A reward is `reward(images, prompts) -> {component: (L,) tensor}`; any failure stops the iteration
before it changes a weight, unless `Retrying` may mask the leaf. Letters: L leaves, R components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.credit import Floats
from branchcore.rewards.failures import NoMapping, NoRetry, RewardFailure, failure

Reward = Callable[[Tensor, list[str]], Mapping[str, Tensor]]


class Partial(dict[str, Tensor]):
    """What a reward returns that could not score every leaf: `Retrying` makes it.

    Args:
        columns: (L,) scores of every component, anything where masked.
        masked: (L,) leaves without scores.
        because: what failed last.
    """

    def __init__(
        self, columns: Mapping[str, Tensor], masked: NDArray[np.bool_], because: str
    ) -> None:
        super().__init__(columns)
        self.masked = masked
        self.because = because


class Scores(NamedTuple):
    """Rewards of all leaves, in the order of the plan's leaves."""

    names: tuple[str, ...]
    values: Floats
    """(L, R) float64; NaN in the rows of masked leaves."""
    masked: NDArray[np.bool_] | None = None
    """(L,) leaves that could not be scored; None = all were."""
    because: str = ""
    """What failed last where leaves are masked."""

    def among(self, scored: NDArray[np.bool_]) -> Scores:
        """Returns the scores of more leaves, NaN for those that were not to be scored.

        Args:
            scored: (more,) with as many True as there are leaves here.
        """
        values = np.full((len(scored), len(self.names)), np.nan)
        values[scored] = self.values
        if self.masked is None:
            return self._replace(values=values)
        masked = np.zeros(len(scored), dtype=bool)
        masked[scored] = self.masked
        return self._replace(values=values, masked=masked)


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scores:
    """Scores images, each with its prompt.

    >>> import torch
    >>> from branchcore.rewards import score
    >>> images, prompts = torch.tensor([[0.5, 0.25], [1.0, 0.0]]), ["a cat", "a dog"]
    >>> def reward(images, prompts):
    ...     return {"bright": images.mean(1), "short": torch.tensor([-len(x) for x in prompts])}
    >>> score(reward, images, prompts).names
    ('bright', 'short')
    >>> score(reward, images, prompts).values.tolist()
    [[0.375, -5.0], [0.5, -5.0]]

    Args:
        reward: the user's callable.
        images: (L, ...) decoded leaves.
        prompts: (L,) prompt of every image.

    Returns:
        Scores; components sorted as the reward returned them.

    Raises:
        RuntimeError: the reward raised; its exception is the cause.
        ValueError, TypeError: it returned something else than {name: (L,) finite floats}; only
            `Retrying` may leave some out.
    """
    try:
        with torch.no_grad():
            result = reward(images, list(prompts))
    except (RewardFailure, NoRetry):
        raise
    except Exception as error:
        raise failure("reward", len(images), error) from error
    columns = columns_of(result, len(images))
    partial = result if isinstance(result, Partial) else None
    bad = not_finite(columns, prompts, None if partial is None else partial.masked)
    if bad is not None:
        raise bad
    values = np.stack([column.numpy() for column in columns.values()], axis=1)
    if partial is None:
        return Scores(tuple(columns), values)
    values[partial.masked] = np.nan
    return Scores(tuple(columns), values, partial.masked, partial.because)


def columns_of(
    result: Mapping[str, Tensor], count: int, where: str = "reward"
) -> dict[str, Tensor]:
    """Returns what a reward returned as (count,) float64 columns on the CPU.

    Raises:
        NoRetry: it is something else than {name: (count,) floats}; a TypeError if it is no mapping.
    """
    if not isinstance(result, Mapping) or not result:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NoMapping(
            f"{where}: result must be a mapping of component names to tensors, "
            f"got {type(result).__name__}"
        )
    columns: dict[str, Tensor] = {}
    for name, value in result.items():
        column = torch.as_tensor(value).detach().double().cpu()
        if tuple(column.shape) != (count,):
            raise NoRetry(
                f"{where}: {name} must be ({count},), one per image, got {tuple(column.shape)}"
            )
        columns[name] = column
    return columns


def not_finite(
    columns: Mapping[str, Tensor],
    prompts: Sequence[str],
    masked: NDArray[np.bool_] | None = None,
    where: str = "reward",
) -> NoRetry | None:
    """Returns the error that the first score which is NaN or Inf makes, None if there is none.

    Args:
        columns: (L,) scores of every component.
        prompts: (L,) texts.
        masked: (L,) leaves that are not looked at.
        where: names the reward.
    """
    for name, column in columns.items():
        bad = ~np.isfinite(column.numpy())
        if masked is not None:
            bad &= ~masked
        if bad.any():
            i = int(np.argmax(bad))
            return NoRetry(
                f"{where}: {name} must be finite, got {column[i].item()} for image {i} "
                f"({prompts[i]!r}) and {int(bad.sum()) - 1} more"
            )
    return None


def check_masked(
    scores: Iterable[Scores],
    max_failed_share: float,
    total: Callable[[Floats], Floats] = lambda counts: counts,
) -> None:
    """Raises RewardFailure if more than a share of an iteration's leaves is masked.

    Args:
        scores: of all rounds.
        max_failed_share: of their leaves, together.
        total: sums over all processes.
    """
    rounds = list(scores)
    counts = [(len(x.values), 0 if x.masked is None else int(x.masked.sum())) for x in rounds]
    leaves, masked = total(np.array([*counts, (0, 0)], dtype=np.float64).sum(0)).tolist()
    if masked > max_failed_share * leaves:
        last = [x.because for x in rounds if x.because] or ["a failure on another process"]
        raise RewardFailure(
            f"reward: must score all but {max_failed_share:g} of {leaves:g} leaves, masked "
            f"{masked:g}, the last because of {last[-1]}; try a larger reward_max_failed"
        )


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
