"""The learning benchmark: its arms, its statistics against hand numbers, a whole small run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import learning  # noqa: E402
import learning_picture  # noqa: E402
import learning_summary  # noqa: E402
import learning_words  # noqa: E402
import readme  # noqa: E402

from branchcore.models.digits.task import DigitsTask  # noqa: E402
from branchcore.pruning import Pruning  # noqa: E402
from branchcore.trainer_config import TrainerConfig  # noqa: E402

MEASURES = learning_summary.MEASURES


@pytest.fixture(scope="module")
def task():
    return DigitsTask()


def test_arms_differ_in_what_they_drop_alone(task):
    known = task.presets["branch_grpo"]
    for arm in learning.ARMS:
        recipe, fields = learning.build(arm, task)
        config = TrainerConfig(**fields, seed=3)
        Pruning(config.prune, recipe, 3)
        assert known.recipe.items() <= recipe.options.items()
        assert {**fields, **known.trainer} == {**fields, "iterations": 110}
        assert learning_summary.planned_parents(recipe, 20) == 20 * 81
        kinds = fields["prune"].rule, recipe.options.get("pruning", "none")
        wanted = {
            "full": ("none", "none"),
            "dppo": ("threshold", "none"),
            "optimal": ("optimal", "none"),
            "depth": ("none", "depth"),
        }
        assert kinds == wanted.get(arm, (arm, "none"))
    assert list(learning.ARMS) == list(learning_picture.STYLES) == list(learning_words.WAYS)


def test_the_depth_window_drops_two_of_nine_depths_and_moves_twice(task):
    recipe, _ = learning.build("depth", task)
    plan = recipe.plan([0], seed=0, iteration=0)
    for iteration, depths in ((0, (6, 7)), (28, (6, 7)), (29, (7, 8)), (59, (8, 9)), (200, (8, 9))):
        weight = recipe.prune(plan, np.zeros(len(plan)), iteration)
        assert set(plan.depth[plan.train & (weight == 0)]) == set(depths)
        assert len(np.unique(plan.parent[plan.train & (weight == 0)])) == 32


def test_intervals_against_hand_numbers():
    """t(0.975) is 2.776445 for 4 degrees of freedom and 12.706205 for 1."""
    found = learning_summary.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5 / 5)
    assert found["mean"] == 3.0
    assert found["ci95"] == pytest.approx([3 - half, 3 + half], abs=2e-5)
    assert found["by_seed"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    two = learning_summary.interval([0.0, 2.0])["ci95"]
    assert two == pytest.approx([1 - 12.706205, 1 + 12.706205], abs=2e-5)
    assert learning_summary.interval([7.0])["ci95"] is None
    band = learning_summary.band(np.array([[0.0, 5.0], [2.0, 5.0]]))
    assert band == {"mean": [1.0, 5.0], "low": [two[0], 5.0], "high": [two[1], 5.0]}
    assert learning_words.pair(found, "+.2f") == "+3.00 ± 1.96"
    assert learning_words.pair(learning_summary.interval([7.0]), ".1f") == "7.0"


def written(folder, seconds, rewards, parents=6):
    """A run of some seconds an iteration, evaluated every second iteration; other measures 0."""
    rows = []
    for i in range(2 * len(rewards) - 1):
        row = {"iteration": i} | ({"cpu_s": seconds * i, "parents": parents} if i else {})
        if i % 2 == 0:
            row |= dict.fromkeys((f"eval/{name}" for name in MEASURES), 0.0)
            row["eval/reward"] = rewards[i // 2]
        rows.append(row)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def result(tmp_path):
    """`full` takes 1 s an iteration and `depth` 0.5 s; the budget of 3 s is between evaluations."""
    full = {s: written(tmp_path / f"f{s}", 1.0, [0.0, 1.0 + s, 3.0, 9.0]) for s in (0, 1)}
    depth = {
        s: written(tmp_path / f"d{s}", 0.5, [0.0, 0.5, 1.0, 3.0 + 3 * s, 99.0], parents=3)
        for s in (0, 1)
    }
    folders = {"full": full, "depth": depth}
    found = learning_summary.summary(folders, {"full": 6, "depth": 6}, 3.0)
    return {"recipe": "branch_grpo", "commits": ["c"], **found}


def test_curves_are_straight_between_evaluations_and_differences_paired(result):
    full, depth = result["arms"]["full"], result["arms"]["depth"]
    assert full["final"]["reward"]["by_seed"] == [2.0, 2.5]
    assert depth["final"]["reward"]["by_seed"] == [3.0, 6.0]
    assert depth["final"]["reward"]["against_full"]["by_seed"] == [1.0, 3.5]
    assert full["final"]["reward"]["against_full"]["ci95"] == [0.0, 0.0]
    assert result["grid_s"][::5] == [0.0, 0.75, 1.5, 2.25, 3.0]
    assert full["curve"]["reward"]["mean"][::5] == [0.0, 0.5625, 1.125, 1.6875, 2.25]
    assert depth["curve"]["reward"]["mean"][::5] == [0.0, 0.375, 0.75, 1.875, 4.5]
    assert (full["iterations"]["mean"], depth["iterations"]["mean"]) == (3.0, 6.0)
    assert (full["kept_share"]["mean"], depth["kept_share"]["mean"]) == (1.0, 0.5)
    assert depth["cpu_s_per_iteration"]["by_seed"] == [0.5, 0.5]
    assert result["same_iteration"] == 4
    assert depth["after_same_iteration"]["reward"]["against_full"]["by_seed"] == [-2.0, -2.0]
    assert result["base_model"]["reward"] == 0.0


def test_runs_that_do_not_compare_are_refused(tmp_path):
    short = written(tmp_path / "short", 1.0, [0.0, 1.0])
    assert learning_summary.reaches(short, 2.0)
    assert not learning_summary.reaches(short, 2.1)
    assert not learning_summary.reaches(tmp_path / "none", 0.0)
    with pytest.raises(ValueError, match=r"evaluation at 2\.1 CPU seconds or later, got 2 at last"):
        learning_summary.summary({"full": {0: short}}, {"full": 6}, 2.1)
    folders = {"full": {0: short}, "depth": {1: short}}
    with pytest.raises(ValueError, match=r"depth must have seeds \[0\], got \[1\]"):
        learning_summary.summary(folders, {"full": 6, "depth": 6}, 2.0)
    alone = learning_summary.summary({"depth": {0: short}}, {"depth": 6}, 2.0)
    assert alone["arms"]["depth"]["final"]["reward"]["against_full"] is None
    with pytest.raises(ValueError, match=r"compare arms with full .* got \['depth'\] and 1; try"):
        learning_words.check(alone)


def test_words_follow_the_numbers(result):
    other = result["arms"]["depth"]
    for ci, said in (
        ([0.1, 2.0], "differences: above `full`: `depth`."),
        ([-2.0, -0.1], "differences: below `full`: `depth`."),
        ([-0.1, 0.1], "differences: not told apart from `full`: `depth`."),
    ):
        other["final"]["reward"]["against_full"]["ci95"] = ci
        assert said in learning_words.sentences(result)[0]
    cost = learning_words.sentences(result)[1]
    assert "takes 0.50 (`depth`) to 0.50 (`depth`) of `full`'s CPU seconds" in cost
    assert "the same 4 iterations the reward differs from `full`'s by -2.000 ± 0.000" in cost
    (_, row) = learning_words.rows(result)
    assert row[:6] == ["depth", learning_words.WAYS["depth"], "0.50", "0.50 ± 0.00", "6",
                       "4.500 ± 19.059"]  # fmt: skip
    assert len(row) == len(learning_words.head(result))
    assert learning_words.named(["a", "b", "c"]) == "`a`, `b` and `c`"
    meta = {"versions": {"torch": "1"}, "cpu": "x", "date": "d", "commit": "c"}
    text = readme.learning({**result, "meta": meta})
    assert text.startswith(f"    {learning_words.COMMAND}\n")
    assert text.endswith("x, torch 1, d, commit c.")
    assert "Runs of commit c." in readme.learning({**result, "meta": {**meta, "commit": "e"}})


def test_a_section_without_its_result_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "SECTIONS", {"aot": ("aot.json", readme.aot)})
    with pytest.raises(SystemExit, match=r"aot\.json must exist"):
        readme.render("<!-- begin:aot --><!-- end:aot -->")


def test_a_failed_run_shows_its_log_and_stops_the_others(tmp_path, monkeypatch):
    started = {}

    def start(run, options):
        code = (
            "import time; time.sleep(60)" if run.seed else "print('no digits'); raise SystemExit(3)"
        )
        with run.log.open("ab") as log:
            started[run] = subprocess.Popen([sys.executable, "-c", code, *options], stdout=log)
        return started[run]

    monkeypatch.setattr(learning, "_start", start)
    runs = [learning.Run("full", seed, tmp_path / f"full-{seed}") for seed in (1, 0, 2)]
    with pytest.raises(
        RuntimeError, match=r"full, seed 0 must end with status 0, got 3(.|\n)*digits"
    ):
        learning.train_all(runs, 2, [])
    assert list(started) == runs[:2]
    assert started[runs[0]].returncode == -signal.SIGTERM


@pytest.mark.slow
def test_a_whole_small_comparison(tmp_path, capsys):
    """One run is here before, the other is a process of its own."""
    pytest.importorskip("matplotlib")
    words = ["--seeds", "4", "--budget", "1", "--every", "1", "--arms", "full", "depth"]
    words += ["--jobs", "2", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "l.json")]
    words += ["--plot", str(tmp_path / "l.png")]
    learning.train(learning.Run("full", 4, tmp_path / "runs" / "full-4"), 1.0, 1)
    first = (tmp_path / "runs" / "full-4" / "metrics.jsonl").read_bytes()
    learning.main(words)
    assert first == (tmp_path / "runs" / "full-4" / "metrics.jsonl").read_bytes()
    found = json.loads((tmp_path / "l.json").read_text())
    assert found["seeds"] == [4]
    assert found["arms"]["full"]["kept_share"]["mean"] == 1.0
    assert found["arms"]["depth"]["kept_share"]["mean"] == pytest.approx(49 / 81, abs=1e-5)
    assert found["base_model"]["reward"] == pytest.approx(-2.499, abs=5e-3)
    assert found["same_iteration"] >= 1
    difference = found["arms"]["depth"]["after_same_iteration"]["reward"]["against_full"]
    assert 0.0 < abs(difference["mean"]) < 0.5
    assert (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"
    assert "| depth |" in capsys.readouterr().out
    logs = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert len(logs) == 2
    learning.main(words)  # nothing is trained again
    assert logs == {path: path.read_bytes() for path in logs}
    assert json.loads((tmp_path / "l.json").read_text())["arms"] == found["arms"]
