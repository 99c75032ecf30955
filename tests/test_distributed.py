"""Processes that share, sum and agree; gradients that come together; one that is killed."""

import os
import signal
import threading
import time

import numpy as np
import processes
import pytest
import torch
from torch import nn

from branchcore.distributed import RankError, Ranks, joined
from branchcore.idle import idle_calls, idle_passes
from branchcore.meeting import meet
from branchcore.parallel import Parallel, ParallelConfig, spread


def test_one_process_needs_no_group():
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.alone, ranks.main) == (0, 1, True, True)
        assert ranks.share([3, 4]) == (3, 4)
        np.testing.assert_array_equal(ranks.sum(np.array([1.0, 2.0])), [1.0, 2.0])
        assert ranks.most([3, 1]) == [3, 1]
        assert ranks.gather("x") == ["x"]
        ranks.agree(None)
        with pytest.raises(KeyError, match="lost"):
            ranks.agree(KeyError("lost"))
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"), joined("cpu", 0):
        pass


def everything(ranks):
    shares = [ranks.share(range(n)) for n in (0, 1, 3, 4, 10)]
    total = ranks.sum(np.array([1.0, 10.0**ranks.rank]))
    return shares, total, ranks.most([ranks.rank, -ranks.rank]), ranks.gather(f"r{ranks.rank}")


def test_several_processes_share_and_sum():
    found = processes.values(3, everything)
    for n, parts in zip(
        (0, 1, 3, 4, 10), zip(*(shares for shares, *_ in found), strict=True), strict=True
    ):
        assert sum(parts, ()) == tuple(range(n))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    for _, total, most, names in found:
        np.testing.assert_array_equal(total, [3.0, 111.0])
        assert (most, names) == ([2, 0], ["r0", "r1", "r2"])


def failing(ranks, kind):
    errors = {
        "value": ValueError("bad reward"),
        "own": RankError("gone"),
        "nan": FloatingPointError("NaN"),
    }
    if kind == "two":
        ranks.agree(errors["nan"] if ranks.rank else None)
    else:
        ranks.agree(errors[kind] if ranks.rank == 1 else None)


@pytest.mark.parametrize(
    ("kind", "world", "text"),
    [
        ("value", 2, "ValueError: rank 1: bad reward"),
        ("own", 2, "RankError: rank 1: gone"),
        ("two", 3, "FloatingPointError: rank 1: NaN (and 1 more ranks)"),
    ],
)
def test_an_error_of_one_is_the_error_of_all(kind, world, text):
    assert processes.run(world, failing, kind) == [(False, text)] * world


def killed(ranks):
    if ranks.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        ranks.sum(np.ones(1))
    except RankError as error:
        return str(error), time.monotonic() - start


def test_the_others_stop_and_say_who_was_killed():
    found = processes.run(3, killed, timeout_s=40.0)
    assert found[1] == (False, "gone")
    for ok, (text, seconds) in (found[0], found[2]):
        assert ok
        assert "rank 1 is gone; continue with --resume auto" in text
        assert seconds < 30.0


def net(seed=0):
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6)) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 6), nn.ModuleList(blocks)).double()


class Toy:
    """A model of rows (N, 6) with blocks, as the engine sees it."""

    latent_shape = (6,)

    def __init__(self, seed=0):
        self.module = net(seed)
        self.module.forward = self._forward

    def _forward(self, x):
        x = self.module[0](x)
        for block in self.module[1]:
            x = x + block(x)
        return x

    def velocity(self, x, sigma, prompt):
        return self.module(x * sigma[:, None])

    def reference_velocity(self, x, sigma, prompt):
        return self.velocity(x, sigma, prompt)


def rows(wave):
    generator = torch.Generator().manual_seed(wave)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64)


def waves(model, part, normaliser):
    """All forwards, then all backwards, as from a tape."""
    sigma, prompt = torch.full((5,), 0.7).double(), torch.zeros(5, dtype=torch.int64)
    outs = [model.velocity(rows(w)[part], sigma[part], prompt[part]) for w in range(3) if len(part)]
    for out in outs:
        (out.square().sum() / normaliser).backward()


