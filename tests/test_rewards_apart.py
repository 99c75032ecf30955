"""Rewards in another process or thread: the same scores, and failures that leave nothing behind."""

import dataclasses
import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from branchcore import recipes, rewards, schedule
from branchcore.metrics import repeatable
from branchcore.rewards import worker
from branchcore.rounds import score_rounds
from branchcore.stages import Grown, accumulate
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SCORER = """
import os, subprocess, sys, time
from pathlib import Path

print("made by", sys.argv[1].rpartition(":")[2])
subprocess.run(["echo", "printed by a child"])

def make(offset):
    def reward(images, prompts):
        print("scoring", len(prompts), flush=True)
        if prompts[0] == "raise":
            raise KeyError("service is down")
        mean = images.float().flatten(1).mean(1) + offset
        return {"one": [0.0]} if prompts[0] == "count" else {"b": mean, "a": [*map(len, prompts)]}
    return reward

def moody(marker):
    def reward(images, prompts):
        while prompts[0] == "hang":
            time.sleep(1)
        if not Path(marker).exists():
            Path(marker).touch()
            os._exit(3)
        return {"a": images.flatten(1).sum(1)}
    return reward
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "scorer.py"
    path.write_text(SCORER)
    return path


def threads():
    return [thread.name for thread in threading.enumerate()]


def gone(pid):
    """Neither running nor a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pid_of(reward):
    return reward._worker._process.pid


def test_a_worker_scores_and_may_print_until_its_reward_raises(scorer, capfd):
    images = torch.rand(3, 3, 400, 400, dtype=torch.bfloat16, generator=torch.Generator())
    before = threads()
    with rewards.SubprocessReward(f"{scorer}:make", options={"offset": 2.0}) as reward:
        pid = pid_of(reward)
        for _ in range(2):
            scores = reward(images, ["x", "yy", "zß"])
            assert list(scores) == ["b", "a"]
            assert torch.equal(scores["b"], images.float().flatten(1).mean(1) + 2.0)
            assert scores["a"].tolist() == [1.0, 2.0, 2.0]
        with pytest.raises(ValueError, match=r"must return \(3,\) numbers for one, .*got \(1,\)"):
            reward(images, ["count", "", ""])
        assert pid_of(reward) == pid
        down = r"the worker died with exit code 1;(.|\n)*KeyError: 'service is down'"
        with pytest.raises(RuntimeError, match=down):
            reward(images, ["raise", "", ""])
        assert gone(pid)
    assert threads() == before
    out, err = capfd.readouterr()
    assert out == ""
    assert [err.count(x) for x in ("made by make", "printed by a child", "scoring 3")] == [1, 1, 4]


def test_a_worker_needs_no_branchcore(scorer, tmp_path):
    """Run by its path from elsewhere, with neighbours of its file out of reach."""
    (tmp_path / "look.py").write_text(
        "import importlib.util as u, sys\n"
        "def make():\n"
        "    found = [x for x in ('branchcore', 'imagereward', 'jpeg') if u.find_spec(x)]\n"
        "    sys.exit(f'found {found} {[x for x in sys.modules if x.startswith(\"branch\")]}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", worker.__file__, "look:make", "{}"],
        cwd=tmp_path, capture_output=True, text=True, input="",
    )  # fmt: skip
    assert done.stderr.strip() == "found [] []"


def test_a_worker_that_hangs_or_dies_is_replaced(scorer, tmp_path):
    images = torch.ones(2, 3, 300, 300)
    before = threads()
    reward = rewards.SubprocessReward(
        f"{scorer}:moody", options={"marker": str(tmp_path / "x")}, timeout_s=0.5
    )
    first = pid_of(reward)
    late = r"must score 2 images, but the worker timed out after 0.5 s; its last words:"
    with pytest.raises(RuntimeError, match=late):
        reward(images, ["hang", ""])
    assert gone(first)
    assert threads() == before
    reward.timeout_s = 60.0
    with pytest.raises(RuntimeError, match="the worker died with exit code 3"):
        reward(images, ["", ""])
    assert reward(images, ["", ""])["a"].tolist() == [270000.0, 270000.0]
    assert (tmp_path / "x").exists()
    last = pid_of(reward)
    del reward
    gc.collect()
    assert gone(last)
    assert threads() == before


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'Activating environment'", r"must get ready, but the worker returned garbage: got"),
        ("echo no such env >&2; exit 7", r"died with exit code 7; its last words:\nno such env"),
        ("sleep 30 & sleep 30", r"the worker timed out after 0.2 s"),
        ("exec >&-; sleep 0.2; exit 0", r"the worker died with exit code 0"),
    ],
)
def test_a_worker_that_does_not_get_ready(script, message):
    started, limit = time.monotonic(), 0.2 if "sleep 30" in script else 20.0
    with pytest.raises(RuntimeError, match=message):
        rewards.SubprocessReward("a:b", python=["sh", "-c", script, "sh"], start_timeout_s=limit)
    assert time.monotonic() - started < 15.0
    assert not [name for name in threads() if "_pass_on" in name]


def test_messages_are_read_whole_or_not_at_all():
    whole = worker.message({"names": ["a"]}, b"12345")
    assert worker.parse(whole) == ({"names": ["a"]}, b"12345")
    assert [worker.parse(whole[:n]) for n in range(len(whole))] == [None] * len(whole)
    with pytest.raises(ValueError, match="got 1 bytes more than the message has"):
        worker.parse(whole + b"x")
    with pytest.raises(ValueError, match="got b'hi'"):
        worker.parse(b"hi")


