"""The tree benchmark: its checks pass and can fail, its maths is right, its flags explain."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytest.importorskip("diffusers")

import checks  # noqa: E402
import measure  # noqa: E402
import tree_throughput  # noqa: E402
import workload  # noqa: E402
from plans.exact import exact  # noqa: E402

SMALL = ["--leaves", "12", "--steps", "7", "--prompts", "2"]
STAGES = ["rollout", "decode", "reward", "advantage", "train", "optimizer"]


@pytest.mark.slow
def test_all_checks_pass_on_a_small_tree(capsys, tmp_path):
    out = tmp_path / "checks.json"
    assert tree_throughput.main([*SMALL, "--check-only", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    found = result["checks"]
    assert all(check["pass"] for check in found.values())
    assert result["plans"] == {}
    assert result["ratios"] == {}
    for name in ("dance", "flow", "branch", "branch_mix"):
        assert found[f"a gradient fp64: exact:{name}, tape"]["value"] <= 1e-12
        assert found[f"e max |ratio - 1| fp32: exact:{name}, tape"]["value"] == 0.0
    # n_i = 1 2 4 12 12 12 12 for splits 0 1 2; the release trains depth 7 too
    assert found["f F / E / P / D, 2 prompts: branch"]["value"] == [110, 132, 110, 24]
    assert found["f F / E / P / D, 2 prompts: exact:branch"]["value"] == [110, 108, 86, 24]
    assert found["f F / E / P / D, 2 prompts: engine"]["value"] == [110, 36, 14, 24]
    assert f"{len(found)} of {len(found)} checks pass" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quick_run_writes_every_field(tmp_path, capsys):
    out, png = tmp_path / "r.json", tmp_path / "r.png"
    chosen = ["branch", "exact:branch", "steel:branch", "engine"]
    arguments = [*SMALL, "--plans", ",".join(chosen), "--budget", "1"]
    pytest.importorskip("matplotlib")
    assert tree_throughput.main([*arguments, "--json", str(out), "--plot", str(png)]) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"meta", "config", "checks", "plans", "ratios"}
    assert {"commit", "versions", "cpu", "date", "load_average_start", "threads"} <= set(
        result["meta"]
    )
    assert result["config"]["rounds"] == 3
    assert list(result["plans"]) == chosen
    for name, plan in result["plans"].items():
        assert {"median_s", "cpu_s", "ci95", "F", "E", "P", "D", "split", "peak_mem"} <= set(plan)
        assert list(plan["split"]) == STAGES
        assert plan["ci95"][0] <= plan["cpu_s"] <= plan["ci95"][1]
        # medians of stages: the sum is near the median of sums, never far
        assert 0.5 * plan["cpu_s"] <= sum(plan["split"].values()) <= 1.5 * plan["cpu_s"], name
        assert plan["D"] == 24
    assert result["plans"]["branch"]["extrapolated"]
    assert result["plans"]["branch"]["prompts_timed"] == 1
    assert not result["plans"]["engine"]["extrapolated"]
    ratio = result["ratios"]["exact:branch/branch"]
    assert {"cpu", "wall", "ci95"} <= set(ratio)
    assert ratio["ci95"][0] <= ratio["cpu"] <= ratio["ci95"][1]
    assert ratio["cpu"] > 1.0
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "| exact:branch/branch |" in capsys.readouterr().out


def scaled(task, clock, **options):
    outcome = exact(task, clock, **options)
    for p in task.model.inner.module.parameters():
        p.grad.mul_(1.001)
    return outcome


def drifting(task, clock, **options):
    return exact(task, clock, **options)._replace(ratio_dev=1e-16)


def wasteful(task, clock, **options):
    plan, root = task.plan(), np.zeros(1, dtype=np.int64)
    with clock("rollout"):
        task.velocity(plan, root, task.noise(plan)(root))
    return exact(task, clock, **options)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (scaled, "a gradient fp64: exact:branch_mix, tape"),
        (wasteful, "f F / E / P / D, 2 prompts: exact:branch_mix"),
        (drifting, "e max |ratio - 1| fp64: exact:branch_mix"),
    ],
)
def test_a_wrong_engine_fails_the_run_and_is_named(run, named, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checks, "WAYS", {"tape": run})
    out = tmp_path / "r.json"
    arguments = [*SMALL, "--plans", "exact:branch_mix", "--json", str(out)]
    assert tree_throughput.main(arguments) == 1
    captured = capsys.readouterr()
    assert "checks must pass, failed" in captured.err
    assert named in captured.err
    assert "FAIL" in captured.out
    assert json.loads(out.read_text())["plans"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--leaves", "10"], "--leaves must be one of 12, 16, 24, 81, got 10"),
        (["--model", "flux"], "--model must be one of auto, digits, tiny, got 'flux'"),
        (["--steps", "6"], "--steps must be at least 7, for distinct splits, got 6"),
        (["--plans", "dance,tree"], "--plans must be from dance, flow, branch"),
        (["--prompts", "0"], "--prompts must be 1 to 60, got 0"),
        (
            ["--json", "no/such/r.json"],
            "--json must be in a folder that exists, got no/such/r.json",
        ),
        (["--budget", "0"], "--budget must be positive, got 0"),
        (["--steps", "ten"], "invalid int value: 'ten'"),
    ],
)
def test_a_bad_flag_says_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tree_throughput.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_paired_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    slow, fast = [2.0, 30.0, 8.0, 4.0, 10.0], [1.0, 10.0, 2.0, 2.0, 1.0]
    ratio, (low, high) = measure.paired_ratio(slow, fast)
    assert ratio == 3.0
    assert np.median(slow) / np.median(fast) == 4.0
    assert 2.0 <= low <= ratio <= high <= 10.0
    assert measure.paired_ratio(slow, fast) == (ratio, (low, high))


def test_a_constant_ratio_has_no_width_however_the_machine_swings():
    machine = np.array([1.0, 4.0, 0.5, 2.0])
    assert measure.paired_ratio(6 * machine, 2 * machine) == (3.0, (3.0, 3.0))


def test_the_bootstrap_covers_a_known_median():
    """95 % of intervals should hold the true median; 40 rounds of a skewed law, 200 repeats."""
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        low, high = measure.median_ci(rng.lognormal(size=40))
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 200


def test_rounds_must_pair_up():
    with pytest.raises(ValueError, match="rounds must pair up and not be empty, got 2 and 1"):
        measure.paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("leaves", "steps", "work"),
    [
        # PERFORMANCE's table for BranchGRPO, N and T, released loop: F, E, P, D
        (12, 10, (83, 94, 83, 12)),
        (16, 20, (203, 218, 203, 16)),
        (24, 25, (367, 390, 367, 24)),
        (81, 16, (754, 834, 754, 81)),
    ],
)
def test_closed_forms_are_the_published_ones(leaves, steps, work):
    load = workload.workload("digits", leaves, steps, tree_throughput.torch.device("cpu"))
    plan = load.recipes["branch"].plan([0], seed=0, iteration=0)
    assert tuple(workload.closed_form("branch", load, plan, 1)) == work
    clean = workload.closed_form("exact:branch", load, plan, 1)
    assert tuple(clean) == tuple(plan.counts())
    assert clean.E + leaves == work[1]
    flow = load.recipes["flow"].plan([0], seed=0, iteration=0)
    assert tuple(workload.closed_form("flow", load, flow, 1))[:2] == (
        leaves * steps,
        leaves * int(0.99 * steps),
    )
