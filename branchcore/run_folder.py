"""The folder of a run: who it is (run.json), what happened (metrics.jsonl); safe to continue."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from branchcore import checkpoint
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig

_FREE_TO_CHANGE = (
    "iterations", "checkpoint_every", "keep_checkpoints", "evaluate_every", "overlap_rewards",
    "reward_attempts", "reward_timeout",
)  # fmt: skip


class RunFolder:
    """Opens a folder for a new run, or for the same run to go on.

    Nothing is left before the first row is logged: a run that cannot start leaves no trace. Whether
    the folder can be written is tried with a file that has no name.

    Args:
        out: folder; created with the first row.
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
        self._name = self.path / "run.json"
        self._is_new = not (resume and _occupied(self.path))
        if not resume:
            check_free(self.path)
        elif not self._is_new:
            check_same(self._name, checkpoint.read_json(self._name), self.identity)
        checkpoint.check_writable(self.path)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends one row to metrics.jsonl.

        Raises:
            ValueError: another run has taken the folder meanwhile.
        """
        if self._is_new:
            self.path.mkdir(parents=True, exist_ok=True)
            check_free(self.path)
            write_whole(self._name, json.dumps(self.identity, indent=1) + "\n")
            self._is_new = False
        with self.log_path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def forget_after(self, iteration: int) -> None:
        """Drops the rows past an iteration, and a last row cut short: they will be made again."""
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text().splitlines(keepends=True)
        try:
            rows = [(line, json.loads(line)["iteration"]) for line in lines if line.endswith("\n")]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"run: {self.log_path} must hold one JSON row per iteration, got {error!r}"
            ) from error
        kept = [line for line, done in rows if done <= iteration]
        write_whole(self.log_path, "".join(kept if iteration else []))


def identity(
    config: TrainerConfig, recipe: Recipe, prompts: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what a resumed run must agree on; its length and its outputs are free."""
    settings = dataclasses.asdict(config)
    text = "\n".join(prompts).encode()
    return {
        "recipe": {"name": recipe.name, **recipe.options},
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(text).hexdigest()},
        "config": {k: v for k, v in settings.items() if k not in _FREE_TO_CHANGE},
        "facts": dict(facts),
    }


def _occupied(path: Path) -> bool:
    files = (path / "run.json", path / "metrics.jsonl")
    return any(file.exists() for file in files) or checkpoint.latest(path) is not None


def check_free(path: Path) -> None:
    """Raises ValueError if a folder holds a run."""
    if _occupied(path):
        raise ValueError(
            f"run: out must be a new folder, got {path} with another run; "
            "try --resume or another folder"
        )


def check_same(where: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ValueError unless the identity at `where` is this run's."""
    for key in mine:
        if theirs.get(key) != mine[key]:
            got, wanted = _difference(theirs.get(key), mine[key])
            raise ValueError(
                f"run: {where} must be of a run with the same {key}, got {got} "
                f"where this one has {wanted}; try another folder"
            )


def _difference(theirs: Any, mine: Any) -> tuple[Any, Any]:
    """Returns what differs, of two mappings only the entries that do."""
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        return theirs, mine
    ours, others = cast("dict[str, Any]", mine), cast("dict[str, Any]", theirs)
    names = [k for k in {**others, **ours} if others.get(k, ...) != ours.get(k, ...)]
    return {k: others.get(k) for k in names}, {k: ours.get(k) for k in names}


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    os.replace(partial, path)
