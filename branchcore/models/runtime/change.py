"""What an acceleration did, in a sentence that can be taken back."""

from __future__ import annotations

from collections.abc import Callable


class Change(str):
    """One plain sentence for the command line, and the way back.

    Args:
        sentence: what was done and why.
        undo: restores what was there before.
    """

    _restore: Callable[[], None] | None

    def __new__(cls, sentence: str, undo: Callable[[], None]) -> Change:
        """Joins both."""
        change = super().__new__(cls, sentence)
        change._restore = undo
        return change

    def undo(self) -> None:
        """Restores what was there before; once is enough."""
        restore, self._restore = self._restore, None
        if restore is not None:
            restore()
