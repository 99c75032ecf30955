"""Published methods, one small file each; a method is the function named like its file.

`build` finds one by name; a new file in this folder is found without being listed anywhere. A file
has its method's formulas, the function and its options, and `PRESETS`, as published. A `Recipe` is
what grows a prompt's tree, what makes advantages of its rewards, and what is minimised;
`branchcore.recipes.credits`, `branchcore.recipes.windows` and `branchcore.recipes.chains` are what
methods have in common.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from branchcore.recipes.option_types import fits
from branchcore.recipes.recipe import Preset, Recipe, Sigmas
from branchcore.recipes.scale import leaf_options

Builder = Callable[..., Recipe]


def _discover() -> tuple[dict[str, Builder], dict[str, Mapping[str, Preset]]]:
    builders: dict[str, Builder] = {}
    presets: dict[str, Mapping[str, Preset]] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        builder = getattr(module, name, None)
        if inspect.isfunction(builder):
            builders[name] = builder
            presets[name] = getattr(module, "PRESETS", {})
    return builders, presets


RECIPES, PRESETS = _discover()
globals().update(RECIPES)


def __getattr__(name: str) -> Builder:
    """Names the known recipes where an unknown one is asked for."""
    raise AttributeError(f"recipes: name must be from {tuple(RECIPES)}, got {name!r}")


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns the options of a recipe by name.

    Raises:
        ValueError: an unknown recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipes: name must be from {tuple(RECIPES)}, got {name!r}")
    parameters = inspect.signature(RECIPES[name]).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(name: str, sigmas: Sigmas, **options: Any) -> Recipe:
    """Builds a recipe by name.

    >>> import branchcore as bc
    >>> sigmas = bc.schedule.shifted_linear(4, 3)
    >>> recipe = bc.recipes.build("tempflow_grpo", sigmas, children=6)
    >>> recipe.plan([0, 1], seed=0, iteration=0).counts()
    Counts(forwards=312, trained_edges=144, trained_parents=24, decodes=144)

    Args:
        name: of the function in this package.
        sigmas: (T + 1,) schedule, see `branchcore.schedule`.
        options: the function's keyword arguments.

    Raises:
        ValueError: an unknown recipe, or options it does not have.
        TypeError: an option that must be a number or a flag is none.
    """
    known = options_of(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name}: options must be from {tuple(known)}, got {unknown}")
    kinds = get_type_hints(RECIPES[name])
    for option, value in options.items():
        if not fits(value, kinds[option]):
            raise TypeError(f"{name}: {option} must be {known[option].annotation}, got {value!r}")
        if isinstance(value, float) and not (math.isfinite(value) or option == "clip"):
            raise ValueError(f"{name}: {option} must be finite, got {value}")
    return RECIPES[name](sigmas, **options)


def preset_of(name: str, preset: str) -> Preset:
    """Returns a published configuration of a recipe, such as "flux" or "sd3.5-m".

    Raises:
        ValueError: an unknown recipe or preset.
    """
    options_of(name)
    if preset not in PRESETS[name]:
        known = f"from {tuple(PRESETS[name])}" if PRESETS[name] else "left out, as it has none"
        raise ValueError(f"{name}: preset must be {known}, got {preset!r}")
    return PRESETS[name][preset]


def build_preset(name: str, preset: str, **options: Any) -> Recipe:
    """Builds a recipe as published, on its own schedule; options override the preset's.

    Raises:
        ValueError, TypeError: as `preset_of` and `build`.
    """
    chosen = preset_of(name, preset)
    return build(name, chosen.sigmas, **{**chosen.options, **options})


__all__ = [
    "PRESETS",
    "RECIPES",
    "Preset",
    "Recipe",
    "build",
    "build_preset",
    "leaf_options",
    "options_of",
    "preset_of",
]
