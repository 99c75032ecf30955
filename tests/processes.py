"""Runs a function in several processes that torch.distributed joins over gloo."""

import os
import pickle
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp

from branchcore.distributed import joined

# test modules are `tests.<name>` to pytest, and must be so to the processes
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# imported once, by the server that all processes are forked from
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.tensor", "branchcore.trainer"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _main(rank, world_size, port, function, args, folder, timeout_s):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        with joined("cpu", timeout_s) as ranks:
            result = True, function(ranks, *args)
    except Exception as error:
        traceback.print_exc()
        result = False, f"{type(error).__name__}: {error}"
    (folder / str(rank)).write_bytes(pickle.dumps(result))


def run(world_size, function, *args, timeout_s=60.0):
    """Returns (ok, result or error) of every rank, in order; fails if one does not end in time."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, found = free_port(), [(False, "gone")] * world_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_main, args=(rank, world_size, port, function, args, folder, timeout_s)
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout_s + 600.0)
                assert not process.is_alive(), "a process hangs"
        finally:
            for process in processes:
                process.kill()
        for rank in range(world_size):
            if (folder / str(rank)).exists():
                found[rank] = pickle.loads((folder / str(rank)).read_bytes())
    return found


def values(world_size, function, *args, **options):
    """Returns every rank's result; all must succeed."""
    found = run(world_size, function, *args, **options)
    assert all(ok for ok, _ in found), found
    return [value for _, value in found]
