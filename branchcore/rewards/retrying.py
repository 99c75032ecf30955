"""Rewards that fail: tried again, then the leaves that fail are found and masked, then an error.

Letters: N images, R components.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.credit import Floats
from branchcore.rewards import waiting
from branchcore.rewards.combined import Rewards
from branchcore.rewards.failures import NoRetry, RetryLater, RewardFailure, failure, told
from branchcore.rewards.scores import Partial, Reward, columns_of, not_finite
from branchcore.trainer_config import TrainerConfig

_log = logging.getLogger("branchcore")
_LONGEST_PAUSE_S = 60.0
_LONGEST_WAIT_S = 300.0


@runtime_checkable
class Timed(Protocol):
    """A reward that ends a call itself when it is late, and is as good as new then."""

    def within(self, images: Tensor, prompts: list[str], timeout_s: float) -> Mapping[str, Tensor]:
        """Scores, within its own limit and this one; see `Reward`."""
        ...


class _Answer(NamedTuple):
    """What became of one call."""

    result: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    good: NDArray[np.bool_]
    """(n,) images with finite scores."""
    error: Exception | None


class Retrying:
    """Calls a reward again when it fails, and masks leaves that fail whatever is tried.

    A call fails if the reward raises, is late, or returns NaN or Inf. An answer of the wrong shape
    or type is a fault of the program: it is raised at once, and so is `NoRetry`. Where leaves may
    be masked, a batch that failed every time is split, and what fails of it split again, each part
    tried once without a pause, until single leaves fail: at most 2 log2 N calls for each, rounded
    up. As soon as more parts have failed than leaves may be masked it is an error, so that a reward
    that is down costs few calls. A batch that succeeds is passed on as it is; after a split, scores
    are those of smaller batches, which may be rounded differently. Nothing is replaced by a zero.

    A late call of a `SubprocessReward` or `HttpReward` is ended: the worker is killed and started
    again, the connection closed. A function of this process cannot be ended: its thread is left
    alone and may still be inside the reward when the next try calls it. Rewards that cannot stand
    that belong in a `SubprocessReward`, or get no time limit.

    Args:
        reward: the user's callable; of a `Rewards`, wrap the parts, see `patient`.
        attempts: calls of a whole batch.
        backoff_s: pause before the second; each further one is twice as long, to 60 s at most, and
            shortened at random by up to a half. A scorer that names a time (HTTP Retry-After) gets
            it, up to 5 minutes.
        timeout_s: for one call, the start of a new worker not counted; None = no limit here.
        max_failed_share: of the leaves of a call, in [0, 1), that may be masked, rounded up, but
            never all; 0 = any failure is an error.
        name: names the reward in errors.
        seed: of the pauses; processes that share a scorer should differ in it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        attempts: int = 3,
        backoff_s: float = 1.0,
        timeout_s: float | None = None,
        max_failed_share: float = 0.0,
        name: str = "reward",
        seed: int = 0,
    ) -> None:
        if attempts < 1 or not 0.0 <= backoff_s < math.inf:
            raise ValueError(
                "Retrying: attempts must be at least 1 and backoff_s finite and >= 0, got "
                f"{attempts}, {backoff_s}"
            )
        if timeout_s is not None and not 0.0 < timeout_s < math.inf:
            raise ValueError(
                f"Retrying: timeout_s must be positive and finite, got {timeout_s}; None = no limit"
            )
        if not 0.0 <= max_failed_share < 1.0:
            raise ValueError(
                f"Retrying: max_failed_share must be in [0, 1), got {max_failed_share}"
            )
        self.reward, self.name = reward, name
        self.attempts, self.backoff_s, self.timeout_s = attempts, backoff_s, timeout_s
        self.max_failed_share = max_failed_share
        key = [seed, zlib.crc32(name.encode())]
        self._random = np.random.Generator(np.random.Philox(key=key))
        self._free_at = 0.0

    def __call__(self, images: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        """Returns what the reward does, or a `Partial` of its components with masked leaves.

        Raises:
            RewardFailure: it failed for more leaves than may be masked; the last error is the
                cause.
            ValueError, TypeError: it returned something else than {name: (N,) finite floats}.
            Cancelled: nobody waits for the scores any more.
        """
        answer = self._once(images, prompts)
        for failures in range(1, self.attempts):
            if answer.error is None:
                break
            seconds = self._pause_s(failures)
            text = f"try {failures} of {self.attempts} failed: {told(answer.error)}"
            _log.warning("%s: %s; again in %.1f s", self.name, text, seconds)
            waiting.pause(seconds)
            answer = self._once(images, prompts)
        if answer.error is None:
            return answer.result
        # at least one leaf must be scored: without any, nothing names the components
        allowed = min(math.ceil(self.max_failed_share * len(images)), len(images) - 1)
        if allowed > 0:
            return self._split(images, prompts, answer, allowed)
        if isinstance(answer.error, NoRetry):
            raise answer.error
        raise failure(self.name, len(images), answer.error, self.attempts) from answer.error

    def _pause_s(self, failures: int) -> float:
        longest = min(self.backoff_s * 2.0 ** min(failures - 1, 60), _LONGEST_PAUSE_S)
        return longest * (1.0 - 0.5 * float(self._random.random()))

    def _once(self, images: Tensor, prompts: list[str]) -> _Answer:
        """Calls the reward once; its failure is part of the answer."""
        waiting.pause(self._free_at - time.monotonic())
        try:
            result = self._called(images, list(prompts))
        except NoRetry:
            raise
        except Exception as error:
            waiting.check()
            if isinstance(error, RetryLater):
                self._free_at = time.monotonic() + min(error.after_s, _LONGEST_WAIT_S)
            return _Answer({}, {}, np.zeros(len(images), dtype=bool), error)
        columns = columns_of(result, len(images), self.name)
        values = np.stack([column.numpy() for column in columns.values()], axis=1)
        good = np.logical_and.reduce(np.isfinite(values), axis=1)
        return _Answer(result, columns, good, not_finite(columns, prompts, where=self.name))

    def _called(self, images: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        def work() -> Mapping[str, Tensor]:
            with torch.no_grad():
                return self.reward(images, prompts)

        if self.timeout_s is None:
            return work()
        if isinstance(self.reward, Timed):
            with torch.no_grad():
                return self.reward.within(images, prompts, self.timeout_s)
        return waiting.in_thread(work, self.timeout_s)

    def _split(
        self, images: Tensor, prompts: list[str], whole: _Answer, allowed: int
    ) -> Mapping[str, Tensor]:
        """Scores what can be scored, part by part; see the class.

        `suspects` are disjoint sets of leaves that failed together: each has one that fails.
        """
        found = _Found(self.name, len(images))
        suspects = found.add(np.arange(len(images)), whole)
        last = whole.error
        while suspects:
            rows = suspects.pop(0)
            for part in np.array_split(rows, min(2, len(rows))):
                index = torch.from_numpy(part).to(images.device)
                answer = self._once(images[index], [prompts[i] for i in part])
                last = answer.error or last
                suspects += found.add(part, answer)
                if (least := len(suspects) + int(found.masked.sum())) > allowed:
                    raise self._too_many(len(images), least, allowed, last) from last
        if not found.masked.any() or last is None:
            return found.scores()
        text = f"masked {int(found.masked.sum())} of {len(images)} leaves, the last because of"
        _log.warning("%s: %s %s", self.name, text, told(last))
        return Partial(found.scores(), found.masked, told(last, self.name))

    def _too_many(
        self, count: int, least: int, allowed: int, last: Exception | None
    ) -> RewardFailure:
        assert last is not None
        return RewardFailure(
            f"{self.name}: must fail for at most {allowed} of {count} images, got at least {least}"
            f" that fail (tries of all: {self.attempts}), the last with {told(last)}; try a larger "
            f"max_failed_share than {self.max_failed_share:g}"
        )


class _Found:
    """Scores of a batch while its parts come in."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.columns: dict[str, Floats] = {}
        self.masked = np.zeros(count, dtype=bool)

    def scores(self) -> dict[str, Tensor]:
        """Returns the columns as a reward does, NaN where masked."""
        return {name: torch.from_numpy(column) for name, column in self.columns.items()}

    def add(self, rows: NDArray[np.int64], answer: _Answer) -> list[NDArray[np.int64]]:
        """Takes the good scores of a part; masks it if it is a leaf alone, or returns the rest."""
        if answer.columns and self.columns and set(answer.columns) != set(self.columns):
            raise NoRetry(
                f"{self.name}: components must be {sorted(self.columns)} for every part of a "
                f"batch, got {sorted(answer.columns)}"
            )
        for name, column in answer.columns.items():
            whole = self.columns.setdefault(name, np.full(len(self.masked), np.nan))
            whole[rows[answer.good]] = column.numpy()[answer.good]
        bad = rows[~answer.good]
        if len(rows) == 1:
            self.masked[bad] = True
            return []
        return [bad] if len(bad) else []


def patient(reward: Reward, config: TrainerConfig, *, rank: int = 0) -> Reward:
    """Makes a reward retry as a run is configured; the parts of a `Rewards` each for itself.

    Args:
        reward: the user's callable; a `Retrying` stays as it is.
        config: `reward_attempts`, `reward_timeout`, `reward_max_failed`.
        rank: of this process, so that pauses differ between ranks.
    """

    def wrapped(part: Reward, name: str) -> Reward:
        if isinstance(part, Retrying):
            return part
        return Retrying(
            part,
            attempts=config.reward_attempts,
            timeout_s=config.reward_timeout,
            max_failed_share=config.reward_max_failed,
            name=name,
            seed=rank,
        )

    if not isinstance(reward, Rewards):
        return wrapped(reward, "reward")
    return Rewards({name: wrapped(part, f"reward {name}") for name, part in reward.rewards.items()})
