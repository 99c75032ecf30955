"""One process of a run fails: the same named error on all, or the same run as if nothing was."""

import shutil
import signal

import numpy as np
import processes
import pytest
import rank_faults
from rank_faults import BAD, CONFIG, NUMBERS

from branchcore.distributed import Ranks
from branchcore.rewards import waiting

pytestmark = pytest.mark.ranks

VARYING = {"model_calls", "tokens", "tflop", "skipped"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return rank_faults.alone(tmp_path_factory.mktemp("run") / "whole")


def assert_same_rows(rows, wanted):
    """Equal but for the rounding of sums over processes."""
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert {*row} ^ {*other} <= VARYING | {"noise_floor"}
        for name in {*row} & {*other} - VARYING:
            np.testing.assert_allclose(
                row[name], other[name], rtol=1e-6, atol=1e-9, err_msg=f"{name} {row['iteration']}"
            )


def assert_whole(outcome, undisturbed):
    assert (outcome.error, outcome.newest) == ("", CONFIG.iterations)
    assert_same_rows(outcome.rows, undisturbed.rows)
    np.testing.assert_allclose(outcome.weights, undisturbed.weights, rtol=1e-7, atol=1e-10)


def test_numbers_that_are_not_finite_stop_or_skip_all_ranks_alike(tmp_path):
    wanted = rank_faults.bad_numbers(Ranks(), tmp_path / "alone")
    found = processes.values(2, rank_faults.bad_numbers, tmp_path / "ranks")
    start = rank_faults.build(tmp_path / "start")
    start = np.concatenate([p.detach().flatten() for p in start.model.module.parameters()])
    texts = {"velocity": "velocity must be finite, got NaN", "gradient": "gradient norm must be"}
    for kind in NUMBERS:
        for both in zip(found[0].items(), found[1].items(), strict=True):
            (name, a), (_, b) = both
            assert a.error == b.error, name
            np.testing.assert_array_equal(a.weights, b.weights)
        at_once, skipped, third = (found[0][f"{kind}, {n}"] for n in ("0, 1", "2, 1", "2, 3"))
        assert at_once.error.startswith("BadUpdate: ")
        assert texts[kind] in at_once.error
        assert ("rank 1" in at_once.error) == (kind == "velocity")
        assert at_once.newest == BAD
        np.testing.assert_allclose(
            at_once.weights, wanted[f"{kind}, 0, 1"].weights, rtol=1e-9, atol=1e-12
        )
        assert third.error.startswith("BadUpdate: ")
        np.testing.assert_array_equal(third.weights, start)
        assert [row["skipped_updates"] for row in third.rows] == [1, 2]
        alone = wanted[f"{kind}, 2, 1"]
        assert skipped.error == alone.error == ""
        assert [row["skipped_updates"] for row in skipped.rows] == [0, 1, 1, 1]
        assert ["skipped" in row for row in skipped.rows] == [False, True, False, False]
        assert_same_rows(skipped.rows, alone.rows)
        np.testing.assert_allclose(skipped.weights, alone.weights, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return processes.values(2, rank_faults.bad_rewards, tmp_path_factory.mktemp("rewards"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("for good", "raised OSError: gone"),
        ("hangs for good", r"raised TimeoutError: no answer within 0.3 s (tries: 2)"),
    ],
)
def test_a_reward_that_fails_for_good_is_one_error(rewards, name, text):
    for outcome, _, hangs in (rank[name] for rank in rewards):
        assert outcome.error.startswith("RewardFailure: rank 1: reward: must score ")
        assert text in outcome.error
        assert len(outcome.rows) == outcome.newest == BAD
        np.testing.assert_array_equal(outcome.weights, rewards[0][name][0].weights)
        assert hangs in (0, 2)
    assert rewards[0][name][0].rows == rewards[0]["quiet"][0].rows[:BAD]


@pytest.mark.parametrize("name", ["twice", "hangs once"])
def test_a_reward_that_works_again_changes_no_bit(rewards, undisturbed, name):
    for rank in rewards:
        outcome, quiet = rank[name][0], rank["quiet"][0]
        assert outcome.error == ""
        assert outcome.rows == quiet.rows
        np.testing.assert_array_equal(outcome.weights, quiet.weights)
        assert_whole(outcome, undisturbed)
    assert rewards[1]["hangs once"][2] == 1


def test_a_leaf_without_a_score_is_masked_on_its_rank(rewards):
    scores = np.concatenate([rank["leaf"][1][BAD] for rank in rewards])
    assert np.isnan(scores).sum() == 1
    for outcome, *_ in (rank["leaf"] for rank in rewards):
        assert outcome.error == ""
        assert [row["masked_leaves"] for row in outcome.rows] == [0, 1, 0, 0]
        row = outcome.rows[BAD]
        assert row["leaves"] == len(scores) - 1
        # a zero in its place would be far off, all are near 4
        np.testing.assert_allclose(row["reward/spread"], np.nanmean(scores), rtol=1e-12)
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))
        assert np.isfinite(outcome.weights).all()


