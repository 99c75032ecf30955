"""SIGTERM: the scheduler wants the machine back; what is finished is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from branchcore.distributed import agreed


@agreed
class Preempted(Exception):
    """An iteration was given up before it changed a weight."""


class Preemption:
    """Listens for SIGTERM; the run asks where it may stop."""

    def __init__(self) -> None:
        self.asked = False
        """SIGTERM has come."""

    @contextmanager
    def listening(self) -> Generator[None]:
        """A block in which SIGTERM only leaves a note; elsewhere than in the main thread, none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True

    def check(self) -> None:
        """Raises Preempted if SIGTERM has come."""
        if self.asked:
            raise Preempted("SIGTERM: the run ends with a checkpoint of its last iteration")
