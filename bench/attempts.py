"""Go on after a failure, and leave a whole result file however a run ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_timing import context_is_dead


class ContextDied(Exception):
    """A kernel ended the process's use of the GPU: nothing else can be tried in it."""


def attempt(what: str, call: Callable[[], Any], failures: list[dict[str, str]], **tags: str) -> Any:
    """Runs a piece of a check; whatever it raises is recorded, and the other pieces still run.

    Raises:
        ContextDied: they cannot.
    """
    try:
        return call()
    except ContextDied:
        raise
    # a compiler, a driver and torch raise classes that have nothing else in common
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        failures.append({"what": what, "error": text[:2000], **tags})
        print(f"FAILED {what}: {text.splitlines()[0][:300]}", flush=True)
        if context_is_dead():
            failures[-1]["fatal"] = "yes"
            raise ContextDied(what) from error
        return None


def write_json(path: Path | None, result: Any) -> None:
    """Replaces a result file at once, so that nobody ever reads half of one; NaN becomes null."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
        part.replace(path)


def _finite(value: Any) -> Any:
    """Replaces what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
