"""Rewards that hang or die: ended, started again, and nothing of them is left."""

import os
import signal
import sys
import threading
import time

import faulty_rewards
import pytest
import torch
from faulty_rewards import Failing, Hanging, alive, leaves, means

from branchcore import rewards
from branchcore.rewards import Retrying, RewardFailure, score, score_async


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    with faulty_rewards.nothing_left_behind():
        yield


def test_a_function_that_hangs_is_left_alone_and_called_again():
    images, prompts = leaves(4)
    reward = Hanging(1)
    started = time.monotonic()
    got = score(Retrying(reward, timeout_s=0.2, backoff_s=0.01), images, prompts)
    assert 0.2 <= time.monotonic() - started < 2.0
    assert (got.values == score(means, images, prompts).values).all()
    assert [(x.daemon, x.is_alive()) for x in reward.inside] == [(True, True)]
    reward.let_go()
    reward = Hanging(2)
    late = r"raised TimeoutError: no answer within 0\.1 s \(tries: 2\)"
    with pytest.raises(RewardFailure, match=late):
        score(Retrying(reward, attempts=2, timeout_s=0.1, backoff_s=0.0), images, prompts)
    assert len(reward.inside) == 2
    reward.let_go()


@pytest.fixture
def worker(tmp_path):
    """Returns a function that makes a `SubprocessReward` whose worker imports no torch."""
    (tmp_path / "fake.py").write_text(faulty_rewards.FAKE_WORKER)
    made = []

    def make(**options):
        made.append(
            rewards.SubprocessReward(
                "a:b",
                python=[sys.executable, str(tmp_path / "fake.py")],
                options={"folder": str(tmp_path), **options},
            )
        )
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def calls(folder):
    """(worker, images) of every call."""
    file = folder / "calls"
    return [tuple(map(int, x.split())) for x in file.read_text().splitlines()]


def test_a_worker_that_hangs_is_killed_and_started_again(worker, tmp_path):
    """The start of the new worker takes longer than a call may."""
    reward = Retrying(worker(start_s=0.5), timeout_s=0.3, backoff_s=0.0)
    got = score(reward, torch.zeros(2, 1), ["once", "y"])
    assert got.values.tolist() == [[4.0], [1.0]]
    (first, _), (second, _) = calls(tmp_path)
    assert first != second
    assert not alive(first)
    assert alive(second)


def test_a_worker_that_is_killed_in_a_call_is_started_again(worker, tmp_path):
    reward = Retrying(worker(), backoff_s=0.0)

    def kill():
        while not (tmp_path / "calls").exists() or not (tmp_path / "calls").read_text():
            time.sleep(0.01)
        os.kill(calls(tmp_path)[0][0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    got = score(reward, torch.zeros(2, 1), ["once", "y"])
    killer.join()
    assert got.values.tolist() == [[4.0], [1.0]]
    assert len({pid for pid, _ in calls(tmp_path)}) == 2


def test_a_dead_worker_is_seen_though_its_children_hold_its_output(worker, tmp_path):
    started = time.monotonic()
    got = score(Retrying(worker(), backoff_s=0.0), torch.zeros(1, 1), ["orphan"])
    assert got.values.tolist() == [[6.0]]
    assert time.monotonic() - started < 5.0
    orphan = int((tmp_path / "orphan").read_text())
    deadline = time.monotonic() + 2.0
    while alive(orphan) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(orphan)


def test_a_leaf_that_kills_the_worker_is_masked(worker, tmp_path):
    reward = Retrying(worker(), attempts=2, backoff_s=0.0, max_failed_share=0.2)
    prompts = ["x", "yy", "bad", "zzz", "x", "yy"]
    got = score(reward, torch.zeros(6, 1), prompts)
    assert got.masked.tolist() == [p == "bad" for p in prompts]
    assert got.values[~got.masked, 0].tolist() == [1.0, 2.0, 3.0, 1.0, 2.0]
    assert "the worker died with exit code 9" in got.because
    assert [size for _, size in calls(tmp_path)][:2] == [6, 6]


def test_a_late_function_ends_the_worker_that_it_waits_for(worker, tmp_path):
    inner = worker()
    reward = Retrying(lambda x, p: inner(x, p), timeout_s=0.3, backoff_s=0.0)
    assert score(reward, torch.zeros(1, 1), ["once"]).values.tolist() == [[4.0]]
    assert not alive(calls(tmp_path)[0][0])


class Stop(BaseException):
    """What a handler of SIGTERM raises."""


@pytest.fixture
def terminated(monkeypatch):
    """Returns a function that sends SIGTERM to this process a little later."""

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    timers = []

    def soon():
        timers.append(threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[-1].start()

    yield soon
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def server(tmp_path):
    made = faulty_rewards.Server(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("waits", ["pause", "thread", "worker", "http"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_signal_ends_all_waiting(worker, terminated, server, waits, overlap):
    """Nothing waits for pauses, time limits or tries that are left."""
    images, prompts = torch.ones(1, 1), ["once"]
    hanging = Hanging(9)
    server.act = lambda _: time.sleep(1.0)
    reward = {
        "pause": lambda: Retrying(Failing(99), backoff_s=50.0),
        "thread": lambda: Retrying(hanging, timeout_s=50.0),
        "worker": lambda: Retrying(worker(), timeout_s=50.0),
        "http": lambda: Retrying(rewards.HttpReward(server.url)),
    }[waits]()
    prompts = prompts if waits == "worker" else ["p0"]

    def scored():
        if not overlap:
            return score(reward, images, prompts)
        with score_async(reward, images, prompts) as scoring:
            return scoring.result()

    started = time.monotonic()
    terminated()
    with pytest.raises(Stop):
        scored()
    assert time.monotonic() - started < 3.0
    hanging.let_go()


def test_a_block_left_without_an_error_has_its_scores():
    slow = Failing(1)
    with score_async(Retrying(slow, backoff_s=0.1), *leaves(3)) as scoring:
        pass
    assert scoring.result().values[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert slow.sizes == [3, 3]
