"""A pipeline as the command line names it: checked at once, loaded later."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch

from branchcore.models import family_module
from branchcore.models.family import Family
from branchcore.models.flow_model import FlowModel
from branchcore.models.loading import check_class
from branchcore.models.task import Flags, refuse

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Pipeline:
    """A pipeline on disk, and how it is to be loaded.

    Args:
        name: of the family.
        flags: of the command line; `path` and arguments of the family's `from_pretrained`.
        others: names of flags that are somebody else's.

    Raises:
        ValueError: no path, a flag that this family does not have, a pipeline of another class.
        OSError: no such folder.
    """

    def __init__(self, name: str, flags: Flags, others: Collection[str]) -> None:
        self._module = family_module(name)
        # what a video model calls num_frames
        given = {"num_frames" if k == "frames" else k: v for k, v in flags.items()}
        own = inspect.signature(self._module.from_pretrained).parameters
        refuse(name, flags, {*own, *others, *(["frames"] if "num_frames" in own else [])})
        if "path" not in flags:
            raise ValueError(f"--path must be the folder of a {name} pipeline, got none")
        self.path = str(flags["path"])
        self._options: dict[str, Any] = {k: given[k] for k in given if k in own and k != "path"}
        if "dtype" in flags:
            self._options["dtype"] = DTYPES[flags["dtype"]]
        self.frames: int | None = None
        """Of a video model; None for images."""
        if "num_frames" in own:
            self.frames = self._options.get("num_frames", own["num_frames"].default)
        self._options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(self._options["device"])
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device must be one that torch can use, got cuda without a GPU")
        check_class(self._family(), self.path)

    def _family(self) -> type[Family]:
        classes = [c for c in vars(self._module).values() if inspect.isclass(c)]
        own = [c for c in classes if c.__module__ == self._module.__name__]
        return next(c for c in own if issubclass(c, Family))

    def load(self) -> FlowModel:
        """Loads it; see the family's `from_pretrained`."""
        return self._module.from_pretrained(self.path, **self._options)
