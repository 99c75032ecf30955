"""The tree benchmark: its checks pass and can fail, its maths is right, its flags explain."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytest.importorskip("diffusers")

import checks  # noqa: E402
import measure  # noqa: E402
import picture  # noqa: E402
import ratios  # noqa: E402
import tree_throughput  # noqa: E402
import work  # noqa: E402
import workload  # noqa: E402
from measure import Costs  # noqa: E402
from plans import BASES, CORE, PLANS  # noqa: E402
from plans.exact import exact  # noqa: E402
from plans.steps import Seen, dpm_step, flow_step, log_prob, ratio_norm  # noqa: E402

SMALL = ["--leaves", "12", "--steps", "7", "--prompts", "2"]
CPU = torch.device("cpu")
OTHERS = ("mix", "flash", "tree", "tempflow", "g2rpo", "guard")
STAGES = ["rollout", "decode", "reward", "advantage", "train", "optimizer"]


@pytest.mark.slow
def test_all_core_checks_pass_on_a_small_tree(capsys, tmp_path):
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
    # first split to last: n_i = 1 2 4, then 12 leaves of a tail of 2 steps
    assert found["f F / E / P / D, 2 prompts: engine"]["value"] == [62, 36, 14, 24]
    assert f"{len(found)} of {len(found)} checks pass" in capsys.readouterr().out


def narrow(monkeypatch, *ways):
    """Checks some ways to a gradient, in float64 only: for time."""
    monkeypatch.setattr(checks, "WAYS", {way: checks.WAYS[way] for way in ways})
    monkeypatch.setattr(checks, "LIMITS", {torch.float64: 1e-12})


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_release_has_the_gradient_of_its_recipe(name, monkeypatch):
    """In float64, in the two ways that differ most; the bench's own run does them all."""
    narrow(monkeypatch, "tape", "packed")
    found = checks.run_checks(workload.workload("digits", 12, 7, CPU), [name, f"exact:{name}"])
    assert [check.name for check in found if not check.passed] == []
    compared = [check for check in found if check.limit is not None]
    # gradient, latents, ratio, advantages of both ways; work of the release and of the tape
    assert len(compared) == 2 * 4 + 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tail"), [("exact:flash", 5), ("engine", 5)])
def test_second_order_tails_are_those_of_the_edge_by_edge_loop(name, tail, monkeypatch):
    narrow(monkeypatch, "tape")
    load = workload.workload("digits", 12, 16, CPU)
    plan = load.recipes[PLANS[name].recipe].plan([0], seed=0, iteration=0)
    assert plan.history.sum() == 12 * (tail - 1 if name == "exact:flash" else tail - 2)
    assert [check.name for check in checks.run_checks(load, [name]) if not check.passed] == []


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("tempflow", "step_weights", False), ("g2rpo", "strides", (1, 1)), ("tree", "beta", 3.0)],
)
def test_another_estimator_fails_and_is_named(name, option, value, monkeypatch):
    options = workload.recipe_options(12, 7)
    options[name] |= {option: value}
    monkeypatch.setattr(workload, "recipe_options", lambda _leaves, _steps: options)
    narrow(monkeypatch, "tape")
    monkeypatch.setattr(checks, "PROMPTS", {torch.float64: 1})
    found = checks.run_checks(workload.workload("digits", 12, 7, CPU), [f"exact:{name}"])
    failed = [check.name for check in found if not check.passed]
    expected = "f F / E / P / D, 1 prompts" if name == "g2rpo" else "a gradient fp64"
    assert any(check.startswith(f"{expected}: exact:{name}") for check in failed)


