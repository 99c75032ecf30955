"""Rewards that fail: tried again, then masked leaves, then an error, never zeros."""

import math

import numpy as np
import pytest
import torch
from faulty_rewards import Failing, leaves, means, nothing_left_behind

from branchcore.rewards import (
    NoRetry,
    Partial,
    Retrying,
    RetryLater,
    RewardFailure,
    Rewards,
    patient,
    score,
    waiting,
)
from branchcore.trainer_config import TrainerConfig


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    with nothing_left_behind():
        yield


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that were asked for; none is slept."""
    asked = []
    monkeypatch.setattr(waiting, "pause", lambda seconds: asked.append(max(0.0, seconds)))
    return asked


@pytest.mark.parametrize("how", ["raise", "nan", "poison"])
def test_a_batch_that_succeeds_at_last_is_passed_on_as_it_is(pauses, how):
    images, prompts = leaves(6)
    for first in range(3):
        reward = Failing(first, how=how)
        got = score(Retrying(reward), images, prompts)
        assert got.names == ("a", "b")
        assert (got.values == score(means, images, prompts).values).all()
        assert got.masked is None
        assert reward.sizes == [6] * (first + 1)
    wanted = {"a": images[:, 0]}
    assert Retrying(lambda *_: wanted)(images, prompts) is wanted


def test_pauses_double_up_to_a_limit_and_vary_by_process(pauses):
    images, prompts = leaves(2)
    of = []
    for seed in (0, 0, 1):
        with pytest.raises(RuntimeError, match=r"raised OSError: gone \(tries: 10\)"):
            Retrying(Failing(99), attempts=10, seed=seed)(images, prompts)
        of.append([x for x in pauses if x])
        pauses.clear()
    assert of[0] == of[1]
    assert all(a != b for a, b in zip(of[0], of[2], strict=True))
    whole = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    for asked in of:
        assert all(0.5 * x <= y <= x for x, y in zip(whole, asked, strict=True))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", RewardFailure, r"reward: must score 6 images, raised OSError: gone \(tries: 3\)"),
        ("nan", ValueError, r"reward: b must be finite, got nan for image 4 \('p4'\) and 0 more"),
        ("poison", ValueError, "reward: a must be finite, got inf for image 0 .* and 5 more"),
    ],
)
def test_without_a_share_to_mask_what_fails_every_time_is_an_error(pauses, how, error, message):
    reward = Failing(bad=[4], how=how)
    with pytest.raises(error, match=message) as caught:
        score(Retrying(reward), *leaves(6))
    assert reward.sizes == [6] * 3
    assert (caught.value.__cause__ is reward.error) == (how == "raise")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.zeros(6), TypeError, "hps: result must be a mapping .* got Tensor"),
        ({}, TypeError, "hps: result must be a mapping"),
        ({"a": torch.zeros(5)}, ValueError, r"hps: a must be \(6,\), one per image, got \(5,\)"),
        ({"a": torch.zeros(6, 1)}, ValueError, r"hps: a must be \(6,\), .* got \(6, 1\)"),
        (NoRetry("401"), NoRetry, "401"),
    ],
)
def test_faults_of_the_program_are_raised_at_once(pauses, answer, error, message):
    calls = []

    def reward(images, prompts):
        calls.append(len(images))
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(error, match=message):
        score(Retrying(reward, max_failed_share=0.5, name="hps"), *leaves(6))
    assert calls == [6]


@pytest.mark.parametrize("how", ["raise", "nan", "poison"])
@pytest.mark.parametrize("count", [2, 3, 8, 13, 64])
def test_exactly_the_bad_leaves_are_masked_by_few_calls_each(pauses, count, how):
    images, prompts = leaves(count)
    whole = score(means, images, prompts).values
    for bad in [{i} for i in range(count)] + [{0, count - 1}, {count // 2, 0}] * (count > 3):
        pauses.clear()
        reward = Failing(bad=bad, how=how)
        with torch.no_grad():
            partial = Retrying(reward, max_failed_share=0.9)(images, prompts)
        assert all(bool(partial[name][partial.masked].isnan().all()) for name in "ab")
        got = score(lambda *_, partial=partial: partial, images, prompts)
        assert set(np.flatnonzero(got.masked)) == bad
        assert np.isnan(got.values[got.masked]).all()
        assert (got.values[~got.masked] == whole[~got.masked]).all()
        assert reward.sizes[:3] == [count] * 3
        assert len(reward.sizes) - 3 <= 2 * math.ceil(math.log2(count)) * len(bad)
        assert got.because.startswith("reward: OSError" if how == "raise" else "reward: ")
        assert len([x for x in pauses if x]) == 2


def test_what_only_fails_in_large_batches_masks_nothing(pauses):
    def small(images, prompts):
        if len(images) > 3:
            raise torch.OutOfMemoryError("too large")
        return means(images, prompts)

    images, prompts = leaves(10)
    got = Retrying(small, max_failed_share=0.4)(images, prompts)
    assert not isinstance(got, Partial)
    assert (score(lambda *_: got, images, prompts).values
            == score(means, images, prompts).values).all()  # fmt: skip


@pytest.mark.parametrize(("share", "allowed"), [(0.01, 1), (0.05, 4), (0.1, 7)])
def test_more_than_may_be_masked_is_an_error_after_few_calls(pauses, share, allowed):
    wanted = (
        rf"hps: must fail for at most {allowed} of 64 images, got at least {allowed + 1} that fail "
        rf"\(tries of all: 3\), the last with OSError: gone; try a larger max_failed_share than"
    )
    down, bad = Failing(10**9), Failing(bad=range(0, 64, 64 // (allowed + 1)))
    for reward in (down, bad):
        with pytest.raises(RewardFailure, match=wanted) as caught:
            score(Retrying(reward, max_failed_share=share, name="hps"), *leaves(64))
        assert caught.value.__cause__ is reward.error
    assert len(down.sizes) - 3 <= 2 * (allowed + 1)
    exact = Failing(bad=range(0, 64, 64 // allowed)[:allowed])
    got = score(Retrying(exact, max_failed_share=share), *leaves(64))
    assert int(got.masked.sum()) == allowed


def test_one_leaf_at_least_is_scored(pauses):
    for count in (1, 2):
        with pytest.raises(RewardFailure):
            Retrying(Failing(99), max_failed_share=0.99)(*leaves(count))


def test_parts_must_have_the_same_components(pauses):
    def moody(images, prompts):
        if images[0, 0] != images[-1, 0]:
            raise OSError("gone")
        return {f"c{int(images[0, 0])}": images[:, 0]}

    with pytest.raises(ValueError, match=r"components must be \['c1'\] for every part .*\['c2'\]"):
        score(Retrying(moody, max_failed_share=0.9), *leaves(4))


def test_rewards_fail_each_for_itself_and_mask_together(pauses):
    config = TrainerConfig(iterations=1, prompts_per_iteration=1, reward_max_failed=0.4)
    one, two, three = Failing(1, bad=[1]), Failing(bad=[4], how="nan"), Failing()
    reward = patient(Rewards({"one": one, "two": two, "three": three}), config)
    got = score(reward, *leaves(6))
    assert three.sizes == [6]
    assert one.sizes[:3] == two.sizes[:3] == [6] * 3
    assert np.flatnonzero(got.masked).tolist() == [1, 4]
    assert got.names == ("one/a", "one/b", "two/a", "two/b", "three/a", "three/b")
    assert (np.isnan(got.values).all(1) == got.masked).all()
    assert np.isfinite(got.values[~got.masked]).all()
    assert got.because.startswith("reward two: b must be finite, got nan")
    assert patient(reward.rewards["one"], config) is reward.rewards["one"]
    mixed = Rewards({"one": reward.rewards["one"], "plain": Failing(bad=[2], how="nan")})
    with pytest.raises(ValueError, match="reward: plain/b must be finite, got nan for image 2"):
        score(mixed, *leaves(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, r"attempts must be at least 1 and backoff_s .*got 0, 1\.0"),
        ({"backoff_s": -1.0}, r"attempts must be .* and backoff_s finite and >= 0, got 3, -1\.0"),
        ({"timeout_s": 0.0}, r"timeout_s must be positive and finite, got 0\.0; None = no limit"),
        ({"timeout_s": math.inf}, "timeout_s must be positive and finite, got inf"),
        ({"max_failed_share": 1.0}, r"max_failed_share must be in \[0, 1\), got 1\.0"),
    ],
)
def test_limits_are_checked(options, message):
    with pytest.raises(ValueError, match=f"Retrying: {message}"):
        Retrying(means, **options)


def test_a_busy_scorer_is_left_alone_for_as_long_as_it_says(pauses, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("branchcore.rewards.retrying.time.monotonic", lambda: now[0])
    for after, wanted in ((7.0, 7.0), (10.0**9, 300.0)):
        pauses.clear()
        Retrying(Failing(1, error=RetryLater("busy", after)))(*leaves(2))
        assert pauses[0] == 0.0
        assert 0.5 <= pauses[1] <= 1.0
        assert pauses[2:] == [wanted]
