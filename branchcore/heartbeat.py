"""Who is still there: every process leaves a sign of life in the common store, every second."""

from __future__ import annotations

import threading
import time
from typing import Any

EVERY_S = 1.0
SILENT_S = 5.0
"""Seconds without a sign after which a process is called gone."""


class Heartbeat:
    """A thread that counts up this process's entry of a store.

    Clocks of different machines are not compared: a process is gone if its count stands still.

    Args:
        store: of `torch.distributed`, reachable for all; used by this thread and by `gone`.
        rank: of this process.
        world_size: processes.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self.left: tuple[int, str] | None = None
        """The first rank that went for a reason, and the reason."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Starts the thread; the entry is there when this returns."""
        self._store.add(str(self._rank), 1)
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread."""
        self._done.set()
        self._thread.join()

    def announce(self, text: str) -> None:
        """Leaves the reason for which this process goes; the first one counts."""
        try:
            if self._store.add("leaving", 1) == 1:
                self._store.set("reason", f"{self._rank} {text}")
        except RuntimeError:  # the store is gone, and everybody with it
            return

    def wait_until_heard(self, within_s: float = SILENT_S) -> None:
        """Waits until all have read why this process goes: the store may go with it."""
        end = time.monotonic() + within_s
        try:
            while time.monotonic() < end and self._store.add("heard", 0) < self._world_size:
                time.sleep(EVERY_S / 20)
        except RuntimeError:
            return

    def _beat(self) -> None:
        while not self._done.wait(EVERY_S):
            try:
                self._store.add(str(self._rank), 1)
                if self.left is None and self._store.add("leaving", 0):
                    rank, _, text = self._store.get("reason").decode().partition(" ")
                    self.left = int(rank), text
                    self._store.add("heard", 1)
            except RuntimeError:  # the store's host is gone, and this process's collectives fail
                return

    def gone(self, within_s: float = SILENT_S) -> list[int]:
        """Returns the ranks that give no sign of life for so many seconds; waits that long.

        Everybody is called gone if the store itself does not answer.
        """
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            before = {rank: self._store.add(str(rank), 0) for rank in others}
            silent, end = set(others), time.monotonic() + within_s
            while silent and time.monotonic() < end:
                time.sleep(EVERY_S / 4)
                silent = {rank for rank in silent if self._store.add(str(rank), 0) == before[rank]}
        except RuntimeError:
            return others
        return sorted(silent)
