"""Kills a process that saves all the time, at random moments; run as a script by test_checkpoint.

After every kill the newest checkpoint must be whole: all tensors of one iteration, and no older
than the last one that the process had seen whole.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from branchcore import checkpoint
from branchcore.checkpoint import Checkpoints, folders

SHAPES = {"model": (300, 40), "optimizer": (2000, 10), "ema": (40,)}


def tensors(iteration):
    return {
        group: {name: torch.full(shape, float(iteration)) for name in "abc"}
        for group, shape in SHAPES.items()
    }


def save_all_the_time(out, keep, seen):
    """Saves every iteration twice: the second takes the first one's place."""
    checkpoints = Checkpoints(out, keep)
    begin = checkpoints.latest()
    checkpoints.tidy()
    iteration = 0 if begin is None else int(begin.name.split("-")[1])
    while True:
        iteration += 1
        for _ in range(2):
            checkpoints.save(iteration, tensors(iteration), {})
            checkpoints.wait()
            os.write(seen, b"%d\n" % iteration)


def kill_after(out, keep, delay_s):
    """Starts a process, kills it, returns the last iteration that it had seen whole."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            save_all_the_time(out, keep, writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        # the clock starts at its first whole checkpoint
        said = os.read(reading, 20)
        time.sleep(delay_s)
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    while more := os.read(reading, 65536):
        said += more
    os.close(reading)
    assert os.WIFSIGNALED(status), "the process ended by itself"
    return int(said.split(b"\n")[-2])


def main(out, kills):
    torch.set_num_threads(1)
    draw, stages = random.Random(0), set()
    for i in range(kills):
        keep = 1 + i % 2
        seen = kill_after(out, keep, draw.uniform(0.0, 0.2))
        left = {p.name for p in out.iterdir()}
        stages |= {name.split("checkpoint")[0] for name in left}
        newest = checkpoint.latest(out)
        iteration = int(newest.name.split("-")[-1])
        assert iteration >= seen, (iteration, seen)
        assert checkpoint.load_state(newest)["iteration"] == iteration
        wanted = tensors(iteration)
        found = tensors(-1)
        Checkpoints(out, keep).load_into(newest, found)
        for group, of in wanted.items():
            assert all(torch.equal(found[group][name], of[name]) for name in of), group
        folders.tidy(out)
        names = sorted(p.name for p in out.iterdir())
        # between the new one's name and the old one's end there is one more
        assert all(name.startswith("checkpoint-") for name in names)
        assert 1 <= len(names) <= keep + 1, names
    print(f"{kills} kills, checkpoint {iteration} is whole; kills left {sorted(stages)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
