"""Rounds of an iteration, scored one after the other, in a thread of its own if asked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from branchcore.clock import Clock, untimed
from branchcore.rewards import Reward, Scores, Scoring, score, score_async
from branchcore.stages import Batch, Grown


def score_rounds(
    rounds: Iterable[Grown],
    reward: Reward,
    finish_round: Callable[[Grown, Scores], Batch],
    *,
    overlap: bool,
    clock: Clock = untimed,
) -> Generator[Batch]:
    """Scores rounds one after the other, with the same scores whether overlapped or not.

    Args:
        rounds: grows the next round when asked for it.
        reward: scores all leaves of a round at once; never called twice at a time.
        finish_round: `finish`, with all but its first two arguments.
        overlap: score in a thread, while the next round is grown and the batch of the one before is
            used: two rounds are alive at a time. Close the iterator to wait for that thread.
        clock: times the stage reward, which with overlap is the wait for the thread.

    Raises:
        RuntimeError, ValueError, TypeError: the reward failed; no thread is left.
    """
    if not overlap:
        for grown in rounds:
            with clock("reward"):
                scores = score(*_to_score(reward, grown))
            batch = finish_round(grown, scores)
            del grown  # images are not to live as long as the batch is used
            yield batch
        return
    last: tuple[Grown, Scoring] | None = None
    with ExitStack() as threads:
        for grown in rounds:
            with clock("reward"):
                scores = None if last is None else last[1].result()
            scoring = threads.enter_context(score_async(*_to_score(reward, grown)))
            batch = None if last is None or scores is None else finish_round(last[0], scores)
            last = grown, scoring
            del grown
            if batch is not None:
                yield batch
        if last is not None:
            with clock("reward"):
                scores = last[1].result()
            batch = finish_round(last[0], scores)
            del last
            yield batch


def _to_score(reward: Reward, grown: Grown) -> tuple[Reward, Tensor, list[str]]:
    """Returns what `score` takes; where no branch was left no reward is called."""
    if grown.prompts:
        return reward, grown.images, grown.prompts
    nothing = {name: torch.zeros(0) for name in grown.components}
    return lambda _images, _prompts: nothing, grown.images, grown.prompts
