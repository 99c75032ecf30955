"""The index of a checkpoint: which file holds which piece of every tensor, as JSON.

A tensor is called `group.name`. It is whole in one file if every rank had all of it, or in pieces
that do not overlap if it was sharded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from branchcore.checkpoint.folders import read_json
from branchcore.checkpoint.tensors import check_shapes

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of dtypes, as safetensors writes them."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_FILE = re.compile(r"\w+/rank-\d{5,}\.safetensors")


class Piece(NamedTuple):
    """A box of a tensor."""

    file: str
    """Relative to the checkpoint."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """A tensor of the checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    pieces: tuple[Piece, ...]


class Index(NamedTuple):
    """All files and tensors of a checkpoint."""

    files: Mapping[str, int]
    """Bytes of every file."""
    tensors: Mapping[str, Entry]
    """By `group.name`."""

    def group(self, name: str) -> dict[str, Entry]:
        """Returns a group's tensors by their own names; empty if there is no such group."""
        start = f"{name}."
        return {k[len(start) :]: e for k, e in self.tensors.items() if k.startswith(start)}

    def text(self) -> str:
        """Returns the JSON that `read_index` reads."""
        tensors = {
            name: {"dtype": CODES[entry.dtype], "shape": entry.shape, "pieces": entry.pieces}
            for name, entry in self.tensors.items()
        }
        return json.dumps({"files": self.files, "tensors": tensors}, separators=(",", ":"))


def read_index(folder: Path) -> Index:
    """Reads a checkpoint's index.json.

    Raises:
        ValueError: missing or damaged, or a tensor is not covered by its pieces.
    """
    path = folder / "index.json"
    held = read_json(path)
    try:
        files = {_file(name): int(size) for name, size in held["files"].items()}
        tensors = {name: _entry(name, known, files) for name, known in held["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"checkpoint: {path} must list files and tensors, got damaged entries ({error!r})"
        ) from error
    return Index(files, tensors)


def _file(name: str) -> str:
    if not _FILE.fullmatch(name):
        raise ValueError(f"file {name!r}")
    return name


def _entry(name: str, known: Mapping[str, Any], files: Mapping[str, int]) -> Entry:
    pieces = tuple(
        Piece(file, tuple(map(int, offset)), tuple(map(int, shape)))
        for file, offset, shape in known["pieces"]
    )
    shape = tuple(map(int, known["shape"]))
    covered = sum(math.prod(piece.shape) for piece in pieces)
    if covered != math.prod(shape) or any(piece.file not in files for piece in pieces):
        raise ValueError(f"pieces of {name}")
    return Entry(_DTYPES[known["dtype"]], shape, pieces)


def check_entries(where: Path, held: Mapping[str, Entry], like: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a group has the names, shapes and dtypes of these tensors."""
    check_shapes(where, {name: entry.shape for name, entry in held.items()}, like)
    for name, tensor in like.items():
        if held[name].dtype != tensor.dtype:
            raise ValueError(
                f"checkpoint: {where}: {name} must be {tensor.dtype}, got {held[name].dtype}"
            )


def check_files(folder: Path, index: Index, files: Iterable[str]) -> None:
    """Checks size and header of some files.

    Raises:
        ValueError: one is missing, cut short, or holds something else than the index says.
    """
    pieces: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in index.tensors.items():
        for piece in entry.pieces:
            pieces.setdefault(piece.file, {})[name.split(".", 1)[1]] = piece.shape
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"checkpoint: {folder} must hold {file}, got no such file")
        if path.stat().st_size != index.files[file]:
            raise ValueError(
                f"checkpoint: {path} must be whole safetensors of {index.files[file]} bytes, "
                f"got {path.stat().st_size}"
            )
        if _shapes(path) != pieces.get(file, {}):
            raise ValueError(f"checkpoint: {path} must hold what index.json says, got other names")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            names = cast("list[str]", file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} must be whole safetensors, got {error}") from error
