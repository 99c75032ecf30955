"""What a plan is asked for, and a neighbour of it in the words of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from branchcore.parallel import ParallelConfig

Place = tuple[str, str]
"""Part of a request, name in it."""


def _nothing() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Only what somebody set; the planner chooses or takes defaults for the rest."""

    model: str = "digits"
    """digits, or a family of models."""
    recipe: str = "branch_mix"
    """Name of the method."""
    flags: Mapping[str, Any] = field(default_factory=_nothing)
    """Of the model, named as the flags of `train`."""
    options: Mapping[str, Any] = field(default_factory=_nothing)
    """Of the recipe."""
    fields: Mapping[str, Any] = field(default_factory=_nothing)
    """Of `TrainerConfig`."""
    parallel: Mapping[str, Any] = field(default_factory=_nothing)
    """Of `ParallelConfig`."""
    leaves: int | None = None
    """Leaves per prompt: the group size."""
    gpus: int = 1
    """GPUs; 1 without one is the CPU."""
    gpu: str | None = None
    """One of `sheet.GPUS`; None = what is here."""
    memory: int | None = None
    """Bytes of one GPU; None = of the one named, or here."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {self.gpus}")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"memory must be at least 1 byte, got {self.memory}")

    def parallel_config(self) -> ParallelConfig:
        """Returns how weights are spread, as far as it was said."""
        return ParallelConfig(**self.parallel)

    def given(self) -> dict[Place, Any]:
        """Returns everything that was set, by place."""
        found: dict[Place, Any] = {
            (part, name): value
            for part in ("flags", "options", "fields", "parallel")
            for name, value in getattr(self, part).items()
        }
        for name in ("leaves", "gpus", "memory"):
            if getattr(self, name) is not None:
                found["", name] = getattr(self, name)
        return found

    def put(self, place: Place, value: Any) -> Request:
        """Returns the request with one thing set, or left out where the value is None."""
        part, name = place
        if not part:
            return dataclasses.replace(self, **{name: value})
        values = {k: v for k, v in getattr(self, part).items() if k != name}
        values |= {} if value is None else {name: value}
        return dataclasses.replace(self, **{part: values})


def words_of(place: Place, value: Any) -> str:
    """Returns a setting as the command line has it."""
    part, name = place
    flag = "--" + name.replace("_", "-")
    if part in ("options", "fields"):
        return f"--set {name}={value}" if value is not None else f"no --set {name}"
    if value is None or value is False:
        return f"no {flag}"
    if place == ("parallel", "kind"):
        return f"--parallel {value}"
    if name == "memory":
        return f"--memory {size_text(value)}"
    return flag if value is True else f"{flag} {value}"


def size_text(size: int) -> str:
    """Returns bytes as `bytes_of` reads them, rounded up."""
    unit, name = next(
        ((u, n) for u, n in ((10**9, "GB"), (10**6, "MB")) if size >= u), (1000, "KB")
    )
    return f"{-(-size * 100 // unit) / 100:g}{name}"
