"""Checkpoints: exact, written whole or not at all, on any number of ranks, without a pickle."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from branchcore import checkpoint
from branchcore.checkpoint import Checkpoints, folders, saving, storage, stream
from branchcore.run_folder import RunFolder

HERE = Path(__file__).resolve().parent


def script(name, *words):
    """Runs a script beside this file; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(HERE / name), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def every_kind():
    """Groups with every dtype, numbers, empty tensors, views and tied weights."""
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    floats += (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    model = {str(dtype): torch.randn(3, 2).to(dtype) for dtype in floats}
    model |= {str(dtype): torch.randint(0, 2, (5,)).to(dtype) for dtype in whole}
    model |= {"number": torch.tensor(3.5), "empty": torch.zeros(0, 4), "nan": base.log()}
    model |= {"view": base.T[::2], "tied.a": base, "tied.b": base}
    model["channels"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return {"model": model, "ema": {"view": base + 1.0}}


def other(tensor):
    """A tensor like this one, of other bytes."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    found.reshape(-1).view(torch.uint8).fill_(1)
    return found


def like(tensors):
    return {group: {name: other(t) for name, t in of.items()} for group, of in tensors.items()}


def bits(tensor):
    return tensor.shape, tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def small(value):
    return {"model": {"w": torch.full((3, 2), float(value))}, "ema": {"w": torch.zeros(2)}}


def saved(out, *iterations, keep=2):
    checkpoints = Checkpoints(out, keep)
    for iteration in iterations:
        checkpoints.save(iteration, small(iteration), {"note": "x"})
    checkpoints.wait()
    return checkpoints


def names(out):
    return sorted(path.name for path in out.iterdir())


# what is written is what is read


def test_a_round_trip_is_exact(tmp_path):
    tensors, state = every_kind(), {"a": [1.5, None], "text": "é"}
    checkpoints = Checkpoints(tmp_path, 2)
    folder = checkpoints.save(40, tensors, state)
    checkpoints.wait()
    assert folder == checkpoints.latest() == checkpoint.latest(tmp_path)
    assert folder == tmp_path / "checkpoint-000040"
    assert checkpoints.load_state(folder) == {"format": checkpoint.FORMAT, "iteration": 40, **state}
    found = like(tensors)
    checkpoints.load_into(folder, found)
    for group, of in tensors.items():
        assert {k: bits(t) for k, t in found[group].items()} == {k: bits(t) for k, t in of.items()}
        alone = checkpoint.load_group(folder, group)
        assert {k: bits(t) for k, t in alone.items()} == {k: bits(t) for k, t in of.items()}
    assert checkpoints.names(folder, "ema") == ["view"]


def test_only_what_is_asked_for_is_read(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "checkpoint-000001" / "model" / "rank-00000.safetensors").unlink()
    assert torch.equal(checkpoint.load_group(checkpoints.latest(), "ema")["w"], torch.zeros(2))
    with pytest.raises(ValueError, match=r"must hold masters, got no such group"):
        checkpoint.load_group(checkpoints.latest(), "masters")


def test_a_group_is_what_torch_itself_reads(tmp_path):
    tensors = every_kind()["model"]
    checkpoints = Checkpoints(tmp_path, 2)
    folder = checkpoints.save(1, {"model": tensors}, {})
    checkpoints.wait()
    found = like({"model": tensors})["model"]
    load(found, storage_reader=HuggingFaceStorageReader(folder / "model"))
    assert {k: bits(t) for k, t in found.items()} == {k: bits(t) for k, t in tensors.items()}


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    folder, found = checkpoints.latest(), small(0)
    assert checkpoints.load_state(folder)["note"] == "x"
    checkpoints.load_into(folder, found)
    assert torch.equal(found["model"]["w"], small(1)["model"]["w"])
    assert checkpoint.load_group(folder, "ema")
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_what_safetensors_does_not_know_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"model": {"z": torch.zeros(2, dtype=torch.complex128)}}, {})
    with pytest.raises(RuntimeError, match=r"z must be one of .*, got torch.complex128"):
        checkpoints.wait()
    part = stream.Part("a", torch.float32, (0,), (1,), lambda: torch.zeros(1))
    with pytest.raises(NotImplementedError, match="must hold a once, got twice"):
        stream.write_file(tmp_path / "x", [part, part])


# in the background


@pytest.fixture
def held_back(monkeypatch):
    """Files are written only after the event is set."""
    event, real = threading.Event(), storage.write_file

    def late(path, parts):
        assert event.wait(30)
        return real(path, parts)

    monkeypatch.setattr(storage, "write_file", late)
    yield event
    event.set()


def test_training_goes_on_and_the_next_save_waits(tmp_path, held_back):
    checkpoints, tensors = Checkpoints(tmp_path, 2), small(1)
    weight = torch.nn.Parameter(tensors["model"]["w"])
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    tensors = {"model": {"w": weight}, "optimizer": checkpoint.optimizer_tensors(optimizer)}
    before = {name: {k: t.detach().clone() for k, t in of.items()} for name, of in tensors.items()}
    checkpoints.save(1, tensors, {})
    optimizer.step()
    assert checkpoint.latest(tmp_path) is None
    second = threading.Thread(target=checkpoints.save, args=(2, tensors, {}))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    held_back.set()
    second.join()
    assert checkpoints.latest().name == "checkpoint-000002"
    for iteration, wanted in ((1, before), (2, tensors)):
        found = like(before)
        checkpoints.load_into(folders.folder_of(tmp_path, iteration), found)
        for group, of in wanted.items():
            assert all(torch.equal(found[group][k], t) for k, t in of.items()), (iteration, group)
    assert not torch.equal(before["optimizer"]["0.step"], tensors["optimizer"]["0.step"])
    assert not torch.equal(before["model"]["w"], weight)


def test_old_ones_go_only_when_the_new_one_is_whole(tmp_path, held_back):
    checkpoints = Checkpoints(tmp_path, 2)
    held_back.set()
    for iteration in (9, 10, 11):
        checkpoints.save(iteration, small(1), {})
    checkpoints.wait()
    assert names(tmp_path) == ["checkpoint-000010", "checkpoint-000011"]
    held_back.clear()
    checkpoints.save(1000000, small(1), {})
    whole = [name for name in names(tmp_path) if not name.startswith(".")]
    assert whole == ["checkpoint-000010", "checkpoint-000011"]
    held_back.set()
    assert checkpoints.latest().name == "checkpoint-1000000"
    assert names(tmp_path) == ["checkpoint-000011", "checkpoint-1000000"]


def full_disk(monkeypatch, calls_before=0):
    real, calls = storage.write_file, []

    def refuse(path, parts):
        calls.append(path)
        if len(calls) <= calls_before:
            return real(path, parts)
        path.write_bytes(b"cut")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_file", refuse)


@pytest.mark.parametrize("notices", ["save", "wait", "latest"])
def test_a_full_disk_is_an_error_at_the_next_call(tmp_path, monkeypatch, notices):
    checkpoints = saved(tmp_path, 1, 2)
    full_disk(monkeypatch, calls_before=1)
    checkpoints.save(3, small(3), {})
    words = (3, small(3), {}) if notices == "save" else ()
    with pytest.raises(OSError, match="must be written whole") as raised:
        getattr(checkpoints, notices)(*words)
    said = str(raised.value)
    assert f"checkpoint: {tmp_path}/checkpoint-000003 must be" in said
    assert "got No space left on device on rank 0, 32 bytes to write and " in said
    assert int(said.split("write and ")[1].split(" free")[0]) > 0
    assert said.endswith("the newest whole checkpoint is checkpoint-000002")
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]
    monkeypatch.undo()
    checkpoints.save(3, small(3), {})
    assert checkpoints.latest().name == "checkpoint-000003"


def test_a_real_write_error_leaves_the_last_one(tmp_path):
    """The system refuses to let a file grow."""
    checkpoints, large = saved(tmp_path, 1), {"model": {"w": torch.zeros(3 << 20)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))
    try:
        checkpoints.save(2, large, {})
        with pytest.raises(OSError, match=r"got File too large on rank 0, 12582912 bytes to write"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-000001"]


def test_a_rank_that_is_gone_is_named_so(tmp_path):
    checkpoints, lost = saved(tmp_path, 1), Future()
    lost.set_exception(RuntimeError("Connection reset by peer\nand a long story"))
    checkpoints._pending = saving._Pending(tmp_path / "checkpoint-000002", lost)
    with pytest.raises(RuntimeError, match=r"one is gone \(Connection reset by peer\); the last w"):
        checkpoints.wait()
    assert checkpoints.latest().name == "checkpoint-000001"


def test_state_must_be_json(tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(2, small(2), {"a": torch.zeros(1)})
    assert checkpoints.latest().name == "checkpoint-000001"


# a crash at any moment


class Crash(BaseException):
    """Nothing runs after it, like after a kill."""


def crash_at(monkeypatch, moment):
    """Stops at the n-th thing that touches the disk, half-way if it can be."""
    passed = []

    def guard(place, name, half):
        real = getattr(place, name)

        def act(*args, **kwargs):
            passed.append(name)
            if len(passed) > moment:
                if len(passed) == moment + 1:
                    half(*args)
                raise Crash
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, act)

    def cut(path, *_rest):
        path.write_bytes(b"cut")

    def half_removed(path, *_rest):
        for file in sorted(Path(path).rglob("*.json")):
            file.unlink()

    guard(storage, "write_file", cut)
    guard(folders, "write_synced", cut)
    guard(shutil, "rmtree", half_removed)
    guard(os, "replace", lambda *_: None)
    guard(folders, "sync", lambda *_: None)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("iteration", [3, 4])
def test_a_crash_at_any_step_leaves_a_whole_one(tmp_path, monkeypatch, keep, iteration):
    """Iteration 3 is saved again in place of itself; 4 is new and drives an old one out."""
    for moment in range(100):
        out = tmp_path / str(moment)
        checkpoints = saved(out, 2, 3, keep=keep)
        with monkeypatch.context() as patch:
            crash_at(patch, moment)
            checkpoints.save(iteration, small(5), {})
            try:
                checkpoints.wait()
                crashed = False
            except (RuntimeError, Crash):
                crashed = True
        newest = checkpoint.latest(out)
        assert int(newest.name.split("-")[-1]) in (3, iteration)
        found = small(-1)
        after = Checkpoints(out, keep)
        after.load_into(newest, found)
        assert after.load_state(newest)["iteration"] == int(newest.name.split("-")[-1])
        assert float(found["model"]["w"][0, 0]) in (3.0, 5.0)
        # no half-removed one has the name of a whole one
        assert all(after.load_state(path) for path in out.glob("checkpoint-*"))
        after.tidy()
        assert all(name.startswith("checkpoint-") for name in names(out))
        assert bits(checkpoint.load_group(after.latest(), "model")["w"]) == bits(
            found["model"]["w"]
        )
        if not crashed:
            break
    assert not crashed
    assert moment > 12
    assert len(names(out)) == keep


def test_kills_at_random_moments_leave_a_whole_one(tmp_path):
    assert "30 kills, checkpoint" in script("checkpoint_kills.py", tmp_path, 30)


# many processes


def test_four_processes_save_and_eight_two_and_one_load(tmp_path):
    assert script("checkpoint_ranks.py", tmp_path).endswith("all ranks agree\n")


# what is refused


def damage(folder, kind):
    file, index = folder / "model" / "rank-00000.safetensors", folder / "index.json"
    known = json.loads(index.read_text())
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    if kind == "grown":
        file.write_bytes(file.read_bytes() + b"x")
    if kind == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"w": 1}).ljust(file.stat().st_size, b"\0"))
    if kind == "renamed":
        file.write_bytes(file.read_bytes().replace(b'"w":', b'"v":'))
    if kind == "missing":
        file.unlink()
    if kind == "no index":
        index.unlink()
    if kind == "index text":
        index.write_text(index.read_text()[:40])
    if kind == "lost piece":
        known["tensors"]["model.w"]["pieces"] = []
    if kind == "elsewhere":
        known["tensors"]["model.w"]["pieces"][0][0] = "ema/rank-00001.safetensors"
    if kind == "outside":
        known["files"]["../secret/rank-00000.safetensors"] = 3
    if kind == "dtype":
        known["tensors"]["model.w"]["dtype"] = "F99"
    if kind == "list":
        known["tensors"] = []
    if kind in ("lost piece", "elsewhere", "outside", "dtype", "list"):
        index.write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", r"rank-00000.safetensors must be whole safetensors of \d+ bytes, got \d+"),
        ("grown", r"rank-00000.safetensors must be whole safetensors of \d+ bytes, got \d+"),
        ("header", r"rank-00000.safetensors must be whole safetensors, got .*[Hh]eader"),
        ("pickle", r"rank-00000.safetensors must be whole safetensors, got .*[Hh]eader"),
        ("renamed", "must hold what index.json says, got other names"),
        ("missing", "must hold model/rank-00000.safetensors, got no such file"),
        ("no index", "must hold index.json, got no such file"),
        ("index text", "index.json must be JSON, got damaged text"),
        ("lost piece", r"index.json must list files and tensors, got .*pieces of model.w"),
        ("elsewhere", r"index.json must list files and tensors, got .*pieces of model.w"),
        ("outside", r"index.json must list files and tensors, got .*\.\./secret"),
        ("dtype", r"index.json must list files and tensors, got .*KeyError\('F99'\)"),
        ("list", "index.json must list files and tensors, got .*AttributeError"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, kind, message):
    checkpoints, found = saved(tmp_path, 1), small(-1)
    damage(checkpoints.latest(), kind)
    with pytest.raises(ValueError, match=message):
        checkpoints.load_into(checkpoints.latest(), found)
    assert torch.equal(found["model"]["w"], small(-1)["model"]["w"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"v": torch.zeros(3, 2)}, r"this model's 1 tensors, got 1 missing \['v'\] and 1 foreign"),
        ({"w": torch.zeros(2, 3)}, r"model: w must be \(2, 3\), got \(3, 2\)"),
        ({"w": torch.zeros(3, 2).bfloat16()}, r"w must be torch.bfloat16, got torch.float32"),
    ],
)
def test_another_model_is_refused_before_anything_changes(tmp_path, wanted, message):
    checkpoints = saved(tmp_path, 1)
    before = {k: t.clone() for k, t in wanted.items()}
    with pytest.raises(ValueError, match=message):
        checkpoints.load_into(checkpoints.latest(), {"model": wanted})
    assert all(torch.equal(wanted[k], t) for k, t in before.items())


def test_another_format_is_refused_by_both_names(tmp_path):
    checkpoints = saved(tmp_path, 1)
    state = checkpoints.latest() / "state.json"
    known = json.loads(state.read_text()) | {"format": "branchcore-checkpoint-1"}
    state.write_text(json.dumps(known))
    with pytest.raises(
        ValueError, match="format 'branchcore-checkpoint-2', got 'branchcore-checkpoint-1'; try"
    ):
        checkpoints.load_state(checkpoints.latest())


# can the folder be written


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out must be a folder that can be written, got .*file/run"):
        RunFolder(tmp_path / "file" / "run", {}, resume=False)
    RunFolder(tmp_path / "new" / "run", {}, resume=False)
    assert names(tmp_path) == ["file"]

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\(No space left on device, \d+ bytes free\); try another"):
        RunFolder(tmp_path / "run", {}, resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_known_at_once(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match="out must be a folder that can be written"):
        RunFolder(tmp_path / "run", {}, resume=False)
