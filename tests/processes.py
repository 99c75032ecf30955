"""Runs a function in several processes that torch.distributed joins over gloo."""

import os
import socket
import traceback

import torch
import torch.multiprocessing as mp

from branchcore.distributed import joined


# imported once, by the server that all processes are forked from
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.tensor", "branchcore.trainer"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _main(rank, world_size, port, function, args, results, timeout_s):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        with joined("cpu", timeout_s) as ranks:
            results.put((rank, True, function(ranks, *args)))
    except Exception as error:
        traceback.print_exc()
        results.put((rank, False, f"{type(error).__name__}: {error}"))


def run(world_size, function, *args, timeout_s=60.0):
    """Returns (ok, result or error) of every rank, in order; fails if one does not end in time."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(
            target=_main, args=(rank, world_size, port, function, args, results, timeout_s)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for process in processes:
            process.join(timeout_s + 60.0)
            assert not process.is_alive(), "a process hangs"
        while not results.empty():
            rank, ok, value = results.get()
            found[rank] = (ok, value)
    finally:
        for process in processes:
            process.kill()
    return [found.get(rank, (False, "gone")) for rank in range(world_size)]


def values(world_size, function, *args, **options):
    """Returns every rank's result; all must succeed."""
    found = run(world_size, function, *args, **options)
    assert all(ok for ok, _ in found), found
    return [value for _, value in found]
