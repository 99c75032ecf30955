"""What a kernel is compiled for ahead of time: the evidence that needs no GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Build(NamedTuple):
    """One compilation of a kernel, with the arguments that its launcher would give it.

    Each `kernels/<op>.py` lists its own in `BUILDS`; `bench/aot.py` compiles them for every chip.
    """

    kernel: Any
    """The `triton.jit` function."""
    types: Mapping[str, str]
    """Triton type of each run-time argument, "*fp32" or "i64"; pointers are 16-byte aligned."""
    constants: Mapping[str, Any]
    """Value of each constexpr argument; a pointer that is None belongs here."""
    aligned: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16, as the launcher's would be at real sizes."""
    num_warps: int = 4
    streams: bool = True
    """Whether it must load or store 16 bytes at a time; False for a second stage on partials."""
