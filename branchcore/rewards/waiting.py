"""Waiting that can be ended: by a time limit, or by whoever no longer wants the answer.

A `Scope` is what a thread waits in. Its owner ends it from another thread: pauses in it are over at
once, and what a blocked call has registered (kill the worker, hang up) is done. T what work gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Lock, Thread
from typing import TypeVar

import torch

T = TypeVar("T")
_GRACE_S = 1.0


class Cancelled(BaseException):
    """Nobody waits for this any more; no failure, so that nothing that catches those sees it."""


class Scope:
    """What happens in it can be ended from outside."""

    def __init__(self) -> None:
        self.ended = Event()
        self._lock = Lock()
        self._ends: list[Callable[[], object]] = []

    def run(self, work: Callable[[], T]) -> T:
        """Calls work, in this thread and scope."""
        token = _current.set(self)
        try:
            return work()
        finally:
            _current.reset(token)

    def end(self) -> bool:
        """Ends it; returns whether a blocked call was there and told."""
        with self._lock:
            self.ended.set()
            for end in self._ends:
                end()
            return bool(self._ends)

    @contextmanager
    def holding(self, end: Callable[[], object]) -> Generator[None]:
        """Registers what ends the call in this block, which must not block itself."""
        with self._lock:
            if self.ended.is_set():
                raise Cancelled
            self._ends.append(end)
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)


_current: ContextVar[Scope | None] = ContextVar("branchcore_waiting", default=None)


@contextmanager
def ended_by(end: Callable[[], object]) -> Generator[None]:
    """Lets the scope that this thread is in, if any, end what blocks in this block.

    Args:
        end: called from another thread; makes the blocked call return or raise.

    Raises:
        Cancelled: the scope has ended before.
    """
    scope = _current.get()
    if scope is None:
        yield
        return
    with scope.holding(end):
        yield


def check() -> None:
    """Raises Cancelled if nobody waits for this thread any more."""
    scope = _current.get()
    if scope is not None and scope.ended.is_set():
        raise Cancelled


def pause(seconds: float) -> None:
    """Sleeps, unless nobody waits any more.

    Raises:
        Cancelled: the scope of this thread has ended.
    """
    scope = _current.get()
    if scope is None:
        time.sleep(max(0.0, seconds))
    elif scope.ended.wait(max(0.0, seconds)):
        raise Cancelled


def in_thread(work: Callable[[], T], timeout_s: float) -> T:
    """Calls work in a thread and waits for it only so long.

    Work that is late is ended where it registered how (`ended_by`). Other work cannot be: its
    thread is left alone, goes on until it is through or the interpreter exits, and its result is
    dropped.

    Args:
        work: called once; in a scope of its own, on the GPU that is current here.
        timeout_s: for all of it.

    Raises:
        TimeoutError: it is late.
        Cancelled: nobody waits for this thread any more.
        BaseException: what work raised.
    """
    scope, done, here = Scope(), Event(), same_gpu()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            here()
            results.append(scope.run(work))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = Thread(target=run, name="branchcore-reward-call", daemon=True)
    try:
        with ended_by(done.set):
            thread.start()
            done.wait(timeout_s)
    finally:
        through = bool(results or errors)
        if through or scope.end():
            thread.join(_GRACE_S)
    check()
    if not through:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if errors:
        raise errors.pop()
    return results.pop()


def same_gpu() -> Callable[[], None]:
    """Returns what a new thread is to call first: it starts on the first GPU, whatever is current.

    Without a GPU in use it does nothing.
    """
    if not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