@pytest.mark.slow
def test_a_quick_run_writes_every_field(tmp_path, capsys, monkeypatch):
    narrow(monkeypatch, "tape")
    monkeypatch.setattr(checks, "PROMPTS", {torch.float64: 1})
    out, png = tmp_path / "r.json", tmp_path / "r.png"
    chosen = ["branch_mix", "exact:branch_mix", "engine"]
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
    assert result["plans"]["branch_mix"]["extrapolated"]
    assert result["plans"]["branch_mix"]["prompts_timed"] == 1
    assert not result["plans"]["engine"]["extrapolated"]
    ratio = result["ratios"]["exact:branch_mix/branch_mix"]
    assert {"cpu", "wall", "ci95"} <= set(ratio)
    assert ratio["ci95"][0] <= ratio["cpu"] <= ratio["ci95"][1]
    assert ratio["cpu"] > 1.0
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "| exact:branch_mix/branch_mix |" in capsys.readouterr().out


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
    narrow(monkeypatch, "tape")
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
        (["--model", "flux"], "sana, sd35m512-small, flux512-small"),
        (["--model", "flux"], "wan240-small, sana-small, got 'flux'"),
        (["--steps", "6"], "--steps must be at least 7, for distinct splits, got 6"),
        (["--plans", "dance,nft"], "--plans must be from dance, flow, branch"),
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident set from /proc")
def test_memory_that_is_freed_stays_and_is_handed_back_before_a_measurement():
    """In a process of its own: 64 MiB freed, resident after, gone at the next measurement."""
    code = """
import measure, torch
kept = measure.keep_freed_memory()
before = measure._status_kib("VmRSS")
torch.ones(16, 2**20)
after = measure._status_kib("VmRSS")
with measure.PeakMemory(torch.device("cpu")) as peak:
    low = measure._status_kib("VmRSS")
    torch.ones(4, 2**20)
print(kept, after - before >= 2**16, low - before < 2**15, 16 <= peak.mib < 32)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True)
    if done.stdout.startswith("False"):
        pytest.skip("this libc has no mallopt")
    assert done.stdout.split() == ["True"] * 4, done.stdout + done.stderr


def test_rounds_must_pair_up():
    with pytest.raises(ValueError, match="rounds must pair up and not be empty, got 2 and 1"):
        measure.paired_ratio([1.0, 2.0], [1.0])


def counts(name, leaves, steps):
    """Closed form and the plan's own counts, (F, E, P, D) of one prompt."""
    load = workload.workload("digits", leaves, steps, CPU)
    plan = load.recipes[PLANS[name].recipe].plan([0], seed=0, iteration=0)
    return tuple(work.closed_form(name, load, plan, 1)), tuple(plan.counts())


@pytest.mark.parametrize(
    ("leaves", "steps", "expected"),
    [
        # published table for BranchGRPO, N and T, released loop: F, E, P, D
        (12, 10, (83, 94, 83, 12)),
        (16, 20, (203, 218, 203, 16)),
        (24, 25, (367, 390, 367, 24)),
        (81, 16, (754, 834, 754, 81)),
    ],
)
def test_closed_forms_of_branch_and_flow_are_the_published_ones(leaves, steps, expected):
    assert counts("branch", leaves, steps)[0] == expected
    clean, own = counts("exact:branch", leaves, steps)
    assert clean == own
    assert clean[1] + leaves == expected[1]
    assert counts("flow", leaves, steps)[0][:2] == (leaves * steps, leaves * int(0.99 * steps))


@pytest.mark.parametrize(
    ("name", "leaves", "steps", "expected"),
    [
        # 4 seeds of 6 children: 4 (9 + 6 * 45) forwards
        ("tempflow", 24, 10, (1116, 216, 36, 216)),
        # FLUX, strides 1 and 2, the anchor's image counted
        ("g2rpo", 12, 16, (1792, 96, 8, 193)),
        # tails of an action share their first two steps, the anchor ends at its half
        ("exact:g2rpo", 12, 16, (1496, 96, 8, 192)),
        # FLUX, window at 5
        ("mix", 12, 25, (300, 48, 37, 12)),
        ("exact:mix", 12, 25, (300 - 11 * 6, 48, 37, 12)),
        # i + (k^d - 1) / (k - 1) + k^d (T - i - d) at i = 1, k = 3, d = 4
        ("tree", 81, 10, (1 + 40 + 81 * 5, 120, 40, 81)),
        ("guard", 24, 10, (240, 216, 216, 24)),
    ],
)
def test_closed_forms_of_the_others_are_the_published_ones(name, leaves, steps, expected):
    assert counts(name, leaves, steps)[0] == expected


