"""The processes of a run: who this one is, what they share out, sum up and agree on.

torchrun starts them and names them in the environment; `torch.distributed` carries everything. One
process needs no process group and communicates nothing. Whatever depends on the number of
processes is here and in `parallel`; noise, trees and coins never do.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from branchcore.credit import Floats
from branchcore.heartbeat import Heartbeat
from branchcore.meeting import meet

T = TypeVar("T")
TIMEOUT_S = 600.0
"""Seconds that a process waits for the others; a slow reward must fit in."""


class RankError(RuntimeError):
    """Another process failed with an error that is no built-in one, or is gone."""


class Ranks:
    """The processes of `torch.distributed`'s default group, or this one alone.

    Every method but `share` is a collective: all processes call it, in the same order.

    Args:
        heartbeat: tells who is gone when a collective fails.
        timeout_s: seconds that a collective waits for the others.
    """

    def __init__(self, heartbeat: Heartbeat | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if many else 0
        self.world_size = dist.get_world_size() if many else 1
        self._heartbeat = heartbeat

    @property
    def alone(self) -> bool:
        """There is one process."""
        return self.world_size == 1

    @property
    def main(self) -> bool:
        """This process writes what is written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> tuple[T, ...]:
        """Returns this process's part of what all processes have: contiguous, even up to one.

        Where there are fewer items than processes, some get none.
        """
        lo, hi = (len(items) * (self.rank + i) // self.world_size for i in (0, 1))
        return tuple(items[lo:hi])

    def sum(self, values: Floats) -> Floats:
        """Returns the sum over all processes of a float64 array of one shape."""
        total = torch.from_numpy(np.array(values, dtype=np.float64))
        self.collect(partial(dist.all_reduce, total))
        return total.numpy()

    def stack(self, values: Floats) -> Floats:
        """Returns (world_size, n) everybody's float64 (n,), by rank."""
        mine = torch.from_numpy(np.array(values, dtype=np.float64))
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        rows[self.rank] = mine
        self.collect(partial(dist.all_gather, rows, mine))
        return torch.stack(rows).numpy()

    def most(self, values: Sequence[int]) -> list[int]:
        """Returns the largest of each number over all processes."""
        most = torch.tensor(list(values), dtype=torch.int64)
        self.collect(partial(dist.all_reduce, most, op=dist.ReduceOp.MAX))
        return cast("list[int]", most.tolist())

    def gather(self, value: T) -> list[T]:
        """Returns everybody's value, by rank; small things only."""
        found: list[Any] = [value] * self.world_size
        self.collect(partial(dist.all_gather_object, found, value))
        return found

    def first(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the names of the first process that has any: some have none to go by."""
        return next((tuple(found) for found in self.gather(names) if found), ())

    def agree(self, error: Exception | None) -> None:
        """Raises on every process what was raised on one; returns where none was.

        Args:
            error: what this process caught, None if nothing.

        Raises:
            Exception: of the type of the first process's that failed if that is a built-in one or
                `agreed`, else `RankError`; the message names the rank, and how many others failed.
        """
        if self.alone:
            if error is not None:
                raise error
            return
        mine = None if error is None else (type(error).__name__, str(error))
        found = self.gather(mine)
        failed = [rank for rank, theirs in enumerate(found) if theirs is not None]
        if failed:
            name, text = cast("tuple[str, str]", found[failed[0]])
            more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            everywhere = _error_of(name)(f"rank {failed[0]}: {text}{more}")
            vars(everywhere)[_EVERYWHERE] = True
            raise everywhere from error

    def together(self, stage: Callable[[], T]) -> T:
        """Runs a stage of every process and returns its result; what one raises, all raise."""
        error, result = None, None
        try:
            result = stage()
        except Exception as found:
            error = found
        self.agree(error)
        return result  # pyright: ignore[reportReturnType]

    def collect(self, collective: Callable[[], object]) -> None:
        """Runs a collective; says who is missing when it fails.

        Raises:
            RankError: another process is gone or does not answer.
        """
        if self.alone:
            return
        with self.collecting(f"all {self.world_size} processes must take part"):
            collective()

    @contextmanager
    def collecting(self, rule: str = "") -> Generator[None]:
        """A block with collectives of torch's own, calls of sharded models, say.

        Args:
            rule: every RuntimeError in the block is a failed collective; "" = only those for which
                another process went or is gone.

        Raises:
            RankError: another process is gone or does not answer.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            cause = None if self.alone or was_agreed(error) else self._cause()
            if isinstance(error, RankError) or not (cause or rule):
                raise
            text = cause or f"Ranks: {rule}, but a rank does not answer"
            line = str(error).splitlines()[0]
            raise RankError(f"{text}; continue with --resume auto ({line})") from error

    def _cause(self) -> str:
        """Returns why another process went, or who is gone; empty if all are there."""
        if self._heartbeat is None:
            return ""
        if self._heartbeat.left is not None:
            return "rank {}: {}".format(*self._heartbeat.left)
        gone = self._heartbeat.gone()
        who = f"rank {', '.join(map(str, gone))} is gone"
        return f"Ranks: all {self.world_size} processes must take part, but {who}" if gone else ""


_EVERYWHERE = "raised_on_every_process"
_AGREED: dict[str, type[Exception]] = {}
E = TypeVar("E", bound=type[Exception])


def was_agreed(error: Exception) -> bool:
    """Tells whether all processes raise this error already."""
    return _EVERYWHERE in vars(error)


def agreed(kind: E) -> E:
    """Makes an exception, which takes one text, one that `Ranks.agree` raises everywhere."""
    _AGREED[kind.__name__] = kind
    return kind


def _error_of(name: str) -> type[Exception]:
    """The agreed or built-in exception of a name, `RankError` for others."""
    found = _AGREED.get(name) or getattr(builtins, name, None)
    if not (isinstance(found, type) and issubclass(found, Exception)) or "Unicode" in name:
        return RankError
    return found


@contextmanager
def joined(device: str | None = None, timeout_s: float = TIMEOUT_S) -> Generator[Ranks]:
    """Joins the processes that torchrun started, for the time of the block; alone without it.

    CPU tensors go over gloo, CUDA tensors over NCCL; every process gets the GPU of its local rank.

    Args:
        device: "cuda" or "cpu"; None = "cuda" if there are GPUs.
        timeout_s: seconds that a collective waits for the others.

    Raises:
        ValueError: timeout not positive.
        TimeoutError: not all processes started.
        RuntimeError: fewer GPUs than processes on this machine.
    """
    if not timeout_s > 0.0:
        raise ValueError(f"joined: timeout_s must be positive, got {timeout_s}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RuntimeError(
                f"joined: every process must have a GPU of its own, got local rank {local} and "
                f"{torch.cuda.device_count()} GPUs; try --nproc-per-node or --device cpu"
            )
        chosen = torch.device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    store, rank, world_size = next(iter(rendezvous("env://")))
    limit = timedelta(seconds=timeout_s)
    store = PrefixStore(meet(store, rank, world_size, timeout_s), store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("branchcore", store), rank=rank, world_size=world_size,
        timeout=limit,
    )  # fmt: skip
    heartbeat = Heartbeat(PrefixStore("alive", store), rank, world_size)
    heartbeat.start()
    goes = False
    try:
        yield Ranks(heartbeat, timeout_s)
    except Exception as error:
        goes = not (was_agreed(error) or isinstance(error, RankError))
        if goes:
            heartbeat.announce(f"{type(error).__name__}: {error}")
        raise
    finally:
        if goes:
            heartbeat.wait_until_heard()
        heartbeat.stop()
        dist.destroy_process_group()