def gradient(ranks, options):
    model = Toy(seed=ranks.rank if options.get("kind") == "replicate" else 0)
    parallel = spread(ParallelConfig(**options), [model.module], ranks)
    parameters = list(model.module.parameters())
    part = list(ranks.share(range(5)))
    norms = []
    for _ in range(2):
        model.module.zero_grad()
        if parallel.lockstep and not part:
            idle_passes(model, 3, torch.device("cpu"), torch.float64)
        parallel.gather()
        waves(model, part, 5.0 / parallel.share)
        parallel.reduce(
            parameters, lambda: idle_passes(model, 1, torch.device("cpu"), torch.float64)
        )
        norms.append(float(parallel.grad_norm(parameters, 1e9)))
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in grads]).numpy(), norms, type(parallel).__name__


KINDS = {
    "replicate": ({"kind": "replicate"}, 2),
    "auto": ({}, 2),
    "shard 4": ({"kind": "shard"}, 4),
    "shard more than rows": ({"kind": "shard"}, 7),
    "hybrid": ({"kind": "shard", "shards": 2}, 4),
    "reshard": ({"kind": "shard", "reshard": True}, 3),
    "offload": ({"kind": "shard", "offload": True}, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_together_whatever_the_number_of_processes(kind):
    options, world = KINDS[kind]
    model = Toy()
    waves(model, list(range(5)), 5.0)
    wanted = torch.cat([p.grad.flatten() for p in model.module.parameters()]).numpy()
    for grads, norms, name in processes.values(world, gradient, options):
        assert name == ("Replicas" if kind == "replicate" else "Shards")
        np.testing.assert_allclose(grads, wanted, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(norms, [np.linalg.norm(wanted)] * 2, rtol=1e-10)


def test_idle_calls_leave_no_gradient():
    model = Toy()
    idle_calls(model, 3, torch.device("cpu"), torch.float64)
    assert all(p.grad is None for p in model.module.parameters())
    idle_passes(model, 2, torch.device("cpu"), torch.float64, reference=True)
    assert all(not p.grad.any() for p in model.module.parameters())


def test_configurations_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="kind must be auto, replicate or shard, got 'ddp'"):
        ParallelConfig(kind="ddp")
    with pytest.raises(ValueError, match="offload must be left out for replicate, got True"):
        ParallelConfig(kind="replicate", offload=True)
    with pytest.raises(ValueError, match="shards must be at least 1, got 0"):
        ParallelConfig(shards=0)
    assert type(spread(ParallelConfig(), [net()], Ranks())) is Parallel


def uneven(ranks):
    spread(ParallelConfig(kind="shard", shards=2), [net()], ranks)


def test_shards_must_divide_the_processes():
    found = processes.run(3, uneven)
    assert all("shards must divide the 3 processes, got 2" in text for _, text in found)


# where processes meet ----------------------------------------------------------------------------


def meetings(store, order, world_size=3, timeout_s=5.0):
    """Lets ranks, in threads, meet in a store one after the other; returns what each got."""
    found = {}

    def come(rank):
        try:
            found[rank] = meet(store, rank, world_size, timeout_s)
        except TimeoutError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_processes_that_start_again_meet_where_no_earlier_ones_were(order):
    store = torch.distributed.HashStore()
    places = [meetings(store, order) for _ in range(3)]
    assert all(len(set(place.values())) == 1 for place in places)
    assert len({place[0] for place in places}) == 3


@pytest.mark.parametrize(("come", "missing"), [((0, 1), 2), ((1, 2), 0)])
def test_who_does_not_come_is_named(come, missing):
    store = torch.distributed.HashStore()
    meetings(store, (0, 1, 2))
    found = meetings(store, come, timeout_s=0.5)
    assert all(text.startswith("joined: all processes must start") for text in found.values())
    assert f"rank {missing} did not come" in found[come[0]]
