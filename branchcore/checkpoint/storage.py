"""Where `torch.distributed.checkpoint` (DCP) puts tensors: safetensors files, no pickle.

DCP decides which rank writes and reads which piece. Its own formats do not serve: `.metadata` of
the default one is a pickle. `HuggingFaceStorageWriter` builds a rank's whole file in memory while
it holds the interpreter lock (1 GiB of tensors, 2 cores, torch 2.13: training stands still for 1.0
to 3.4 s and 2.0 GiB are held; here 0.02 s and 1.0 GiB) and keeps no list of pieces, so its reader
takes a lost file for a smaller tensor. What is written here is what `HuggingFaceStorageReader`
reads, one group at a time.

Disk errors come back as values, not as exceptions: DCP sends exceptions between ranks with their
traceback, which Python 3.13 cannot pickle before torch 2.13.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from branchcore.checkpoint.folders import free_bytes
from branchcore.checkpoint.index import Entry, Index, Piece
from branchcore.checkpoint.stream import Part, write_file

T = TypeVar("T")
Group = dist.ProcessGroup | None


def start_saving(
    tensors: Mapping[str, Tensor], partial: Path, complete: Callable[[Index], None], group: Group
) -> futures.Future[Metadata]:
    """Copies tensors to the CPU and returns while they are being written.

    Args:
        tensors: by `group.name`; plain ones are the same on all ranks, DTensors may be sharded.
        partial: folder to write to; emptied first.
        complete: called on the first rank when all ranks' files are on disk.
        group: of all ranks, over the CPU, for nobody else while this runs; None = one process.
    """
    _no_warning()
    started = async_save(
        dict(tensors),
        storage_writer=_Writer(partial, complete),
        # the copy is complete when async_save returns: training may go on
        async_stager=BlockingAsyncStager(),
        process_group=group,
        no_dist=group is None,
    )
    return cast("futures.Future[Metadata]", started)


def failures(saving: futures.Future[Metadata]) -> list[str]:
    """Waits for a saving to end; returns what went wrong on which rank, the same on all.

    Raises:
        RuntimeError: a rank is gone, or DCP refuses the tensors.
    """
    try:
        return cast("list[str]", saving.result().storage_data)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"checkpoint: must be saved, got {cause!r} on rank {rank}") from error
    except RuntimeError as error:
        raise RuntimeError(
            "checkpoint: every rank must write its part, but one is gone "
            f"({str(error).splitlines()[0]}); the last whole checkpoint is still there"
        ) from error


def load(tensors: Mapping[str, Tensor], folder: Path, index: Index, group: Group) -> str | None:
    """Fills tensors, each rank its own part; returns what went wrong on this one.

    Args:
        tensors: by `group.name`, of the shapes and dtypes of the index.
        folder: the checkpoint.
        index: of the checkpoint.
        group: of all ranks, over the CPU; None = one process.
    """
    _no_warning()
    reader = _Reader(folder, index)
    load_planned(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    return reader.failure


def _no_warning() -> None:
    """One process needs no process group, whatever DCP says about it."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _Written(NamedTuple):
    file: str
    size: int


