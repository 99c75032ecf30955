"""The GPU check without a GPU: its statistics and verdicts, its minutes, and a rehearsal."""

import contextlib
import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import attempts  # noqa: E402
import checks  # noqa: E402
import gpu_check  # noqa: E402
import gpu_checklist  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_summary  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_verdicts  # noqa: E402
import measure  # noqa: E402
import mmdit  # noqa: E402
import ops_gpu  # noqa: E402
import rounds  # noqa: E402
import workload  # noqa: E402
from gpu_steps import Step  # noqa: E402

from branchcore import _dispatch  # noqa: E402

CPU = torch.device("cpu")


def test_quantiles_and_paired_ratios():
    assert gpu_timing.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    # the machine swings threefold, the ratio of neighbours does not
    assert gpu_timing.paired([2.0, 6.0, 4.0], [1.0, 3.0, 2.0]) == (2.0, 2.0, 2.0)


def test_a_cpu_times_all_sets_of_inputs():
    lane, seen = gpu_timing.Lane(CPU), []
    prepared = lane.prepare(lambda i: lambda: seen.append(i), 3)
    assert (prepared.calls, prepared.graphed, seen) == (3, False, [0, 1, 2, 0])
    times = gpu_timing.time_in_turn(lane, {"a": prepared, "b": prepared}, 0.0, (2, 4))
    assert [len(values) for values in times.values()] == [2, 2]
    assert seen[4:] == [0, 1, 2] * 4
    assert gpu_timing.num_sets(CPU, 10 * 2**20) == 2


class FakeGraph:
    """Replays by calling again what was called while it was captured."""

    capturing, refuses = None, False

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


