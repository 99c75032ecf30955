"""Saves on four processes and loads on eight, two and one; run as a script by test_checkpoint.

Every process checks for itself and fails loudly; tensors are small, uneven and partly empty.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from branchcore import checkpoint
from branchcore.checkpoint import Checkpoints, folders, storage
from branchcore.ema import Ema
from branchcore.masters import Masters

SIZES = {"even": (16, 4), "uneven": (5, 3), "short": (2, 2), "flat": (7,), "wide": (3, 40)}


def wholes():
    """The tensors, the same on every process."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def sharded(world, dim=0):
    mesh = init_device_mesh("cpu", (world,))
    at = {name: min(dim, len(size) - 1) for name, size in SIZES.items()}
    return {k: distribute_tensor(t, mesh, [Shard(at[k])]) for k, t in wholes().items()}


def hybrid(world):
    """Sharded in pairs, replicated over the pairs."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    return {k: distribute_tensor(t, mesh, [Replicate(), Shard(0)]) for k, t in wholes().items()}


def equal(found, wanted):
    for name, tensor in wanted.items():
        whole = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        assert torch.equal(whole, tensor), name


def network(seed, world):
    """A small network under FSDP2, its optimizer after two steps, its masters and its average."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(5, 3), torch.nn.SiLU(), torch.nn.Linear(3, 7)]
    module = torch.nn.Sequential(*layers)
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    masters = Masters(module)
    optimizer = torch.optim.AdamW(masters.parameters, lr=0.1)
    return module, optimizer, Ema(module, 0.5)


def train(module, optimizer, ema, steps):
    for _ in range(steps):
        x = torch.full((2, 5), 0.1 * (ema.updates + 1))
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()


def state_of(module, optimizer, ema):
    moments = checkpoint.optimizer_tensors(optimizer)
    return {"model": checkpoint.trained(module), "ema": ema.tensors(), "optimizer": moments}


def save(out, rank, world):
    """Four processes: plain, sharded and hybrid tensors and a network; training goes on."""
    checkpoints = Checkpoints(out / "run", keep=3)
    tensors = {"plain": wholes(), "rows": sharded(world), "columns": sharded(world, 1)}
    tensors["hybrid"] = hybrid(world)
    trained = network(0, world)
    train(*trained, 2)
    tensors |= state_of(*trained)
    kept = {
        f"{group}.{name}": (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for group, of in tensors.items()
        for name, t in of.items()
    }
    checkpoints.save(1, tensors, {"rank": rank})
    # collectives of the training while the background has its own, and weights that move on
    train(*trained, 1)
    kept |= {f"next.{name}": t.full_tensor().clone() for name, t in trained[2].tensors().items()}
    for of in tensors.values():
        for tensor in of.values():
            tensor.detach().fill_(-1.0)
    folder = checkpoints.latest()
    assert folder == out / "run" / "checkpoint-000001"
    assert checkpoints.load_state(folder)["rank"] == 0
    if rank == 0:
        torch.save(kept, out / "kept.pt")
        written = sorted(p.parent.name + p.name[4:10] for p in folder.rglob("*.safetensors"))
        assert [w for w in written if w.startswith("rows")] == [f"rows-0000{i}" for i in range(4)]
        # what all have is written once, and the work is shared
        assert len([w for w in written if w.startswith("plain")]) > 1
        held = checkpoint.read_index(folder).group("plain")
        assert all(len(entry.pieces) == 1 for entry in held.values())
    fail(out, rank, checkpoints)


def fail(out, rank, checkpoints):
    """The disk of rank 2 is full: an error on all, no checkpoint, and the next save works."""
    real, tensors = storage.write_file, {"rows": sharded(4)}

    def full(path, parts):
        path.write_bytes(b"cut")
        raise OSError(28, "No space left on device")

    if rank == 2:
        storage.write_file = full
    checkpoints.save(2, tensors, {})
    try:
        checkpoints.wait()
    except OSError as error:
        said = str(error)
    assert "checkpoint-000002 must be written whole, got No space left on device on rank 2" in said
    assert said.endswith("the newest whole checkpoint is checkpoint-000001")
    assert folders.latest(out / "run").name == "checkpoint-000001"
    storage.write_file = real
    checkpoints.save(3, tensors, {})
    assert checkpoints.latest().name == "checkpoint-000003"
    if rank == 0:
        assert not [*(out / "run").glob(".partial*")]


def load(out, rank, world):
    """Any number of processes: every layout from every other."""
    checkpoints = Checkpoints(out / "run", keep=3)
    folder = out / "run" / "checkpoint-000001"
    layouts = {"dim 0": sharded(world), "dim 1": sharded(world, 1)} if world > 1 else {}
    layouts["plain"] = wholes()
    for group in ("plain", "rows", "columns", "hybrid"):
        for layout, tensors in layouts.items():
            for tensor in tensors.values():
                tensor.fill_(float("nan"))
            checkpoints.load_into(folder, {group: tensors})
            equal(tensors, wholes())
            assert layout == "plain" or all(isinstance(t, DTensor) for t in tensors.values())
    kept = torch.load(out / "kept.pt")
    resume(checkpoints, folder, world, kept)
    refuse(out, rank, checkpoints)


def resume(checkpoints, folder, world, kept):
    """A network of other weights goes on as the saved one."""
    module, optimizer, ema = network(1, world)
    moments = checkpoint.moments(
        optimizer.param_groups[0]["params"], checkpoints.names(folder, "optimizer")
    )
    tensors = {"model": checkpoint.trained(module), "ema": ema.tensors(), "optimizer": moments}
    checkpoints.load_into(folder, tensors)
    checkpoint.load_optimizer(optimizer, moments)
    for group, of in state_of(module, optimizer, ema).items():
        wanted = {k[len(group) + 1 :]: t for k, t in kept.items() if k.startswith(f"{group}.")}
        assert set(of) == set(wanted)
        equal(of, wanted)
    ema.updates = 2
    train(module, optimizer, ema, 1)
    for name, tensor in ema.tensors().items():
        torch.testing.assert_close(tensor.full_tensor(), kept[f"next.{name}"], atol=1e-6, rtol=0)


def refuse(out, rank, checkpoints):
    """A file that only one process finds damaged is an error on all, and changes nothing."""
    folder = out / "run" / "checkpoint-000003"
    tensors = {"rows": wholes()}
    if rank == 0:
        index = json.loads((folder / "index.json").read_text())
        index["files"][min(index["files"])] += 1
        (folder / "index.json").write_text(json.dumps(index))
    checkpoints.gather(None)
    try:
        checkpoints.load_into(folder, tensors)
    except ValueError as error:
        said = str(error)
    assert "must be whole safetensors of" in said, said
    equal(tensors["rows"], wholes())
    checkpoints.gather(None)
    if rank == 0:
        index["files"][min(index["files"])] -= 1
        (folder / "index.json").write_text(json.dumps(index))


def main(rank, out):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost"}
    for world, act in ((4, save), (8, load), (2, load), (1, load)):
        if rank < world:
            store = dist.FileStore(str(out / f"store-{world}"), world)
            limit = timedelta(seconds=60)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
            act(out, rank, world)
            dist.barrier()
            dist.destroy_process_group()
        # the others come when these are done
        (out / f"done-{world}-{rank}").touch()
        while not all((out / f"done-{world}-{i}").exists() for i in range(world)):
            time.sleep(0.005)


if __name__ == "__main__":
    mp.start_processes(main, args=(Path(sys.argv[1]),), nprocs=8, start_method="fork")
    print("all ranks agree")
