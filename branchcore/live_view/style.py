"""The few styles of the live view, and lines made of parts."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.text import Text

QUIET, HEAD, LIVE, WARN = "dim", "bold", "cyan", "yellow"


def joined(parts: Sequence[str], style: str = "") -> Text:
    """Returns one line of parts with quiet dots between them."""
    line = Text()
    for part in parts:
        line.append(" · " if line else "", QUIET).append(part, style)
    return line


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Returns a text as at most so many lines, at least one."""
    return wrap(text, width, max_lines=most, placeholder=" …") or [""]


def packed(parts: Sequence[str], width: int, most: int) -> list[Text]:
    """Returns parts as at most so many lines of `joined` parts; an ellipsis stands for the rest."""
    rows: list[list[str]] = [[]]
    for part in parts:
        if rows[-1] and joined([*rows[-1], part]).cell_len > width:
            rows.append([])
        rows[-1].append(part)
    if len(rows) > most:
        rows = [*rows[: most - 1], [*rows[most - 1], "…"]]
    return [joined(row) for row in rows if row]
