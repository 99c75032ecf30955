"""What all generated sections of README share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(meta: dict[str, Any]) -> str:
    """Names machine, versions, date and commit."""
    torch = meta["versions"]["torch"]
    return f"{meta['cpu']}, torch {torch}, {meta['date']}, commit {meta['commit'][:9]}."
