"""The folder of a run: who it is (run.json), what happened (metrics.jsonl); safe to continue."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchcore import checkpoint


class RunFolder:
    """Opens a folder for a new run, or for the same run to go on.

    Args:
        out: folder; created if it is not there.
        identity: JSON-serialisable facts that name the run; must agree on resume.
        resume: continue what is there; a folder without a run is a fresh start.

    Raises:
        ValueError: the folder holds another run, or a run although resume is off.
        OSError: the folder cannot be written.
    """

    def __init__(self, out: str | Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(out)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.log_path = self.path / "metrics.jsonl"
        name = self.path / "run.json"
        if name.exists() or self.log_path.exists() or checkpoint.latest(self.path) is not None:
            if not resume:
                raise ValueError(
                    f"run: out must be a new folder, got {self.path} with another run; "
                    "try --resume or another folder"
                )
            check_same(name, json.loads(name.read_text()) if name.exists() else {}, self.identity)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(name, json.dumps(self.identity, indent=1) + "\n")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends one row to metrics.jsonl."""
        with self.log_path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def forget_after(self, iteration: int) -> None:
        """Drops the rows past an iteration, and a last row cut short: they will be made again."""
        lines = (
            self.log_path.read_text().splitlines(keepends=True) if self.log_path.exists() else []
        )
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["iteration"] <= iteration]
        write_whole(self.log_path, "".join(kept if iteration else []))


def check_same(where: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ValueError unless the identity at `where` is this run's."""
    for key in mine:
        if theirs.get(key) != mine[key]:
            raise ValueError(
                f"run: {where} must be of a run with the same {key}, got {theirs.get(key)} "
                f"where this one has {mine[key]}; try another folder"
            )


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    os.replace(partial, path)
