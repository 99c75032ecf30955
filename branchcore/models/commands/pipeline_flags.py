"""A pipeline as the command line names it: checked at once, loaded later."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch

from branchcore.models import family_module
from branchcore.models.commands.task import Flags, refuse
from branchcore.models.family import Family, Size
from branchcore.models.flow_model import FlowModel
from branchcore.models.loading import check_class

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PLACES = ("path", "device")


class Pipeline:
    """A pipeline on disk, and how it is to be loaded.

    Args:
        name: of the family.
        flags: of the command line; `path` and arguments of the family's `from_pretrained`.
        others: names of flags that are somebody else's.

    Raises:
        ValueError: no path, a flag or a size that this family does not have, a pipeline of another
            class.
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
        chosen = {k: self._options.get(k, parameter.default) for k, parameter in own.items()}
        self.frames: int | None = chosen.get("num_frames")
        """Of a video model; None for images."""
        frames = () if self.frames is None else (self.frames,)
        self.shape: tuple[int, ...] = (*frames, 3, chosen["height"], chosen["width"])
        """Of an image (3, H, W) or a video (F, 3, H, W)."""
        kinds = (str, int, float, type(None))
        self.facts = {k: v for k, v in chosen.items() if k not in _PLACES and isinstance(v, kinds)}
        """What is asked of the pipeline, defaults included: it changes what is generated."""
        self.facts["dtype"] = str(chosen["dtype"]).removeprefix("torch.")
        self._options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(self._options["device"])
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device must be one that torch can use, got cuda without a GPU")
        family = self._family()
        family.check_size(Size(chosen["height"], chosen["width"], *frames))
        check_class(family, self.path)

    def _family(self) -> type[Family]:
        classes = [c for c in vars(self._module).values() if inspect.isclass(c)]
        own = [c for c in classes if c.__module__ == self._module.__name__]
        return next(c for c in own if issubclass(c, Family))

    def load(self) -> FlowModel:
        """Loads it; see the family's `from_pretrained`."""
        return self._module.from_pretrained(self.path, **self._options)