class FakeCapture:
    def __init__(self, graph, stream):
        self.graph = graph
        assert stream == "stream"

    def __enter__(self):
        if FakeGraph.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        FakeGraph.capturing = self.graph

    def __exit__(self, *_):
        FakeGraph.capturing = None


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def as_torch_has_it(real, fake):
    """Calls a fake with what torch's own function or class would take too."""
    try:
        signature = inspect.signature(real)
    except ValueError:
        return fake

    @functools.wraps(real, updated=())
    def bound(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return fake(*args, **kwargs)

    return bound


def test_torch_has_what_the_gpu_check_asks_of_it():
    """Nothing here runs these lines: a name that torch dropped would show on a GPU alone."""
    files = [
        *BENCH.glob("gpu_*.py"),
        *(BENCH / f"{m}.py" for m in ("ops_gpu", "rounds", "measure")),
    ]
    asked = {name for file in files for name in re.findall(r"torch\.cuda\.(\w+)", file.read_text())}
    assert len(asked) > 10
    assert [name for name in sorted(asked) if not hasattr(torch.cuda, name)] == []


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU whose calls take 20 us each, enough of one to run what is enqueued on it."""
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeGraph, "refuses", False)
    fakes = {"Stream": lambda _: "stream", "stream": lambda _: contextlib.nullcontext()}
    fakes |= {"Event": FakeEvent, "CUDAGraph": FakeGraph, "graph": FakeCapture}
    fakes |= {"synchronize": lambda _: None, "_sleep": lambda cycles: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, as_torch_has_it(getattr(torch.cuda, name), fake))

    def make(i):
        def call():
            FakeEvent.now += 20e-6
            if FakeGraph.capturing:
                FakeGraph.capturing.calls.append(call)

        return call

    return make


@pytest.mark.parametrize("refuses", [False, True])
def test_a_gpu_replays_enough_calls_on_all_sets(fake_gpu, monkeypatch, refuses):
    """300 us of calls of 20 us on 4 sets: 16 of them, captured if that is possible."""
    monkeypatch.setattr(FakeGraph, "refuses", refuses)
    lane = gpu_timing.Lane(torch.device("cuda"))
    prepared = lane.prepare(fake_gpu, 4)
    assert (prepared.calls, prepared.graphed) == (16, not refuses)
    assert prepared.host_seconds > 0.0
    assert prepared.launch_seconds > 0.0
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    times = gpu_timing.time_in_turn(lane, {"a": prepared}, 0.0, (3, 3))
    assert times["a"] == pytest.approx([20e-6] * 3)
    # the GPU is busy until the launch is enqueued, a graph's as well
    hidden = 100e-6 + 1.5 * prepared.launch_seconds
    assert slept == [int(hidden * gpu_timing.CYCLES_PER_SECOND)] * 3


def row(op, size, us, implementation="cuda", **others):
    base = {"op": op, "size": size, "label": "x", "direction": "forward", "normals": 0}
    base |= {"implementation": implementation, "baseline": implementation in ("eager", "compile")}
    return base | {"us": us, "bytes": 0, "ratio_to_compile": None, "graphed": True} | others


def judged(*rows, copy=4e12):
    limits = gpu_verdicts.ceilings(copy, rows)
    found = gpu_verdicts.verdicts([gpu_verdicts.with_floors(r, limits) for r in rows])
    return {verdict.target: verdict for verdict in found}


def test_shares_are_of_the_larger_floor():
    limits = gpu_verdicts.Ceilings(4e12, 1.2e12, None)
    step = row("branch_step", "wan-480p", 100.0, bytes=200_000_000, normals=60_000_000)
    found = gpu_verdicts.with_floors(step, limits)
    assert found["gb_per_s"] == pytest.approx(2000.0)
    assert (found["share_of_copy"], found["share_of_rng"]) == pytest.approx((0.5, 0.5))
    assert found["share_of_floor"] == pytest.approx(0.5)
    assert gpu_verdicts.with_floors(row("gate", "s", 1.0, bytes=1), limits)["share_of_rng"] is None


def test_a_faster_generator_than_the_model_raises_the_floor():
    slow, fast = (row("philox_normal", "s", 1.0, normals=n) for n in (1_000_000, 1_500_000))
    theirs = row("philox_normal", "s", 0.1, "eager", normals=1_000_000)
    assert gpu_verdicts.ceilings(4e12, [theirs])[1:] == (1.2e12, None)
    assert gpu_verdicts.ceilings(4e12, [slow, theirs])[1:] == (1.2e12, pytest.approx(1e12))
    assert gpu_verdicts.ceilings(4e12, [slow, fast])[1:] == pytest.approx((1.5e12, 1.5e12))


@pytest.mark.parametrize(("us", "met"), [(58.0, True), (60.0, False)])
def test_a_target_takes_the_fastest_implementation(us, met):
    """85 % of 4 TB/s on 200 MB is 58.8 us; a baseline that is faster is not ours."""
    rows = [
        row("branch_step", "wan-480p", us, "triton", bytes=200_000_000),
        row("branch_step", "wan-480p", 90.0, bytes=200_000_000),
        row("branch_step", "wan-480p", 1.0, "eager", bytes=200_000_000),
    ]
    verdict = judged(*rows)["branch_step, Wan 480p"]
    assert verdict.met is met
    assert "(triton)" in verdict.got


def test_the_worst_case_is_judged_and_what_is_missing_is_said():
    found = judged(
        row("gate_norm_modulate", "sd35-512", 10.0, bytes=38_000_000),
        row("gate_norm_modulate", "flux-1024", 10.0, bytes=34_000_000),
        row("branch_step", "sd35-512", 5.5, ratio_to_compile=2.0),
        row("sde_log_prob", "sd35-512", 5.5, ratio_to_compile=0.9),
    )
    forward = found["gate_norm_modulate, forward"]
    assert (forward.met, forward.got.split(",")[1]) == (False, " flux-1024 x (cuda)")
    assert found["gate_norm_modulate, backward"].met is None
    assert found["branch_step, 512 px"] == (
        "branch_step, 512 px", "<= 6 us", "5.50 us, sd35-512 x (cuda)", True
    )  # fmt: skip
    assert found["branch_step, against torch.compile"].met
    assert found["sde_log_prob, against torch.compile"].met is False
    assert found["gate_norm_modulate, against torch.compile"].met is None


def test_what_was_not_captured_is_said():
    """A launch costs microseconds itself: the target of 6 us is not judged by it."""
    found = judged(
        row("branch_step", "sd35-512", 9.0, ratio_to_compile=2.0, graphed=False),
        row("sde_log_prob", "sd35-512", 5.5, ratio_to_compile=2.0),
        row("sde_log_prob", "sd35-512", 11.0, "compile", graphed=False),
    )
    verdict = found["branch_step, 512 px"]
    assert (verdict.got, verdict.met) == ("9.00 us, sd35-512 x (cuda, not captured)", None)
    assert found["sde_log_prob, against torch.compile"].got.endswith("torch.compile not captured")


def test_without_a_copy_there_is_no_share():
    verdict = judged(row("branch_step", "wan-480p", 1.0, bytes=8), copy=None)[
        "branch_step, Wan 480p"
    ]
    assert (verdict.got, verdict.met) == ("not measured", None)


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "a.json"
    attempts.write_json(path, {"a": [float("nan"), 1.0], "b": (float("inf"), "NaN", None)})
    assert json.loads(path.read_text()) == {"a": [None, 1.0], "b": [None, "NaN", None]}


def test_the_tape_leaves_room_for_a_batch(monkeypatch):
    """10 of 110 bytes are kept per state: half of 11 states' memory less a batch of 5."""

    class View:
        latent_shape = (2,)

        def velocity(self, x, *_):
            held.append(40)
            return x.requires_grad_()

    held = [0]
    fakes = {"memory_allocated": lambda _: sum(held), "empty_cache": lambda: None}
    fakes["mem_get_info"] = lambda _: (110, 200)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, as_torch_has_it(getattr(torch.cuda, name), fake))
    assert measure.tape_states(View(), CPU, 5) == 3
    assert measure.tape_states(View(), CPU, 50) == 0


