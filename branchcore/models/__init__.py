"""Models: adapters of diffusers transformers, and the embedded digits task.

A family's module has `from_pretrained`, which makes a model that the trainer takes, of the folder
of a diffusers pipeline: `branchcore.models.sd3`, `branchcore.models.flux`,
`branchcore.models.qwen_image`, `branchcore.models.wan` and `branchcore.models.sana`. What they have
in common is `branchcore.models.prompted_flow` and `branchcore.models.flow_model`.

`branchcore.models.weights` says what is trained and saves it; then `branchcore.models.accelerate`
and `branchcore.models.runtime` make it faster, and `branchcore.models.sampling` draws images.
`branchcore.models.digits` is small, ships with the package and trains on a CPU.

A model of your own needs no more than `branchcore.model.VelocityModel` for the stages and
`branchcore.model.Model` for the trainer.
"""

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
