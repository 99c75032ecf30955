"""The live view of a run: a thread that draws what rows said and what runs now."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import TextIO

from branchcore.live_view.panel import Now, lines
from branchcore.live_view.screen import Screen, everything_above
from branchcore.live_view.seen import Row, Seen
from branchcore.progress import Shown

EVERY_S = 0.2
"""Seconds between two pictures."""


class LiveView:
    """Holds a view of the run at the bottom of the terminal; the last one stays there.

    Args:
        shown: what is known of the run.
        stream: the terminal; None = stderr.
    """

    def __init__(self, shown: Shown, stream: TextIO | None = None) -> None:
        self.shown, self.seen = shown, Seen(shown.evaluate_every)
        self.seen.replay(shown.rows)
        self._screen = Screen(sys.stderr if stream is None else stream)
        self._blocks = ExitStack()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._go_on, name="live view", daemon=True)
        self._stage, self._since, self._tick = "", 0.0, 0

    def __enter__(self) -> LiveView:
        self._blocks.enter_context(everything_above(self._screen))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        with self._blocks:  # back to the plain streams, whatever happens
            self._draw(_ending(kind))

    def row(self, metrics: Row) -> None:
        """Takes a row; it is drawn with the next picture."""
        with self._lock:
            self.seen.add(metrics)

    def _go_on(self) -> None:
        self._draw()
        while not self._done.wait(EVERY_S):
            self._draw()

    def _draw(self, ended: str = "") -> None:
        stage, moment = self.shown.stage(), time.monotonic()
        if stage != self._stage:
            self._stage, self._since = stage, moment
        now = Now(stage, moment - self._since, self._tick, ended)
        self._tick += 1
        width, height = self._screen.size
        with self._lock:
            picture = lines(self.shown, self.seen, now, width, None if ended else height)
        self._screen.draw(picture)


def _ending(kind: type[BaseException] | None) -> str:
    """Returns how a run has ended, in words."""
    if kind is None:
        return "finished"
    known = {"KeyboardInterrupt": "stopped by Ctrl-C", "Preempted": "stopped by SIGTERM"}
    return known.get(kind.__name__, f"ended by {kind.__name__}")
