"""Published methods, one small file each; `build` finds one by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from branchcore.recipes.branch_grpo import branch_grpo
from branchcore.recipes.branch_mix import branch_mix
from branchcore.recipes.branchcore import branchcore
from branchcore.recipes.dance_grpo import dance_grpo
from branchcore.recipes.flow_grpo import flow_grpo
from branchcore.recipes.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    builder.__name__: builder
    for builder in (branch_grpo, branch_mix, branchcore, dance_grpo, flow_grpo)
}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns the options of a recipe by name.

    Raises:
        ValueError: an unknown recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipes: name must be from {tuple(RECIPES)}, got {name!r}")
    parameters = inspect.signature(RECIPES[name]).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(name: str, sigmas: Sequence[float], **options: Any) -> Recipe:
    """Builds a recipe by name.

    Raises:
        ValueError: an unknown recipe, or options it does not have.
        TypeError: an option that must be a number or a flag is none.
    """
    known = options_of(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name}: options must be from {tuple(known)}, got {unknown}")
    for option, value in options.items():
        kind = known[option].annotation
        kinds = {"bool": (bool,), "int": (int,), "float": (int, float)}.get(kind)
        flag = isinstance(value, bool) and kind != "bool"
        if kinds is not None and (flag or not isinstance(value, kinds)):
            raise TypeError(f"{name}: {option} must be {kind}, got {value!r}")
    return RECIPES[name](sigmas, **options)


__all__ = [
    "RECIPES",
    "Recipe",
    "branch_grpo",
    "branch_mix",
    "branchcore",
    "build",
    "dance_grpo",
    "flow_grpo",
    "options_of",
]
