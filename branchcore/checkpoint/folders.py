"""Folders of checkpoints: their names, how one appears whole, and what goes afterwards.

`.partial-checkpoint-000040` is being written or removed: nobody reads it. `.old-checkpoint-000040`
was whole when a checkpoint of the same iteration was about to take its place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

FORMAT = "branchcore-checkpoint-2"
_WHOLE = re.compile(r"(?:\.old-)?checkpoint-(\d{6,})")
_PARTIAL, _OLD = ".partial-", ".old-"


def folder_of(out: Path, iteration: int) -> Path:
    """Returns the folder of an iteration's checkpoint."""
    return out / f"checkpoint-{iteration:06d}"


def partial_of(folder: Path) -> Path:
    """Returns the name under which a checkpoint is written."""
    return folder.with_name(_PARTIAL + folder.name)


def latest(out: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run, None if there is none."""
    found: dict[int, Path] = {}
    for path in (*out.glob(f"{_OLD}checkpoint-*"), *out.glob("checkpoint-*")):
        name = _WHOLE.fullmatch(path.name)
        if name and path.is_dir():
            found[int(name[1])] = path
    return found[max(found)] if found else None


def publish(partial: Path, folder: Path, keep: int) -> None:
    """Renames what was written whole, then removes all checkpoints but the newest `keep`.

    Raises:
        OSError: the disk refuses.
    """
    for path in (*(p for p in partial.iterdir() if p.is_dir()), partial):
        sync(path)
    old = folder.with_name(_OLD + folder.name)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    whole = [p for p in folder.parent.glob("checkpoint-*") if _WHOLE.fullmatch(p.name)]
    for path in sorted(whole, key=lambda p: int(p.name.split("-")[1]))[:-keep]:
        # half removed, it must not pass for a checkpoint
        gone = partial_of(path)
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)


def tidy(out: Path) -> None:
    """Removes what a crash left half-written, and gives a replaced checkpoint its name back."""
    for path in out.glob(f"{_PARTIAL}checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)  # somebody else may be at it
    for path in out.glob(f"{_OLD}checkpoint-*"):
        proper = path.with_name(path.name.removeprefix(_OLD))
        if proper.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, proper)


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on disk."""
    path.write_text(text)
    sync(path)


def free_bytes(path: Path) -> int:
    """Returns what is free on the disk of a path that need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def check_writable(out: Path) -> None:
    """Writes a few bytes where a folder is or will be, in a file that has no name.

    Raises:
        OSError: they cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(out)) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OSError(
            f"run: out must be a folder that can be written, got {out} "
            f"({error.strerror}, {free_bytes(out)} bytes free); try another folder"
        ) from error


def _existing(path: Path) -> Path:
    absolute = path.absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def load_state(folder: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint's state.json.

    Raises:
        ValueError: not a checkpoint of this format, or damaged.
    """
    path = folder / "state.json"
    state = read_json(path)
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {path} must have format {FORMAT!r}, got {state.get('format')!r}; "
            "try the version of branchcore that wrote it"
        )
    require(path, state, iteration=int)
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: missing, damaged, or something else than an object.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: {path.parent} must hold {path.name}, got no such file")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path} must be JSON, got damaged text ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: {path} must hold an object, got {type(value).__name__}")
    return cast("dict[str, Any]", value)


def require(path: Path, state: Mapping[str, Any], **kinds: Any) -> None:
    """Raises ValueError unless the state has these entries; a kind is a type, or (type, None)."""
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        value = state.get(name, ...)
        if not any(value is None if k is None else isinstance(value, k) for k in allowed):
            got = "nothing" if value is ... else repr(value)
            raise ValueError(f"checkpoint: {path} must have a {name}, got {got}")
