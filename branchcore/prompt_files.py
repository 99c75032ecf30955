"""Prompts from text, JSON-lines and Parquet files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIELD = "prompt"


def read_prompts(path: str | Path, *, field: str | None = None) -> list[str]:
    """Reads prompts in their order; white space around them is cut, duplicates stay.

    * `.txt`: one per line; blank lines are skipped, and nothing is a comment: a prompt may start
      with a `#`.
    * `.jsonl`: one object per line; blank lines are skipped.
    * `.parquet`: a column of strings; needs pyarrow.

    Args:
        path: UTF-8 file with one of these suffixes.
        field: of the objects, or the column; None = "prompt". A text file has none.

    Raises:
        ValueError: another suffix, no prompts, or a line without one; names the line.
        OSError: the file cannot be read.
        RuntimeError: pyarrow is not installed.
    """
    path = Path(path)
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"prompts: file must end in {', '.join(readers)}, got {path}")
    if field is not None and path.suffix == ".txt":
        raise ValueError(f"prompts: field must be left out with a text file, got {field!r}")
    if not path.is_file():
        raise OSError(
            f"prompts: {path} must be a file, got {'a folder' if path.exists() else 'none'}"
        )
    prompts: list[str] = []
    for where, value in readers[path.suffix](path, field or FIELD):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"prompts: {path} {where} must be a text, got {value!r}")
        prompts.append(value.strip())
    if not prompts:
        raise ValueError(f"prompts: {path} must hold at least one prompt, got none")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} must be UTF-8 text, got {error}") from error
    return ((i, line) for i, line in enumerate(lines, 1) if line.strip())


def _text(path: Path, _field: str) -> Iterator[tuple[str, Any]]:
    return ((f"line {i}", line) for i, line in _lines(path))


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    for i, line in _lines(path):
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {path} line {i} must be JSON, got {error}") from error
        if not isinstance(row, dict) or field not in row:
            got = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"prompts: {path} line {i} must be an object with {field!r}, got {got}; "
                "try another field"
            )
        yield f"line {i}, {field!r},", row[field]


def _parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise RuntimeError(
            f"prompts: pyarrow must be installed to read {path}, got none; try pip install pyarrow"
        ) from error
    try:
        file: Any = parquet.ParquetFile(path)
        names: list[str] = file.schema_arrow.names
        if field not in names:
            raise ValueError(
                f"prompts: {path} must have a column {field!r}, got {names}; try another field"
            )
        values: list[Any] = file.read(columns=[field]).column(field).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"prompts: {path} must be a Parquet file, got {error}") from error
    return ((f"row {i}, {field!r},", value) for i, value in enumerate(values, 1))
