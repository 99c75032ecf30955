"""What shows a run while it goes on: a bar, a view of the whole run, or nothing."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from branchcore.metrics import bar_text

Row = Mapping[str, Any]
VIEWS = ("auto", "live", "bar", "none")
_NEEDED = "▁█━─±…⠋"
"""Characters of the live view."""
_log = logging.getLogger("branchcore")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is known of a run before its first row."""

    title: str
    """The recipe, and on what."""
    out: str
    """Folder of the run."""
    begun: int
    """Iterations that are through already."""
    iterations: int
    """In all."""
    checkpoint_every: int
    """Iterations between checkpoints."""
    evaluate_every: int | None
    """Iterations between evaluations; None = there are none."""
    clip: float | None
    """Smaller distance of the clip range, None where no ratio is clipped."""
    stage: Callable[[], str]
    """Returns what runs now, a name from `clock.STAGES`; called from another thread."""
    rows: Sequence[Row] = ()
    """Of a resumed run."""


class Progress(Protocol):
    """Shows a run from its start to its end: a block around it, whose errors it lets through."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def row(self, metrics: Row) -> None:
        """Takes a row of metrics.jsonl: an iteration, or the evaluation before the first one."""
        ...


class Bar:
    """tqdm's bar on stderr, with the last row's rewards, ratio and clipping."""

    def __init__(self, shown: Shown) -> None:
        self._bar = tqdm(initial=shown.begun, total=shown.iterations, unit="it")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def row(self, metrics: Row) -> None:
        """Moves on by an iteration."""
        if metrics["iteration"] == 0:
            self._bar.unpause()  # an evaluation is no iteration's time
            return
        self._bar.set_postfix_str(metrics.get("skipped") or bar_text(metrics), refresh=False)
        self._bar.update()


class Nothing:
    """Shows nothing."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def row(self, metrics: Row) -> None:
        """Takes a row."""


def chosen_view(view: str) -> str:
    """Returns "live", "bar" or "none" for one of `VIEWS`: auto is live in a terminal, else a bar.

    Raises:
        ValueError: no such view.
        RuntimeError: live where there is no terminal for it, or no rich.
    """
    if view not in VIEWS:
        raise ValueError(f"view: must be one of {VIEWS}, got {view!r}")
    if view not in ("auto", "live"):
        return view
    lack = _lack()
    if view == "live" and lack is not None:
        what, fix = lack
        raise RuntimeError(f"view: live must have {what}; try {fix}")
    if view == "auto" and lack is not None and lack[0].startswith("rich"):
        _log.warning("view: a bar, as the live view must have %s; try %s", *lack)
    return "live" if lack is None else "bar"


def _lack() -> tuple[str, str] | None:
    """Returns what a live view lacks here, and what to do about it."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if not stream.isatty():
            return f"a terminal, got {name} that is none", "--view bar"
        try:
            _NEEDED.encode(stream.encoding)
        except UnicodeEncodeError:
            return f"a terminal of UTF-8, got {stream.encoding}", "PYTHONIOENCODING=utf-8"
    if os.environ.get("TERM", "dumb") == "dumb":
        return "a terminal that moves its cursor, got TERM=dumb", "--view bar"
    if importlib.util.find_spec("rich") is None:
        return "rich, got none", "pip install 'branchcore[live]'"
    return None


def progress_of(view: str, shown: Shown) -> Progress:
    """Returns what shows a run.

    Args:
        view: of `chosen_view`.
        shown: what is known of the run.
    """
    if view == "live":
        from branchcore.live_view import LiveView

        return LiveView(shown)
    return Bar(shown) if view == "bar" else Nothing()
