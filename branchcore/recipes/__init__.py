"""Published methods, one small file each; `build` finds one by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def build(name: str, sigmas: Sequence[float], **options: object) -> Recipe:
    """Builds a recipe by name.

    Raises:
        ValueError: an unknown recipe, or options it does not have.
    """
    if name not in RECIPES:
        raise ValueError(f"build: recipe must be from {tuple(RECIPES)}, got {name!r}")
    builder = RECIPES[name]
    known = builder.__kwdefaults__ or {}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"build: options of {name} must be from {tuple(known)}, got {unknown}")
    return builder(sigmas, **options)


__all__ = [
    "RECIPES",
    "Recipe",
    "branch_grpo",
    "branch_mix",
    "branchcore",
    "build",
    "dance_grpo",
    "flow_grpo",
]