def test_limits_are_checked(scorer):
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        rewards.SubprocessReward(f"{scorer}:make", timeout_s=0.0)


def test_scoring_in_a_thread_is_scoring():
    main, images = threading.get_ident(), torch.rand(4, 6, generator=torch.Generator())
    seen = []

    def reward(images, prompts):
        seen.append((threading.get_ident() == main, torch.is_grad_enabled()))
        return {"mean": images.mean(1)}

    before = threads()
    there, here = (
        rewards.score_async(reward, images, "abcd").result(),
        rewards.score(reward, images, "abcd"),
    )
    assert there.names == here.names
    assert (there.values == here.values).all()
    assert seen == [(False, False), (True, False)]
    assert threads() == before


@pytest.fixture
def digits():
    pytest.importorskip("diffusers")
    from branchcore.models.digits import PROMPTS, DigitsReward, load_digits_model

    return PROMPTS[:4], DigitsReward(), load_digits_model


def trained(digits, out, reward=None, **options):
    prompts, usual, load = digits
    config = TrainerConfig(
        iterations=2, prompts_per_iteration=4, prompts_per_round=2, lr=1e-3, **options
    )
    recipe = recipes.branch_mix(
        schedule.shifted_linear(4), splits=(0, 1), window=0, eta=0.7, kl=0.05, updates=2, clip=0.2
    )
    trainer = Trainer(load(), prompts, reward or usual, recipe, config, out)
    return trainer, [repeatable(trainer.step()) for _ in range(2)]


def test_overlapped_rewards_change_no_bit(digits, tmp_path):
    _, usual, _ = digits
    alive = []

    def watched(images, prompts):
        alive.append(threading.current_thread() is threading.main_thread())
        return usual(images, prompts)

    plain, wanted = trained(digits, tmp_path / "plain", watched)
    before = threads()
    other, got = trained(digits, tmp_path / "overlap", watched, overlap_rewards=True)
    assert alive == [True] * 4 + [False] * 4
    assert threads() == before
    assert got == wanted
    for p, q in zip(
        plain.learner.masters.parameters, other.learner.masters.parameters, strict=True
    ):
        assert torch.equal(p, q)


def test_rewards_overlap_with_growth_and_never_with_themselves(toy):
    """Each event is told in order: round 1 grows before the scores of round 0 are asked for."""
    told, growing = [], threading.Event()

    def rounds():
        for i in range(3):
            told.append(f"grow {i}")
            if i == 1:
                growing.set()
            yield Grown(None, None, torch.full((1, 1), float(i)), ["p"])

    def reward(images, prompts):
        i = int(images[0, 0])
        assert i > 0 or growing.wait(10.0)
        told.append(f"score {i}")
        return {"a": images[:, 0]}

    for i in score_rounds(rounds(), reward, lambda g, s: int(s.values[0, 0]), overlap=True):
        told.append(f"use {i}")
    assert told.index("grow 1") < told.index("score 0")
    assert [x for x in told if "use" in x] == ["use 0", "use 1", "use 2"]
    assert [x for x in told if "score" in x] == ["score 0", "score 1", "score 2"]


def failing(call, nth, error):
    """The same function, but its nth call raises."""
    count = iter(range(1, 100))

    def wrapped(*args, **options):
        if next(count) == nth:
            raise error
        return call(*args, **options)

    return wrapped


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("reward", "reward: must score 8 images, raised KeyError: 'gone'"),
        ("decode", "gone"),
        ("accumulate", "gone"),
    ],
)
def test_a_failure_is_the_same_overlapped_and_leaves_no_thread(
    digits, tmp_path, monkeypatch, fails, message
):
    """The second scoring or decoding fails, or the first gradient, while a round is scored."""
    prompts, usual, load = digits
    first = accumulate

    def slow(images, prompts):
        time.sleep(0.2)
        return usual(images, prompts)

    for overlap in (False, True):
        reward, model, before = slow, load(), threads()
        if fails == "reward":
            reward = failing(usual, 2, KeyError("gone"))
        elif fails == "decode":
            model.decode = failing(model.decode, 2, FloatingPointError("gone"))
        else:
            monkeypatch.setattr(
                "branchcore.learner.accumulate", failing(first, 1, ValueError(message))
            )
        with pytest.raises((RuntimeError, FloatingPointError, ValueError)) as caught:
            trained((prompts, usual, lambda model=model: model), tmp_path / f"{overlap}", reward,
                    overlap_rewards=overlap, reward_attempts=1)  # fmt: skip
        assert threads() == before
        assert str(caught.value) == message
        assert isinstance(caught.value.__cause__, KeyError) == (fails == "reward")


def test_overlap_needs_several_rounds():
    options = {"iterations": 1, "prompts_per_iteration": 4}
    for rounds in (None, 4):
        with pytest.raises(ValueError, match=r"overlap_rewards must go with several rounds, got"):
            TrainerConfig(**options, prompts_per_round=rounds, overlap_rewards=True)
    with pytest.raises(TypeError, match="overlap_rewards must be True or False, got 1"):
        TrainerConfig(**options, prompts_per_round=1, overlap_rewards=1)
    one = TrainerConfig(**options, prompts_per_round=1, overlap_rewards=True)
    assert not dataclasses.replace(one, overlap_rewards=False).overlap_rewards
