"""The checkpoints of a run: saved in the background, loaded on any number of ranks."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from branchcore.checkpoint import folders
from branchcore.checkpoint.index import Index, check_entries, check_files, read_index
from branchcore.checkpoint.tensors import Tensors

T = TypeVar("T")
_log = logging.getLogger("branchcore")


class _Pending(NamedTuple):
    folder: Path
    saving: Future[Any]


class Checkpoints:
    """Saves, finds and loads the checkpoints of a run.

    Every method is a collective: all ranks of `torch.distributed`'s default group call it, in the
    same order; where there is no group, this process is alone. One save at a time runs in the
    background; every other method waits for it first.

    Args:
        folder: of the run.
        keep: checkpoints to keep, at least 1; older ones go when a new one is whole.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if many else 0
        self.world_size = dist.get_world_size() if many else 1
        # of its own: collectives of the background must not mix with those of the training
        group = dist.new_group(backend="gloo") if many else None
        self._group = cast("dist.ProcessGroup | None", group)
        self._pending: _Pending | None = None

    def save(
        self, iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Starts a checkpoint; when this returns, the tensors may change.

        Args:
            iteration: completed iterations.
            tensors: groups of tensors by name; plain ones are the same on all ranks, DTensors may
                be sharded.
            state: JSON-serialisable facts that a resumed run must agree on; the first rank's count.

        Returns:
            The checkpoint's folder, which is there when `wait` has returned.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        # torch.distributed.checkpoint takes a second to import; only runs that save pay for it
        from branchcore.checkpoint import storage

        self.wait()
        folder = folders.folder_of(self.folder, iteration)
        partial, keep = folders.partial_of(folder), self.keep
        head = {"format": folders.FORMAT, "iteration": iteration}
        text = json.dumps({**head, **state}, indent=1)

        def complete(index: Index) -> None:
            folders.write_synced(partial / "index.json", index.text())
            folders.write_synced(partial / "state.json", text)
            folders.publish(partial, folder, keep)

        saving = storage.start_saving(_flat(tensors), partial, complete, self._group)
        self._pending = _Pending(folder, saving)
        return folder

    def wait(self) -> None:
        """Waits for the checkpoint in the background to be whole.

        Raises:
            OSError: a rank could not write it (disk full, say); the last whole one is still there.
            RuntimeError: a rank is gone, or the tensors cannot be saved.
        """
        if self._pending is None:
            return
        from branchcore.checkpoint import storage

        folder, saving = self._pending
        try:
            failed = storage.failures(saving)
        finally:
            if saving.done():
                self._pending = None
        if failed:
            if self.rank == 0:
                shutil.rmtree(folders.partial_of(folder), ignore_errors=True)
            whole = folders.latest(self.folder)
            raise OSError(
                f"checkpoint: {folder} must be written whole, got {'; '.join(failed)}; "
                f"the newest whole checkpoint is {whole.name if whole else 'none'}"
            )

    def end(self, error: BaseException) -> None:
        """Waits for the checkpoint in the background; what goes wrong with it is only noted.

        Args:
            error: for which the run ends.
        """
        try:
            self.wait()
        except (RuntimeError, OSError) as second:
            _log.warning("%s; the run ends because of: %s", second, error)

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint, None if there is none; the first rank looks."""
        self.wait()
        return self.gather(folders.latest(self.folder))[0]

    def tidy(self) -> None:
        """Removes what a crash left half-written."""
        self.wait()
        if self.rank == 0:
            folders.tidy(self.folder)

    def load_state(self, folder: Path) -> dict[str, Any]:
        """Reads a checkpoint's state.json.

        Raises:
            ValueError: not a checkpoint of this format, or damaged.
        """
        return self._agreed(lambda: folders.load_state(folder))

    def names(self, folder: Path, group: str) -> list[str]:
        """Returns the names of a checkpoint's group.

        Raises:
            ValueError: the index is missing or damaged.
        """
        return [*self._agreed(lambda: read_index(folder)).group(group)]

    def load_into(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fills tensors from a checkpoint, however many ranks wrote it; checks all of them before.

        Args:
            folder: the checkpoint.
            tensors: as of `save`; groups that are not asked for are not read.

        Raises:
            ValueError: missing, damaged, or of another model; no tensor has changed.
            OSError: the disk failed while it was read.
        """
        from branchcore.checkpoint import storage

        index = self._agreed(lambda: self._checked(folder, tensors))
        failure = storage.load(_flat(tensors), folder, index, self._group)

        def say() -> None:
            if failure is not None:
                raise OSError(failure)

        self._agreed(say)

    def gather(self, value: T) -> list[T]:
        """Returns everybody's value, by rank; small things only."""
        self.wait()
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _checked(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> Index:
        index = read_index(folder)
        for group, like in tensors.items():
            check_entries(folder / group, index.group(group), like)
        # every file once, not once per rank
        check_files(folder, index, sorted(index.files)[self.rank :: self.world_size])
        return index

    def _agreed(self, act: Callable[[], T]) -> T:
        """Returns what an action returns; what it raises on one rank, it raises on all."""
        try:
            value, error = act(), None
        except (ValueError, OSError) as raised:
            value, error = None, raised
        if self._group is None and error is not None:
            raise error
        said = self.gather(None if error is None else (isinstance(error, OSError), str(error)))
        failed = [(rank, found) for rank, found in enumerate(said) if found is not None]
        if failed:
            rank, (is_os, text) = failed[0]
            raise (OSError if is_os else ValueError)(f"{text} (rank {rank})") from error
        return cast("T", value)


def load_group(folder: Path, group: str) -> Tensors:
    """Reads all tensors of one group onto the CPU of this process.

    Raises:
        ValueError: missing or damaged.
    """
    from branchcore.checkpoint import storage

    index = read_index(folder)
    held = index.group(group)
    if not held:
        raise ValueError(f"checkpoint: {folder} must hold {group}, got no such group")
    check_files(folder, index, {piece.file for entry in held.values() for piece in entry.pieces})
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in held.items()}
    failure = storage.load(_flat({group: tensors}), folder, index, None)
    if failure is not None:
        raise OSError(failure)
    return tensors


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """Returns all tensors by `group.name`."""
    return {f"{group}.{k}": t.detach() for group, of in tensors.items() for k, t in of.items()}