class _Writer(StorageWriter):
    """Writes `partial/group/rank-00000.safetensors`; see `start_saving`."""

    def __init__(self, partial: Path, complete: Callable[[Index], None]) -> None:
        self.partial, self.complete = partial, complete

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Removes what is in the way; no rank writes before all have been here."""
        if is_coordinator:
            shutil.rmtree(self.partial, ignore_errors=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Changes nothing."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells every rank its number."""
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes a rank's part and waits until it is on disk."""
        rank, groups = cast("int", plan.storage_data), dict[str, list[WriteItem]]()
        for item in plan.items:
            groups.setdefault(item.index.fqn.split(".", 1)[0], []).append(item)
        parts = {k: [_part(item, planner) for item in items] for k, items in groups.items()}
        done: list[WriteResult] = []
        try:
            for group, items in groups.items():
                file = f"{group}/rank-{rank:05d}.safetensors"
                (self.partial / group).mkdir(parents=True, exist_ok=True)
                written = _Written(file, write_file(self.partial / file, parts[group]))
                done += [WriteResult(item.index, written.size, written) for item in items]
        except OSError as error:
            size = sum(part.num_bytes for of_group in parts.values() for part in of_group)
            said = f"{error.strerror or error} on rank {rank}, {size} bytes to write and "
            said += f"{free_bytes(self.partial)} free"
            done = [WriteResult(MetadataIndex(""), 0, said)]
        return _done(done)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Makes the checkpoint whole if all ranks wrote theirs; all ranks get `storage_data`."""
        done = [result for of_rank in results for result in of_rank]
        failed = [r.storage_data for r in done if isinstance(r.storage_data, str)]
        if not failed:
            try:
                self.complete(self._index(metadata, done))
            except OSError as error:
                failed = [f"{error.strerror or error} on rank 0, {free_bytes(self.partial)} free"]
        metadata.storage_data = failed

    def _index(self, metadata: Metadata, results: Sequence[WriteResult]) -> Index:
        files = {r.storage_data.file: r.storage_data.size for r in results}
        for file, size in files.items():
            path = self.partial / file
            if not path.is_file() or path.stat().st_size != size:
                raise OSError(f"no {file} although its rank wrote it (do all ranks see one disk?)")
        file_of = {r.index: r.storage_data.file for r in results}
        tensors: dict[str, Entry] = {}
        for name, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            pieces = (
                Piece(file_of[MetadataIndex(name, c.offsets)], tuple(c.offsets), tuple(c.sizes))
                for c in known.chunks
            )
            tensors[name] = Entry(known.properties.dtype, tuple(known.size), tuple(pieces))
        return Index(files, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tells folders from addresses."""
        return isinstance(checkpoint_id, Path)


def _part(item: WriteItem, planner: SavePlanner) -> Part:
    known = item.tensor_data
    assert known is not None
    name, dtype = item.index.fqn.split(".", 1)[1], known.properties.dtype
    box = tuple(known.chunk.offsets), tuple(known.chunk.sizes)
    return Part(name, dtype, *box, read=lambda: cast("Tensor", planner.resolve_data(item)))


class _Reader(StorageReader):
    """Reads what `_Writer` wrote, each rank only what it needs; see `load`."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self.failure: str | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a reader reads once."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Returns the index as DCP wants it."""
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [
                    ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.shape))
                    for p in entry.pieces
                ],
            )
            for name, entry in self.index.tensors.items()
        }
        return Metadata(cast("Any", tensors))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any
    ) -> None:
        """Does nothing: the index is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Changes nothing."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Changes nothing."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads a rank's part into its tensors, file by file."""
        file_of = {
            MetadataIndex(name, piece.offset): piece.file
            for name, entry in self.index.tensors.items()
            for piece in entry.pieces
        }
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(file_of[item.storage_index], []).append(item)
        try:
            for file, items in files.items():
                with safe_open(self.folder / file, "pt") as held:
                    for item in items:
                        _read(held, item, planner)
        except (SafetensorError, OSError) as error:
            self.failure = f"checkpoint: {self.folder} must be readable, got {error}"
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tells folders from addresses."""
        return isinstance(checkpoint_id, Path)


def _read(held: Any, item: ReadItem, planner: LoadPlanner) -> None:
    name = item.storage_index.fqn.split(".", 1)[1]
    spans = zip(item.storage_offsets, item.lengths, strict=True)
    box = tuple(slice(start, start + length) for start, length in spans)
    target = planner.resolve_tensor(item).detach()
    # a number has no slices
    target.copy_(held.get_slice(name)[box] if box else held.get_tensor(name))
    planner.commit_tensor(item, target)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
