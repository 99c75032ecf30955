"""A terminal for tests: what a stream of text and escape sequences leaves to be read."""

import re

_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+|\x1b")


class Terminal:
    """Lines that wrap at a width; the last `height` of them are on the screen.

    Args:
        width: columns.
        height: rows.
        reflows: a new width breaks lines anew, as most terminals do.
    """

    def __init__(self, width=80, height=24, reflows=True):
        self.width, self.height, self.reflows = width, height, reflows
        self.rows, self.y, self.x = [""], 0, 0
        self.is_open = True
        self.encoding = "utf-8"

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        if not self.is_open:
            raise OSError(5, "Input/output error")
        for token in _TOKEN.finditer(text):
            numbers, letter = token.group(1), token.group(2)
            if letter == "A":
                top = max(0, len(self.rows) - self.height)
                self.y = max(top, self.y - int(numbers or 1))
            elif letter == "K":
                self.rows[self.y] = self.rows[self.y][: self.x]
            elif letter == "J":
                assert numbers == ""
                self.rows[self.y] = self.rows[self.y][: self.x]
                del self.rows[self.y + 1 :]
            elif letter == "m":
                pass
            elif token.group() == "\r":
                self.x = 0
            elif token.group() == "\n":
                self._down()
            else:
                assert not token.group().startswith("\x1b"), f"unknown: {token.group()!r}"
                for character in token.group():
                    self._put(character)
        return len(text)

    def _down(self):
        self.y, self.x = self.y + 1, 0
        if self.y == len(self.rows):
            self.rows.append("")

    def _put(self, character):
        if self.x == self.width:
            self._down()
        row = self.rows[self.y].ljust(self.x)
        self.rows[self.y] = row[: self.x] + character + row[self.x + 1 :]
        self.x += 1

    def resize(self, width, height=None):
        """Breaks lines that have become too long in two, or cuts them."""
        self.height = height or self.height
        if width < self.width:
            rows, at = [], 0
            for i, row in enumerate(self.rows):
                at = len(rows) if i == self.y else at
                cut = range(0, max(len(row), 1), width) if self.reflows else range(1)
                rows += [row[lo : lo + width] for lo in cut]
            self.rows, self.y, self.x = rows, at, min(self.x, width)
        self.width = width

    @property
    def text(self):
        """Everything, scrolled away or not."""
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n")

    @property
    def screen(self):
        """What is to be seen."""
        return "\n".join(row.rstrip() for row in self.rows[-self.height :])
