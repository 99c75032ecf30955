"""Lines that stay at the bottom of a terminal, while whatever else is printed goes above them.

The cursor rests, visible, below the lines: a process that is killed leaves a sane terminal. Every
picture is one write. Python's stdout and stderr, and the handlers of `logging` that write there, go
through `Above` meanwhile; what other processes and C libraries write to the terminal themselves
stands below the lines, and the next picture is drawn after it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Span, Text

_Line = tuple[str, str, tuple[Span, ...]]
_UP, _TO_LINE_END, _TO_END = "\x1b[{}A", "\x1b[K", "\x1b[J"


class Screen:
    """Draws lines over the ones before them.

    Args:
        stream: a terminal.
        console: renders for it; None = as the terminal and the environment say.
    """

    def __init__(self, stream: TextIO, console: Console | None = None) -> None:
        self._stream = stream
        self._console = console or Console(file=io.StringIO(), force_terminal=True, highlight=False)
        self._lock = threading.RLock()
        self._widths: list[int] = []
        """Of the lines that stand there."""
        self._drawn = ""
        self._known: dict[_Line, str] = {}
        """The lines of the last picture, rendered: most of them stay."""
        self._gone = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows for lines now: the last of each is left free."""
        width, height = self._console.size
        return max(width - 1, 1), max(height - 1, 1)

    def draw(self, lines: Sequence[Text]) -> None:
        """Draws lines where the last ones are."""
        with self._lock:
            keys = [(line.plain, str(line.style), tuple(line.spans)) for line in lines]
            rendered = [
                self._known.get(key) or self._ansi(line)
                for key, line in zip(keys, lines, strict=True)
            ]
            self._known = dict(zip(keys, rendered, strict=True))
            text = "".join(f"{line}{_TO_LINE_END}\n" for line in rendered)
            self._write(self._home() + text + _TO_END)
            self._drawn, self._widths = text, [line.cell_len for line in lines]

    def above(self, text: str) -> None:
        """Prints whole lines above."""
        with self._lock:
            self._write(self._home() + _TO_END + text + self._drawn)

    def _home(self) -> str:
        """Returns how the cursor gets to the first line: a narrower terminal has broken them up."""
        width = self._console.size.width
        rows = sum(max(1, -(-cells // width)) for cells in self._widths)
        return "\r" + (_UP.format(rows) if rows else "")

    def _ansi(self, line: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(line, end="", soft_wrap=True)
        return captured.get()

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal was closed; a run outlives it
            self._gone = True


class Above(io.TextIOBase):
    """A stream whose lines a screen prints above its own; no terminal to those who ask.

    Args:
        screen: prints.
        stream: what it stands for.
    """

    def __init__(self, screen: Screen, stream: TextIO) -> None:
        self._screen, self._stream = screen, stream
        self._lock = threading.RLock()
        self._partial, self._process = "", os.getpid()
        self.open = True
        """Whether the screen still draws; then it is the stream itself."""

    def write(self, text: str) -> int:
        """Prints the lines that are whole; of a line that was written over, its last state.

        A forked process has the stream itself: there is nobody to draw, and locks may be held.
        """
        if not self.open or os.getpid() != self._process:
            return self._stream.write(text)
        with self._lock:
            *whole, self._partial = (self._partial + text).split("\n")
            again = "\r" * self._partial.endswith("\r")
            self._partial = _last_state(self._partial) + again
        if whole:
            self._screen.above("".join(f"{_last_state(line)}\n" for line in whole))
        return len(text)

    def finish(self) -> None:
        """Prints a line without an end, and is the stream itself from now on."""
        if self._partial:
            self.write("\n")
        self.open = False

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Tells progress bars inside of a run to stay away."""
        return False if self.open else self._stream.isatty()

    def writable(self) -> bool:
        """Tells that text can be written."""
        return True

    def fileno(self) -> int:
        """Returns the stream's, for processes that inherit it."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stream's."""
        return self._stream.encoding

    @property
    def buffer(self) -> Any:
        """The stream's, past the screen."""
        return self._stream.buffer


def _last_state(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


@contextmanager
def everything_above(screen: Screen) -> Generator[None]:
    """A block in which stdout, stderr and the handlers of `logging` print above a screen."""
    before = sys.stdout, sys.stderr
    proxies = [Above(screen, stream) for stream in before]
    sys.stdout, sys.stderr = cast("list[TextIO]", proxies)
    moved = [
        (handler, handler.setStream(cast("TextIO", proxies[before.index(handler.stream)])))
        for handler in _handlers()
        if handler.stream in before
    ]
    try:
        yield
    finally:
        for proxy in proxies:
            proxy.finish()
        for handler, stream in moved:
            handler.setStream(cast("TextIO", stream))
        sys.stdout, sys.stderr = before


def _handlers() -> list[logging.StreamHandler[Any]]:
    """Every handler of every logger that writes to a stream, files left out."""
    root = logging.getLogger()
    named = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    found = {id(h): h for each in (root, *named) for h in each.handlers}
    return [
        handler
        for handler in found.values()
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
    ]