@pytest.mark.parametrize("steps", [7, 10, 16, 25])
@pytest.mark.parametrize("name", [n for n in PLANS if n.startswith("exact:") or n == "engine"])
def test_closed_forms_are_what_the_plan_counts(name, steps):
    closed, own = counts(name, 16 if steps > 7 else 12, steps)
    assert closed == own


def test_the_released_second_order_step_converges_as_published():
    """Data N(1.3, 0.4^2) with its exact velocity, sigma 0.9 to 0.1, from x = 2."""

    def last(num):
        levels, before = np.linspace(0.9, 0.1, num + 1).tolist(), None
        x = torch.full((1,), 2.0, dtype=torch.float64)
        for sigma, after in pairwise(levels):
            variance = (1 - sigma) ** 2 * 0.16 + sigma**2
            x0 = 1.3 + 0.16 * (1 - sigma) / variance * (x - (1 - sigma) * 1.3)
            here = Seen(sigma, x0)
            x, before = dpm_step(x, here, before, after), here
        return float(x)

    def std(sigma):
        return math.sqrt((1 - sigma) ** 2 * 0.16 + sigma**2)

    exact_end = 0.9 * 1.3 + std(0.1) / std(0.9) * (2.0 - 0.1 * 1.3)
    errors = [abs(last(num) - exact_end) for num in (16, 32, 64, 128)]
    np.testing.assert_allclose(errors, [0.005736, 0.001667, 0.000431, 0.000108], rtol=6e-3)


def test_the_released_second_order_step_ends_at_the_prediction():
    x, x0, old = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    ended = dpm_step(x, Seen(0.3, x0), Seen(0.6, old), 0.0)
    np.testing.assert_array_equal(ended, x0)
    # nothing is remembered of pure noise, where lambda is -inf
    alone, after_noise = (dpm_step(x, Seen(0.6, x0), b, 0.3) for b in (None, Seen(1.0, old)))
    np.testing.assert_array_equal(alone, after_noise)
    np.testing.assert_allclose(alone, 0.5 * x + 0.5 * x0, atol=1e-15)


def test_ratio_norm_is_the_mean_of_noise_times_drift():
    """Off policy too: the exponent is mean(eps (mu - mu_old)), without 1 / s and its square."""
    generator = torch.Generator().manual_seed(0)
    x, v_old, v, eps = torch.randn(4, 3, 40, generator=generator).double()
    (old_mean, std), (mean, _) = (flow_step(x, u, 0.8, 0.7, 0.7, 0.9) for u in (v_old, v))
    y = old_mean + std * eps
    ratio = ratio_norm(log_prob(y, mean, std), log_prob(y, old_mean, std), mean, old_mean, std)
    np.testing.assert_allclose(ratio.log(), (eps * (mean - old_mean)).mean(1), rtol=1e-12)


def timed(**seconds):
    row = {"F": 10, "E": 4, "P": 2, "D": 8}
    return {
        name.replace("_of_", ":"): {**row, "cpu_s": s, "rounds_cpu_s": [s], "rounds_wall_s": [s]}
        for name, s in seconds.items()
    }


def test_the_fastest_release_at_equal_leaves_has_the_engine_target():
    plans = timed(dance=8.0, mix=4.0, tempflow=1.0, engine=0.5, exact_of_mix=2.0)
    found = ratios.ratios(plans, costs=Costs(3.0, 1.0, 3.0))
    assert list(found) == ["exact:mix/mix", "engine/dance", "engine/mix"]
    assert found["engine/mix"]["target"] == ratios.FASTEST_TARGET == 4.0
    assert found["engine/dance"]["target"] is None
    assert found["exact:mix/mix"]["target"] == 3.0
    assert found["exact:mix/mix"]["cpu"] == 2.0
    # 10 + 3 E rows released, 10 + 2 P on the tape
    assert found["exact:mix/mix"]["predicted"] == 22 / 14


