"""Checkpoints: safetensors and JSON, written whole or not at all; nothing pickled is ever read.

A checkpoint is a folder `checkpoint-000040`:

    state.json                      what the run must agree on when it goes on
    index.json                      shape, dtype and pieces of every tensor
    model/rank-00000.safetensors    what a rank wrote of a group of tensors, under their own names
    optimizer/ ema/ sampler/ masters/

`torch.distributed.checkpoint` plans who writes and reads which piece, so a checkpoint of four
ranks, plain or sharded, loads on any other number. The base of a LoRA is in none of the groups.
Files are written in the background under another name, which is renamed when all of them are on
disk: a crash at any moment leaves the last whole one.
"""

from branchcore.checkpoint.folders import (
    FORMAT,
    check_writable,
    folder_of,
    latest,
    load_state,
    read_json,
    require,
)
from branchcore.checkpoint.index import Index, read_index
from branchcore.checkpoint.saving import Checkpoints, load_group
from branchcore.checkpoint.tensors import (
    check_like,
    load_optimizer,
    moments,
    optimizer_tensors,
    trained,
)

__all__ = [
    "FORMAT",
    "Checkpoints",
    "Index",
    "check_like",
    "check_writable",
    "folder_of",
    "latest",
    "load_group",
    "load_optimizer",
    "load_state",
    "moments",
    "optimizer_tensors",
    "read_index",
    "read_json",
    "require",
    "trained",
]
