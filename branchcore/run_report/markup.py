"""HTML and SVG as text: the one place where what users wrote is escaped."""

from __future__ import annotations

import base64
import html
from pathlib import Path

KINDS = {".png": "image/png", ".jpg": "image/jpeg"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | float | None
_EMPTY = ("line", "rect", "circle", "path", "input", "meta", "link", "img", "br")
_RENAMED = {"cls": "class", "for_": "for", "name_": "name"}


def tag(name: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Returns an element; children and attributes are escaped unless they are markup.

    Args:
        name: of the element.
        children: text or markup; None is left out.
        attributes: `cls` is class, `_` in names becomes `-`; None and False are left out.
    """
    told: list[str] = []
    for key, value in attributes.items():
        key = _RENAMED.get(key, key).replace("_", "-")
        if value is True:
            told.append(f" {key}")
        elif value is not None and value is not False:
            told.append(f' {key}="{html.escape(_text(value))}"')
    inside = join(*children)
    opening = f"<{name}{''.join(told)}"
    if name in _EMPTY and not inside:
        # SVG asks for an end, HTML allows it
        return Markup(f"{opening}/>")
    return Markup(f"{opening}>{inside}</{name}>")


def join(*children: Child) -> Markup:
    """Returns children one after the other, escaped unless they are markup."""
    texts = (child for child in children if child is not None)
    return Markup("".join(t if isinstance(t, Markup) else html.escape(_text(t)) for t in texts))


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def script_json(text: str) -> Markup:
    """Returns JSON that may stand inside a script element."""
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def data_uri(path: Path) -> str:
    """Returns a picture as a URI that holds it."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{KINDS[path.suffix]};base64,{content}"