def test_on_a_gpu_wall_time_is_the_headline_and_nothing_is_required():
    plans = timed(dance=8.0, engine=2.0, exact_of_dance=4.0)
    plans["dance"]["rounds_wall_s"] = [4.0, 6.0, 5.0]
    for name in ("engine", "exact:dance"):
        plans[name]["rounds_wall_s"] = [1.0, 1.0, 1.0]
    for plan in plans.values():
        plan["rounds_cpu_s"] *= 3
    found = ratios.ratios(plans, costs=Costs(3.0, 1.0, 3.0), clock="wall", tape=1)
    assert (found["engine/dance"]["wall"], found["engine/dance"]["cpu"]) == (5.0, 4.0)
    assert found["engine/dance"]["ci95"] == (4.0, 6.0)
    assert [row["target"] for row in found.values()] == [None, None]
    # 10 + 3 E released; 10 + 2 P on the tape, one of two parents forwarded once more
    assert found["exact:dance/dance"]["predicted"] == 22 / 15


def test_a_gpu_times_the_shapes_of_sd35m_and_leaves_the_mixed_form_out():
    gpu = torch.device("cuda", 0)
    load = workload.workload("auto", 16, 10, gpu)
    assert (load.model_name, load.max_batch, load.tape) == ("sd35m-shape", 16, None)
    assert load.timed_dtype == torch.bfloat16
    assert workload.workload("auto", 16, 10, CPU).model_name == "digits"
    assert {name for name in CORE if name not in tree_throughput.GPU_CORE} == {
        "branch_mix",
        "exact:branch_mix",
    }
    assert (ratios.clock_of(gpu), ratios.clock_of(CPU)) == ("wall", "cpu")


def test_a_release_that_trains_by_parent_is_predicted_so():
    found = ratios.ratios(timed(g2rpo=8.0, exact_of_g2rpo=2.0), costs=Costs(3.0, 1.0, 3.0))
    assert found["exact:g2rpo/g2rpo"]["predicted"] == 16 / 14


def test_guidance_as_released_is_predicted_at_its_own_cost():
    found = ratios.ratios(timed(flow=8.0, exact_of_flow=2.0), costs=Costs(2.0, 1.5, 5.0))
    # 1.5 of 10 forwards and 5 of 4 edges released, 10 + 1 P on the tape
    assert found["exact:flow/flow"]["predicted"] == 35 / 12


def test_costs_of_calls_tell_the_released_form_apart():
    class View:
        latent_shape = (4096,)
        weight = torch.ones(4096, 64, requires_grad=True)

        def velocity(self, x, sigma, prompt):
            return (x @ self.weight) @ self.weight.T

        def released_velocity(self, x, sigma, prompt):
            return self.velocity(x.repeat(4, 1), sigma, prompt)

    costs = measure.call_costs(View(), CPU, rows=256)
    assert costs.pair > 1.5
    assert costs.released_forward > 2.0
    assert costs.released_pair > 2.0 * costs.pair
    del View.released_velocity
    plain = measure.call_costs(View(), CPU)
    assert (plain.released_forward, plain.released_pair) == (1.0, plain.pair)


def test_core_is_the_default_and_a_part_of_all():
    chosen = tree_throughput.options(["--check-only"])
    assert (chosen.plans, chosen.budget) == (list(CORE), 110.0)
    everything = tree_throughput.options(["--check-only", "--plans", "all"])
    assert (everything.plans, everything.budget) == (list(PLANS), 420.0)
    assert set(PLANS) - set(CORE) == {p + n for n in OTHERS for p in ("", "exact:")}
    assert len(BASES) + len(BASES) + 3 == len(PLANS)


def test_rows_of_a_panel_are_apart_where_their_kind_changes():
    names = ["dance", "flow", "exact:dance", "steel:dance", "engine"]
    assert picture.heights(names) == [0.0, -1.0, -2.5, -4.0, -5.5]
    assert picture.heights(["engine/dance", "engine/flow", "engine/steel:dance"])[1:] == [-1, -2.5]