@pytest.mark.parametrize(("on_gpu", "ran"), [(True, 1), (False, 3)])
def test_a_gpu_stops_after_a_round_if_no_other_fits(monkeypatch, on_gpu, ran):
    bench = rounds.Bench.__new__(rounds.Bench)
    bench.names, bench.once, bench.on_gpu = ["a"], set(), on_gpu
    monkeypatch.setattr(bench, "run", lambda name: name, raising=False)
    bar = type("Bar", (), {"set_description": lambda *_: None, "update": lambda _: None})()
    assert bench.rounds(bar, 0.0, lambda _: None) == {"a": ["a"] * ran}


class Pieces(gpu_checklist.Checklist):
    """A checklist of one part, without a model."""

    def __init__(self, budget):
        self.device, self.path, self.errors, self.failures, self.cut = CPU, None, [], [], []
        self.end, self.result = gpu_checklist.time.perf_counter() + budget, {}


def test_a_part_that_breaks_is_recorded_and_only_bits_are_judged():
    pieces = Pieces(10.0)
    for name in ("matmul", "bitwise"):
        pieces.part(name, lambda: 1 // 0)
    assert [e["what"] for e in pieces.errors] == ["matmul"]
    assert [e["what"] for e in pieces.failures] == ["bitwise"]
    assert "ZeroDivisionError" in pieces.result["matmul"]["error"]
    pieces.part("compiled forward of 2", lambda: 1, 11.0)
    assert pieces.cut == ["compiled forward of 2"]


def test_slow_releases_are_timed_once_slowest_first():
    cost = {"dance": 10.0, "branch": 20.0, "engine": 2.0}
    released = ["dance", "branch"]
    assert rounds.too_slow(cost, released, 96.0) == set()
    assert rounds.too_slow(cost, released, 95.0) == {"branch"}
    assert rounds.too_slow(cost, released, 1.0) == {"dance", "branch"}


COMPARABLE = ("sde_log_prob", "gate_norm_modulate", "qk_norm_rope", "group_norm_silu")


def test_baselines_compute_what_ours_do(tmp_path):
    """Every case without fresh noise, forward and backward, to a few roundings of bf16."""
    compared = 0
    for case in ops_gpu.Bench(CPU, None, 60.0).cases(",".join(COMPARABLE)):
        ours, theirs = case.ours(0)(), case.baseline(lambda function: function)(0)()
        if isinstance(ours, torch.Tensor):
            ours, theirs = (ours,), (theirs,)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            scale = float(mine.float().abs().max())
            assert float((mine.float() - other.float()).abs().max()) < 0.04 * scale, case.label
        compared += 1
    assert compared == 2 + 4 + 4 + 2


def test_a_red_op_is_not_timed_and_the_run_fails(tmp_path, monkeypatch):
    bench = ops_gpu.Bench(CPU, tmp_path / "ops.json", 60.0)
    case = next(case for case in bench.cases("sde_log_prob"))
    monkeypatch.setattr(bench, "cases", lambda _: [case])
    spec = sys.modules["branchcore.ops.sde_log_prob"].SPEC
    wrong = {"op": lambda **kw: 1.001 * spec.op(**kw)}
    broken = type(spec)(**{**spec.__dict__, **wrong})
    monkeypatch.setattr(sys.modules["branchcore.ops.sde_log_prob"], "SPEC", broken)
    assert bench.run(None)
    assert bench.rows == []
    assert "must agree with float64" in bench.failures[0]["error"]
    assert json.loads((tmp_path / "ops.json").read_text())["conformance"].popitem()[1] is False


def test_a_budget_names_what_it_cuts_and_a_resumed_run_repeats_nothing(tmp_path):
    path = tmp_path / "ops.json"
    assert ops_gpu.main(CPU, "philox", path, 0.0, "time") == 0
    assert len(json.loads(path.read_text())["cut"]) == 4
    assert ops_gpu.main(CPU, "philox", path, 60.0, "time") == 0
    first = json.loads(path.read_text())
    assert {r["implementation"] for r in first["rows"]} == {"eager", "compile", "cpp"}
    assert all(r["ratio_to_eager"] > 0 for r in first["rows"] if not r["baseline"])
    copied = first["ceilings"]["copy_s"]
    best = min(copied[name]["median"] for name in ("copy", "negated copy"))
    assert first["ceilings"]["copy_bytes_per_s"] == pytest.approx(2**20 / best)
    left, lost = first["rows"][:3], first["rows"][3]["name"]
    part = {"rows": left, "failures": [{"what": lost, "error": "x"}], "conformance": {}}
    part["copy_seconds"] = {"copy": [1e-9] * 999}
    path.write_text(json.dumps(part))
    assert ops_gpu.main(CPU, "philox", path, 60.0, "resume") == 1
    second = json.loads(path.read_text())
    assert second["rows"][0]["us"] == left[0]["us"]
    assert lost not in {r["name"] for r in second["rows"]}
    assert len(second["rows"]) == len(first["rows"]) - 3
    assert second["ceilings"]["copy_s"]["copy"]["median"] == 1e-9


def test_an_implementation_that_kills_its_context_is_not_tried_again(tmp_path, monkeypatch):
    """The first case breaks with it; the resumed run times that case and all others without it."""
    path, both = tmp_path / "ops.json", ["cpp", "reference"]
    conforms = ops_gpu.Bench.conforms

    def illegal(self, case, each):
        if each == "cpp":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return conforms(self, case, each)

    monkeypatch.setattr(ops_gpu, "implementations", lambda *_: both)
    monkeypatch.setattr(ops_gpu.Bench, "conforms", illegal)
    monkeypatch.setattr(attempts, "context_is_dead", lambda: True)
    assert ops_gpu.main(CPU, "branch_step", path, 60.0, "time") == ops_gpu.BROKEN
    first = json.loads(path.read_text())
    assert first["rows"] == []
    assert [f["fatal"] for f in first["failures"]] == ["yes"]
    assert ops_gpu.main(CPU, "branch_step", path, 60.0, "resume") == 1
    second = json.loads(path.read_text())
    assert len(second["failures"]) == 1
    ours = [(r["size"], r["implementation"]) for r in second["rows"] if not r["baseline"]]
    assert ours == [("wan-480p", "reference"), ("sd35-512", "reference")]


class Fake:
    """Steps of a check that take no time: small programs instead of the real ones."""

    def __init__(self, monkeypatch, out, limit=4.0):
        self.steps, self.out = [], out
        monkeypatch.setattr(gpu_check, "phases", lambda *_: [(1.0, [s]) for s in self.steps])
        monkeypatch.setattr(gpu_check, "GRACE", tuple((how, 0.2) for how, _ in gpu_check.GRACE))
        self.limit = limit

    def add(self, name, code, **options):
        self.steps.append(Step(name, [sys.executable, "-c", code], **options))

    def run(self, tmp_path):
        logs = tmp_path / "logs"
        logs.mkdir()
        check = gpu_check.Check(self.out, "cpu", self.limit, logs)
        code = check.run()
        return code, {step["name"]: step for step in check.steps}


def test_a_failing_step_is_recorded_and_the_later_ones_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fake = Fake(monkeypatch, out)
    fake.add("breaks", "import sys; print('why'); sys.exit(3)", result=out / "a.json")
    fake.add("skips", "", skipped="no such tool")
    fake.add("works", f"open({str(out / 'b.json')!r}, 'w').write('{{}}')", result=out / "b.json")
    code, steps = fake.run(tmp_path)
    assert code == 1
    assert [step["status"] for step in steps.values()] == ["failed", "skipped", "ok"]
    assert steps["breaks"]["code"] == 3
    # no result of its own: what is there says so, and is JSON
    left = json.loads((out / "a.json").read_text())
    assert left["status"] == "failed"
    assert left["log"].endswith("why")
    assert json.loads((out / "b.json").read_text()) == {}
    page = (out / "summary.md").read_text()
    assert "| breaks | failed |" in page
    assert "| skips | skipped |  |  | no such tool |" in page
    assert "rehearsal" in page


def test_a_step_that_hangs_is_cut_off_with_its_children(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fake = Fake(monkeypatch, out, limit=12.0)
    hang = "import subprocess, sys, time; print('on'); sys.stdout.flush();"
    hang += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']);"
    fake.add("hangs", hang + "time.sleep(99)")
    fake.add("works", "print(1)")
    code, steps = fake.run(tmp_path)
    assert code == 1
    assert steps["hangs"]["status"] == "cut off"
    assert 5.0 <= steps["hangs"]["seconds"] < 9.0
    assert steps["hangs"]["log"].endswith("on") or "KeyboardInterrupt" in steps["hangs"]["log"]
    assert steps["works"]["status"] == "ok"


def test_a_whole_result_without_failures_was_cut_short(tmp_path, monkeypatch):
    """Both are ended at once, and half a file that is left behind goes."""
    out = tmp_path / "out"
    fake = Fake(monkeypatch, out, limit=6.0)
    code = "import json, sys, time; p = {0!r}; json.dump({{'failures': {1}}}, open(p, 'w'));"
    code += "open(p + '.part', 'w'); time.sleep(99)"
    for name, failures in (("good", []), ("bad", ["x"])):
        path = out / f"{name}.json"
        fake.add(name, code.format(str(path), failures), result=path)
    monkeypatch.setattr(gpu_check, "phases", lambda *_: [(1.0, fake.steps)])
    code, steps = fake.run(tmp_path)
    assert {name: step["status"] for name, step in steps.items()} == {
        "good": "cut short", "bad": "cut off"
    }  # fmt: skip
    assert code == 1
    assert abs(steps["good"]["seconds"] - steps["bad"]["seconds"]) < 0.15
    assert list(out.glob("*.part")) == []


def test_tests_that_were_all_skipped_are_no_success(tmp_path, monkeypatch):
    cases = {"some": "", "none": "<skipped/>", "other": ""}
    fake = Fake(monkeypatch, tmp_path / "out")
    for name, inside in cases.items():
        junit = tmp_path / f"{name}.xml"
        which = "cpp" if name == "other" else "cuda-gpu"
        case = f'<testcase name="test[a-{which}-b]">{inside}</testcase>'
        junit.write_text(f'<testsuite tests="1">{case}</testsuite>')
        fake.add(name, "", junit=junit, must_run="cuda-gpu")
    code, steps = fake.run(tmp_path)
    assert [step["status"] for step in steps.values()] == ["ok", "failed", "failed"]
    assert "'cuda-gpu' in its name must run, got none" in steps["none"]["why"]
    assert code == 1


def test_a_broken_context_is_left_behind(tmp_path, monkeypatch):
    """Exit code 75 runs the step again with --mode resume, until it ends otherwise."""
    out, seen = tmp_path / "out", tmp_path / "seen"
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[1]);"
    code += "old = p.read_text() if p.exists() else ''; p.write_text(old + ' '.join(sys.argv[2:])"
    code += " + ';'); sys.exit(75 if old.count(';') < 2 else 0)"
    fake = Fake(monkeypatch, out, limit=60.0)
    fake.add("ops", code, resumable=True)
    fake.steps[0] = fake.steps[0]._replace(command=[*fake.steps[0].command, str(seen)])
    code, steps = fake.run(tmp_path)
    assert (code, steps["ops"]["status"], steps["ops"]["resumed"]) == (0, "ok", 2)
    assert seen.read_text() == ";--mode resume;--mode resume;"


def test_what_a_sanitizer_says():
    clean = "branch_step: 9 cases\n9 cases ran with cuda\n========= ERROR SUMMARY: 0 errors"
    found = ["branch_step: 9 cases", "ERROR SUMMARY: 0 errors"]
    assert gpu_steps.sanitized(clean, "ok") == (None, found)
    refused = "========= Error: Device not supported. Please refer to the documentation"
    assert gpu_steps.sanitized(refused, "failed")[0] == "skipped"
    # an op that is refused in the middle of a run is no excuse
    assert gpu_steps.sanitized(clean + "\nnot supported", "failed")[0] is None
    begun = "12 cases to run\nbranch_step: 9 cases\n"
    found = ["9 of 12 cases", "branch_step: 9 cases"]
    assert gpu_steps.sanitized(begun, "cut off") == ("cut short", found)
    step = {"name": "racecheck", "status": "cut short", "found": found}
    assert gpu_summary.step_row(step)[-1] == "9 of 12 cases"
    hit = "========= Program hit cudaErrorInvalidValue (error 1)"
    assert gpu_steps.sanitized(hit, "cut off") == (None, [hit])
    wrong = "========= Invalid __global__ write of size 4 bytes"
    assert gpu_steps.sanitized(wrong, "cut off") == (None, [wrong])


def test_the_doctors_report_is_found_between_warnings():
    text = '$ doctor\nwarning\n{\n "a": 1\n}\n'
    assert gpu_steps.first_json(text, "ok") == (None, {"a": 1})
    assert "error" in gpu_steps.first_json("$ doctor\nTraceback", "failed")[1]


def test_counts_come_from_junit(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase name="good"/><testcase name="bad"><failure message="1 != 2&#10;more"/>'
        '</testcase><testcase name="off"><skipped message="x"/></testcase></testsuite></testsuites>'
    )
    found = gpu_summary.counts(path)
    assert found == {
        "tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["bad: 1 != 2"]
    }  # fmt: skip
    assert "no count" in gpu_summary.counts(tmp_path / "none.xml")["error"]


def test_minutes_and_files_of_a_run_on_a_gpu(tmp_path):
    """Nine minutes with what is not timed side by side; eight files at most."""
    planned = gpu_steps.phases(tmp_path, "cuda", tmp_path / "logs")
    assert sum(seconds for seconds, _ in planned) <= 530.0
    steps = [step for _, phase in planned for step in phase]
    names = [step.name for step in steps]
    assert names.index("install") < names.index("conformance") < names.index("ops")
    results = {step.result.name for step in steps if step.result}
    # and check.json, log.txt, summary.md, the PNG
    assert len(results) + 4 <= 8
    timed = [phase for _, phase in planned if phase[0].name in ("ops", "checklist", "tree")]
    assert [len(phase) for phase in timed] == [1, 1, 1]


def test_the_model_has_the_flops_it_claims_and_trains_its_lora_alone():
    from torch.utils.flop_counter import FlopCounterMode

    config = mmdit.SD35M
    with torch.device("meta"):
        module = mmdit.MMDiT(config)
        side, shape = config.side, (1, config.text_tokens, config.text_width)
        inputs = torch.empty(1, 16, side, side), torch.empty(1), torch.empty(shape)
        with FlopCounterMode(display=False) as counted:
            module(*inputs, torch.empty(1, config.pooled_width))
    # LoRA and modulation: 1.3 %
    assert 1.0 < counted.get_total_flops() / config.flops < 1.02
    model = mmdit.MMDiTModel(mmdit.SMALL, 2, CPU, torch.float32)
    trained = {n for n, p in model.module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4 * 2
    assert all(name.endswith((".down", ".up")) for name in trained)


def test_rows_of_the_model_have_their_own_noise_level_and_prompt():
    model = mmdit.MMDiTModel(mmdit.SMALL, 2, CPU, torch.float64)
    x = torch.randn(4, *model.latent_shape, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.4, 0.9, 0.4], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 1, 1])
    together = model.velocity(x, sigma, prompt)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model.velocity(x[one], sigma[one], prompt[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-14)
    same = model.velocity(x[:1].expand(4, -1, -1, -1), sigma, prompt)
    assert all((same[i] - same[0]).abs().max() > 1e-3 for i in range(1, 4))


def test_part_of_the_tape_and_small_batches_have_the_gradient_of_all(monkeypatch):
    """As on a GPU, whose memory holds some graphs: 5 states taped, 4 rows to a call."""
    monkeypatch.setattr(checks, "WAYS", {"tape": checks.WAYS["tape"]})
    monkeypatch.setattr(checks, "LIMITS", {torch.float64: 1e-12})
    load = workload.workload("mmdit-small", 12, 7, CPU)._replace(tape=5, max_batch=4)
    found = checks.run_checks(load, ["exact:branch", "steel:branch", "engine"])
    assert [c.name for c in found if not c.passed] == []
    gaps = [c.value for c in found if c.kind == "a gradient fp64"]
    assert len(gaps) == 3
    assert max(gaps) < 1e-13


def test_the_benchmark_runs_without_diffusers(tmp_path):
    """Its GPU model is plain torch: nothing that it imports may want diffusers or sklearn."""
    code = (
        "import sys; sys.modules['diffusers'] = sys.modules['sklearn'] = None;"
        f"sys.path.insert(0, {str(BENCH)!r}); import tree_throughput as t;"
        "sys.exit(t.main(['--model', 'mmdit-small', '--device', 'cpu', '--leaves', '12', '--steps',"
        "'7', '--plans', 'exact:branch_mix', '--check-only']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checks pass" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(_dispatch.ISA == "none", reason="needs the compiled module")
def test_a_rehearsal_runs_every_step(tmp_path):
    """Through the shell script, on the CPU; its own limit is far away."""
    out = tmp_path / "out"
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [str(BENCH / "gpu_check.sh"), str(out), "--device", "cpu", "--limit", "400"]
    environment = {"PATH": path, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    result = json.loads((out / "check.json").read_text())
    statuses = {step["name"]: step["status"] for step in result["steps"]}
    assert done.returncode == 0, (statuses, done.stdout[-3000:])
    for name in ("doctor", "conformance", "gpu tests", "compile 1", "ops", "checklist", "tree"):
        assert statuses[name] == "ok"
    ops = json.loads((out / "ops.json").read_text())
    assert {r["op"] for r in ops["rows"]} >= {"branch_step", "gate_norm_modulate"}
    assert ops["failures"] == ops["cut"] == []
    found = json.loads((out / "checklist.json").read_text())
    assert found["bitwise"]["two_runs_equal"]
    assert len(found["decoder"]) == 6
    tree = json.loads((out / "tree_throughput.json").read_text())
    assert all(check["pass"] for check in tree["checks"].values())
    assert tree["ratios"]["exact:branch/branch"]["cpu"] > 1.0
    assert len(list(out.iterdir())) <= 8
    assert "no number here means anything" in (out / "summary.md").read_text()
