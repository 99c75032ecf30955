"""What a run leaves beside its rows: trees and sample grids by iteration, and its sessions.

trees/000010.json     the first prompt's tree of an iteration, see `tree_record`
samples/000010.png    grids of the same noise, see `models.commands.sample_history`
sessions.jsonl        a row per start of the run: when, with what, towards how many iterations
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

TREES, SAMPLES, SESSIONS = "trees", "samples", "sessions.jsonl"


def recorded(run: Path, kind: str) -> dict[int, Path]:
    """Returns the files of a kind of record by iteration, in order; none if there are none."""
    files = (run / kind).glob("[0-9]*.*") if (run / kind).is_dir() else ()
    return {int(path.stem): path for path in sorted(files) if path.stem.isdigit()}


def forget_after(run: Path, iteration: int) -> None:
    """Drops trees and sample grids past an iteration: they will be made again."""
    for kind in (TREES, SAMPLES):
        for done, path in recorded(run, kind).items():
            if done > iteration:
                path.unlink()


def session(device: torch.device, *, after: int, iterations: int, processes: int) -> dict[str, Any]:
    """Returns the facts of one start of a run.

    Args:
        device: where the model lives.
        after: iterations that were finished before.
        iterations: of the whole run.
        processes: that train together.
    """
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("branchcore", "torch", "diffusers", "transformers", "peft", "triton")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "after": after,
        "iterations": iterations,
        "processes": processes,
        "device": f"{device.type}, {name}",
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    installed: dict[str, str] = {}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def add_session(run: Path, facts: Mapping[str, Any]) -> None:
    """Appends a session to sessions.jsonl."""
    with (run / SESSIONS).open("a") as file:
        file.write(json.dumps(dict(facts)) + "\n")


def write_record(run: Path, kind: str, name: str, content: bytes) -> Path:
    """Writes a file of a kind of record, whole or not at all; returns it."""
    folder = run / kind
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{name}"
    partial.write_bytes(content)
    os.replace(partial, folder / name)
    return folder / name
