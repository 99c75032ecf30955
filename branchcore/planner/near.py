"""Finds the nearest possible request to one that is impossible: one change, else two."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from branchcore.models.sizing.memory import bytes_of
from branchcore.planner.request import Place, Request, words_of

T = TypeVar("T")
REFUSALS = (ValueError, TypeError, NotImplementedError)
_TRIES = 120
_FILES = ("path", "prompts", "reward", "device")
_ADDED: tuple[tuple[Place, Any, str], ...] = (
    (("flags", "reference"), True, "reference"),
    (("flags", "dtype"), "fp32", "dtype"),
    (("parallel", "kind"), "shard", "kind"),
    (("flags", "checkpointing"), True, "checkpointing"),
    (("flags", "full"), None, "LoRA"),
)
"""What can help although nobody asked for it, and the word of a reason that says so."""


class Impossible(ValueError):
    """A request that cannot run; `nearest` is one that can, None where none was found."""

    def __init__(self, text: str, nearest: Request | None) -> None:
        super().__init__(text)
        self.nearest = nearest


class Change(NamedTuple):
    """One thing that is set otherwise, and how far that is from what was asked."""

    place: Place
    value: Any
    distance: float


def or_nearest(request: Request, attempt: Callable[[Request], T]) -> T:
    """Returns what an attempt returns.

    Raises:
        Impossible: the attempt refuses; names its reason and the nearest request that it takes.
    """
    try:
        return attempt(request)
    except REFUSALS as error:
        found = _search(request, str(error), attempt, depth=2)
        if found is None:
            raise Impossible(f"{error}; no possible configuration is near", None) from error
        nearest, changes = found
        said = " and ".join(words_of(c.place, c.value) for c in changes)
        raise Impossible(f"{error}; the nearest possible: {said}", nearest) from error


def _search(
    request: Request, reason: str, attempt: Callable[[Request], Any], depth: int
) -> tuple[Request, list[Change]] | None:
    """Tries single changes in order of distance, then a second one where the first helped.

    Of a flag that loads the model anew no further value is tried once another refusal is met.
    """
    onward: list[tuple[Request, Change, str]] = []
    for change in list(_changes(request, reason))[:_TRIES]:
        if any(_loads(change.place) and change.place == done.place for _, done, _ in onward):
            continue
        try:
            changed = request.put(change.place, change.value)
            attempt(changed)
        except REFUSALS as error:
            if _kind(str(error)) != _kind(reason):
                onward.append((request.put(change.place, change.value), change, str(error)))
            continue
        return changed, [change]
    if depth > 1:
        for changed, change, other in onward[:6]:
            found = _search(changed, other, attempt, depth - 1)
            if found is not None:
                return found[0], [change, *found[1]]
    return None


def _loads(place: Place) -> bool:
    return place[0] == "flags" and place[1] != "steps"


def _kind(reason: str) -> str:
    """Returns a reason without its numbers."""
    return re.sub(r"[\d.]+", "#", reason)


def _changes(request: Request, reason: str) -> Iterable[Change]:
    """Returns changes, those of what the reason names first, then by distance.

    A flag of the model, which has to be loaded anew, is changed only where the reason names it.
    """
    found: list[tuple[bool, Change]] = []
    given = request.given()
    for place, value in given.items():
        named = _names(reason, place[1])
        if named or place[0] != "flags":
            found += [(not named, change) for change in _others(place, value)]
    for i, (place, value, word) in enumerate(_ADDED):
        new = given.get(place) != value and (value is not None or place in given)
        if new and _names(reason, word) and not (place[0] == "flags" and request.model == "digits"):
            found.append((False, Change(place, value, 0.05 * (i + 1))))
    short = re.search(r"budget must be at least ([\d.]+ [KMG]B)", reason)
    if short is not None and request.memory is not None:
        needed = math.ceil(1.02 * bytes_of(short[1]))
        found.append((True, Change(("", "memory"), needed, 0.3)))
    return (change for _, change in sorted(found, key=lambda f: (f[0], f[1].distance)))


def _names(reason: str, word: str) -> bool:
    return re.search(rf"\b(num_)?{word}\b", reason) is not None


def _others(place: Place, value: Any) -> list[Change]:
    """Returns other values of one setting."""
    if place == ("", "memory"):
        return [Change(place, math.ceil(value * 1.1**i), 0.3 + 0.1 * i) for i in range(1, 60)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (
            [] if place[1] in ("path", "prompts", "reward", "device") else [Change(place, None, 2)]
        )
    dropped = [Change(place, None, 4.0)] if place[0] else []
    if isinstance(value, float):
        values = {1.0, value / 2, value * 2}
        return [Change(place, v, 1.0 + abs(v - value)) for v in values if v != value] + dropped
    steps = {value + d for d in range(-8, 9)} | {value * 2**i for i in range(1, 6)}
    steps |= {value // 2**i for i in range(1, max(1, value).bit_length())}
    steps |= {round(value / 16 + d) * 16 for d in (-0.5, 0, 0.5)}
    least = 0 if place[1] in ("tape", "fast_steps") else 1
    numbers = sorted(n for n in steps if n >= least and n != value)
    return [Change(place, n, _apart(n, value)) for n in numbers] + dropped


def _apart(a: int, b: int) -> float:
    """Returns how far two counts are apart; less is a little nearer than more."""
    return abs(math.log((a + 0.5) / (max(b, 0) + 0.5))) + (1e-6 if a > b else 0.0)
