"""Writes one safetensors file straight from the memory of its tensors.

Format: the header's length in 8 bytes, the header in JSON, then the bytes of every tensor in
order, little-endian (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from branchcore.checkpoint.index import CODES


class Part(NamedTuple):
    """A tensor to write, or a box of one."""

    name: str
    dtype: torch.dtype
    offset: tuple[int, ...]
    """Of the box in the whole tensor."""
    shape: tuple[int, ...]
    """Of the box."""
    read: Callable[[], Tensor]
    """Returns the box; called when its turn comes."""

    @property
    def num_bytes(self) -> int:
        """Size of the box."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, parts: Sequence[Part]) -> int:
    """Writes a safetensors file; returns its bytes, all of them on disk.

    Args:
        path: the file.
        parts: with names of their own; `HuggingFaceStorageReader` finds their offsets too.

    Raises:
        NotImplementedError: safetensors has no such dtype, or a name comes twice.
        OSError: the disk refuses.
    """
    # wide dtypes first: then every tensor is aligned, because the header is
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    head = _header(path, parts)
    with path.open("wb") as file:
        file.write(head)
        for part in parts:
            flat = part.read().detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + sum(part.num_bytes for part in parts)


def _header(path: Path, parts: Sequence[Part]) -> bytes:
    offsets = {part.name: {"saved_offsets": part.offset} for part in parts}
    said = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    header: dict[str, Any] = {"__metadata__": said}
    end = 0
    for part in parts:
        if part.dtype not in CODES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in CODES)
            raise NotImplementedError(
                f"checkpoint: {part.name} must be one of {known}, got {part.dtype}"
            )
        if part.name in header:
            raise NotImplementedError(f"checkpoint: {path} must hold {part.name} once, got twice")
        span = (end, end + part.num_bytes)
        header[part.name] = {
            "dtype": CODES[part.dtype], "shape": part.shape, "data_offsets": span
        }  # fmt: skip
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
