"""Whether a value that came as text, JSON or a preset is what an option's annotation says."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Literal, Union, cast, get_args, get_origin

import numpy as np


def fits(value: object, kind: Any) -> bool:
    """Tells whether a value has the type of an annotation.

    Understands bool, int, float (an int will do), str, None, unions, Literal and Sequence of
    those; a flag is no number.

    Args:
        value: anything.
        kind: annotation, resolved.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        # which of them is the builder's own, clearer error
        return any(isinstance(value, type(one)) for one in arguments)
    if origin is Sequence:
        if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray)):
            return False
        return all(fits(item, arguments[0]) for item in cast("Sequence[object]", value))
    if origin is tuple:
        items = cast("tuple[object, ...]", value) if isinstance(value, (tuple, list)) else None
        return items is not None and all(map(fits, items, arguments))
    if isinstance(value, (bool, np.bool_)):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float, np.integer, np.floating))
    return isinstance(value, (int, np.integer) if kind is int else kind)
