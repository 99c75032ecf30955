"""Models: adapters of diffusers transformers, and the embedded digits task."""

from __future__ import annotations

import importlib
from types import ModuleType

FAMILIES = {
    "sd3": "branchcore.models.sd3",
    "flux": "branchcore.models.flux",
    "qwen_image": "branchcore.models.qwen_image",
    "wan": "branchcore.models.wan",
    "sana": "branchcore.models.sana",
}
"""Families of real models: name -> module with `from_pretrained`."""


def family_module(name: str) -> ModuleType:
    """Imports a family's module.

    Raises:
        ValueError: an unknown family.
    """
    if name not in FAMILIES:
        raise ValueError(f"models: family must be from {tuple(FAMILIES)}, got {name!r}")
    return importlib.import_module(FAMILIES[name])


__all__ = ["FAMILIES", "family_module"]
