"""Scores in a thread of its own, while the caller does other work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from threading import Lock
from types import TracebackType

from torch import Tensor

from branchcore.rewards import waiting
from branchcore.rewards.scores import Reward, Scores, score


class OneAtATime:
    """A reward that two threads may call: the second waits for the first.

    Args:
        reward: the user's callable.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward, self._lock = reward, Lock()

    def __call__(self, images: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        """Returns what the reward does."""
        with self._lock:
            return self._reward(images, prompts)


class Scoring:
    """Scores on their way; leaving its block waits for the thread, whatever happened there.

    Left by an exception, the block ends what can be ended first: pauses and further tries of a
    `Retrying`, calls that it times, workers.
    """

    def __init__(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="branchcore-reward")
        self._executor.submit(waiting.same_gpu())
        self._scope = waiting.Scope()
        work = partial(score, reward, images, prompts)
        self._future = self._executor.submit(self._scope.run, work)

    def result(self) -> Scores:
        """Waits for the thread to end and returns what `score` does, or raises what it raises."""
        self._wait()
        return self._future.result()

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._scope.end()
        self._wait()

    def _wait(self) -> None:
        # a signal that ends the join of a thread makes Python take that thread for ended
        wait([self._future])
        self._executor.shutdown()


def score_async(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scoring:
    """Starts `score(reward, images, prompts)`; the same scores come from `.result()`.

    A reward is not called by two threads at once as long as the caller takes one result before it
    starts the next scoring. Work of a scorer on the model's own GPU shares its queue with the
    model's: what is gained there is the host's part; put the scorer on another device for all.

    Args:
        reward: the user's callable.
        images: (L, ...) decoded leaves; not to be changed before the result is taken.
        prompts: (L,) prompt of every image.
    """
    return Scoring(reward, images, prompts)