@pytest.mark.parametrize("rounds", [None, 1])
def test_ranks_in_step_agree_after_their_last_call(rounds, tmp_path):
    found = processes.values(2, rank_faults.in_step, tmp_path, rounds)
    quiet = found[0]["quiet"]
    assert (quiet.error, quiet.newest) == ("", CONFIG.iterations)
    for name in rank_faults.IN_STEP:
        a, b = (rank[name] for rank in found)
        assert a.error == b.error, name
        np.testing.assert_array_equal(a.weights, b.weights)
        ends = name in ("velocity", "for good")
        assert (a.error != "") == ends, (name, a.error)
        assert a.newest == (BAD if ends else CONFIG.iterations)
    assert found[0]["velocity"].error.startswith("BadUpdate: rank 1: rollout: velocity must be")
    assert found[0]["for good"].error.startswith("RewardFailure: rank 1: reward: must score ")
    assert [row["skipped_updates"] for row in found[0]["velocity, skipped"].rows] == [0, 1, 1, 1]
    assert found[0]["twice"].rows == quiet.rows
    np.testing.assert_array_equal(found[0]["twice"].weights, quiet.weights)
    assert [row["masked_leaves"] for row in found[0]["leaf"].rows] == [0, 1, 0, 0]


@pytest.mark.parametrize("where", ["rollout", "update"])
@pytest.mark.parametrize("parallel", [rank_faults.REPLICATE, rank_faults.RESHARD])
def test_an_error_in_a_call_ends_all_ranks_and_is_named(where, parallel, tmp_path):
    if where == "update" and parallel == rank_faults.REPLICATE:
        where = "rollout"  # on a tape the rollout's calls are the update's
    found = processes.run(2, rank_faults.failing_call, tmp_path, where, parallel, timeout_s=40.0)
    assert "rank 1: " in found[0][1]
    for ok, text in found:
        assert not ok
        assert "MemoryError" in text
        assert "no room" in text
        name, seconds = text.rpartition("[")[2].split(", ")
        assert name.endswith(f"checkpoint-{BAD:06}")
        assert float(seconds.split()[0]) < 15.0


def test_what_rank_0_cannot_write_stops_all(tmp_path):
    for found in processes.values(2, rank_faults.bad_logs, tmp_path):
        assert found["log"].error.startswith("IsADirectoryError: rank 0: ")
        assert "metrics.jsonl" in found["log"].error
        assert found["callback"].error == "KeyError: \"rank 0: 'callback'\""
        assert found["log"].newest == BAD
        assert found["callback"].newest == -1


@pytest.mark.parametrize(
    ("where", "victim"), [("rollout", 1), ("rollout", 0), ("update", 1), ("reduce", 1)]
)
def test_a_killed_rank_is_named_and_the_run_goes_on_later(where, victim, undisturbed, tmp_path):
    out = tmp_path / "run"
    args = out, where, signal.SIGKILL, BAD, (victim,)
    found = processes.run(2, rank_faults.signalled, *args, timeout_s=40.0)
    assert found[victim] == (False, "gone")
    ok, (outcome, seconds) = found[1 - victim]
    assert ok
    assert outcome.error.startswith("RankError: ")
    assert f"rank {victim} is gone; continue with --resume auto" in outcome.error
    assert seconds < 30.0
    assert outcome.newest in (-1, BAD)
    if where != "rollout":
        return
    shutil.copytree(out, tmp_path / "alone")
    assert_whole(rank_faults.alone(tmp_path / "alone", resume=True), undisturbed)
    for again in processes.values(2, rank_faults.whole, out, True):
        assert_whole(again, undisturbed)


# where, iteration, ranks that get SIGTERM; then the iteration of the checkpoint
STOPS = {
    "rollout": ("rollout", BAD, (0, 1), BAD),
    "reward": ("reward", BAD, (0, 1), BAD),
    "update": ("update", BAD, (0, 1), BAD + 1),
    "save": ("save", BAD, (0, 1), BAD + 1),
    "at the start": ("rollout", 0, (0, 1), -1),
    "one rank": ("reward", BAD, (1,), BAD),
}


def test_preempted_ranks_leave_a_checkpoint_and_go_on(undisturbed, tmp_path):
    wheres = {name: stop[:3] for name, stop in STOPS.items()}
    for rank, found in enumerate(processes.values(2, rank_faults.preempted, tmp_path, wheres)):
        for name, (first, seconds, again) in found.items():
            whom, newest = STOPS[name][2:]
            assert (first.error, first.newest) == ("", newest), name
            assert first.preempted == (rank in whom)
            assert len(first.rows) == max(newest, 0)
            assert seconds < 30.0
            assert_whole(again, undisturbed)


def test_a_preempted_run_of_one_process_goes_on_bit_for_bit(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "pause", lambda seconds: None)
    wheres = {name: (*stop[:2], (0,)) for name, stop in STOPS.items()}
    for name, found in rank_faults.preempted(Ranks(), tmp_path, wheres).items():
        first, _, again = found
        assert (first.error, first.newest, first.preempted) == ("", STOPS[name][3], True), name
        assert again.error == ""
        assert again.rows == undisturbed.rows
        np.testing.assert_array_equal(again.weights, undisturbed.weights)
