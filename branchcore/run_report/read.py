"""Reads the folder of a run, finished or not, whole or not; says what it could not read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from branchcore.run_records import SAMPLES, SESSIONS, TREES, recorded
from branchcore.run_report.markup import KINDS

Row = dict[str, Any]


class Grid(NamedTuple):
    """Samples of the same noise over a run."""

    prompts: tuple[str, ...]
    """Of the rows."""
    aspect: float
    """Width of a row over its height."""
    pixelated: bool
    """Tiny pictures, to be enlarged pixel by pixel."""
    files: dict[int, Path]
    """By iteration, in order."""


class Run(NamedTuple):
    """What is known of a run."""

    path: Path
    rows: list[Row]
    """Whole rows of metrics.jsonl by iteration, in order."""
    identity: Row
    """run.json; empty if there is none."""
    sessions: list[Row]
    """Starts of the run."""
    trees: dict[int, Row]
    """First prompt's tree by iteration."""
    grid: Grid | None
    notes: tuple[str, ...]
    """What is missing or damaged, in sentences."""

    @property
    def done(self) -> int:
        """The last iteration that was logged."""
        return int(self.rows[-1]["iteration"])

    @property
    def goal(self) -> int | None:
        """Iterations of the whole run, None if it is not known."""
        goal = self.sessions[-1].get("iterations") if self.sessions else None
        return goal if isinstance(goal, int) else None

    @property
    def components(self) -> list[str]:
        """Names of the reward's components."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name.removeprefix("reward/") for name in names if name.startswith("reward/")]

    def values(self, name: str) -> list[tuple[int, float]]:
        """Returns (iteration, value) where a metric is a number."""
        found = ((row["iteration"], row.get(name)) for row in self.rows)
        return [(at, float(v)) for at, v in found if isinstance(v, (int, float))]


def read_run(path: Path) -> Run:
    """Reads a run.

    Args:
        path: its folder.

    Raises:
        ValueError: no folder, no run, or no whole row yet.
    """
    if not path.is_dir():
        raise ValueError(f"report: run must be the folder of a run, got {path}: no such folder")
    log, name = path / "metrics.jsonl", path / "run.json"
    if not log.is_file():
        begun = name.is_file()
        got = "a run without a row" if begun else "a folder without metrics.jsonl"
        fix = "after its first iteration" if begun else "a folder that `train --out` made"
        raise ValueError(f"report: run must be the folder of a run, got {path}: {got}; try {fix}")
    notes: list[str] = []
    rows = _rows(log, notes)
    if not rows:
        raise ValueError(
            f"report: {log} must hold at least one whole row, got none; try after the first "
            "iteration"
        )
    last = rows[-1]["iteration"]
    identity = _object(name, notes, "the configuration is not known")
    sessions: list[Row] = []
    if (path / SESSIONS).is_file():
        sessions = _lines(path / SESSIONS, notes)
    return Run(
        path, rows, identity, sessions, _trees(path, last, notes), _grid(path, notes), (*notes,)
    )


def _lines(path: Path, notes: list[str]) -> list[Row]:
    """Returns the JSON objects of a file's lines and notes how many lines are none."""
    lines = path.read_bytes().splitlines()
    found = [_parsed(line) for line in lines if line.strip()]
    bad = sum(row is None for row in found)
    if bad:
        notes.append(f"{bad} of {len(found)} rows of {path.name} were damaged and are left out.")
    return [row for row in found if row is not None]


def _rows(log: Path, notes: list[str]) -> list[Row]:
    """Returns the rows of a log in order; of rows of the same iteration the last one."""
    known: list[Row] = []
    nameless = 0
    for row in _lines(log, notes):
        at = row.get("iteration")
        whole = isinstance(at, int) and not isinstance(at, bool) and at >= 0
        nameless += not whole
        known += [row] if whole else []
    if nameless:
        notes.append(f"{nameless} rows of {log.name} have no iteration and are left out.")
    by_iteration = {row["iteration"]: row for row in known}
    return [by_iteration[at] for at in sorted(by_iteration)]


def _parsed(text: bytes) -> Row | None:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return cast("Row", value) if isinstance(value, dict) else None


def _object(path: Path, notes: list[str], without: str) -> Row:
    if not path.is_file():
        notes.append(f"{path.name} is missing: {without}.")
        return {}
    value = _parsed(path.read_bytes())
    if value is None:
        notes.append(f"{path.name} is damaged: {without}.")
    return value or {}


_TREE = {"parent", "sigma", "stochastic", "train", "advantage", "pruned", "stopped"}
_LEAVES = {"leaves", "rewards", "components", "reward_weights", "prompt"}


def _trees(run: Path, last: int, notes: list[str]) -> dict[int, Row]:
    trees: dict[int, Row] = {}
    for at, path in recorded(run, TREES).items():
        if at > last:  # its row is yet to come
            continue
        tree = _parsed(path.read_bytes())
        if tree is None or not _is_tree(tree):
            notes.append(f"{TREES}/{path.name} is damaged and left out.")
        else:
            trees[at] = tree
    return trees


def _is_tree(tree: Mapping[str, Any]) -> bool:
    """Tells whether a record can be drawn: columns of one length, parents before children."""
    if not tree.keys() >= _TREE | _LEAVES or not isinstance(tree["prompt"], str):
        return False
    columns: list[Any] = [tree[name] for name in sorted(_TREE | _LEAVES - {"prompt"})]
    if not all(isinstance(column, list) for column in columns):
        return False
    size, names = len(tree["parent"]), len(tree["components"])
    return (
        size > 0
        and all(len(tree[name]) == size for name in _TREE)
        and all(isinstance(up, int) and -1 <= up < i for i, up in enumerate(tree["parent"]))
        and all(isinstance(leaf, int) and 0 <= leaf < size for leaf in tree["leaves"])
        and len(tree["rewards"]) == len(tree["leaves"])
        and len(tree["reward_weights"]) == names
        and all(isinstance(row, list) and len(row) == names for row in tree["rewards"])
        and _are_numbers(tree["sigma"])
        and _are_numbers(tree["advantage"])
        and _are_numbers(tree["reward_weights"])
        and all(_are_numbers(row) for row in tree["rewards"])
    )


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(x is None or isinstance(x, (int, float)) for x in values)


def _grid(run: Path, notes: list[str]) -> Grid | None:
    files = {at: path for at, path in recorded(run, SAMPLES).items() if path.suffix in KINDS}
    if not files:
        return None
    facts = _object(run / SAMPLES / "grid.json", notes, "samples are left out")
    prompts, aspect = facts.get("prompts"), facts.get("aspect")
    if not isinstance(prompts, list) or not isinstance(aspect, float) or not aspect > 0.0:
        return None
    texts = tuple(str(prompt) for prompt in cast("list[Any]", prompts))
    return Grid(texts, aspect, facts.get("pixelated") is True, files)
