"""The planner: its forecasts against what runs take, its refusals, its neighbours, its words."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from branchcore.parallel import ParallelConfig
from branchcore.planner.near import Impossible
from branchcore.planner.request import Request, size_text, words_of
from branchcore.planner.speed import Curve
from branchcore.planner.spread import Spread

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import planner_cases

from branchcore.cli import main
from branchcore.models.sizing.memory import bytes_of
from branchcore.planner.sheet import count, sheet_speed
from branchcore.planner.solve import Planner
from branchcore.planner.words import report


@pytest.fixture(scope="module")
def planner():
    return Planner(clock=time.process_time, seconds=1.0)


@pytest.fixture(scope="module")
def request_of(tiny_folder):
    def request(model="digits", flags=(), **given):
        flags = dict(flags)
        if model != "digits":
            flags = {"path": str(tiny_folder(model)), **flags}
        return planner_cases.asked(model=model, flags=flags, **given)

    return request


CHEAP = [name for name, (given, _) in planner_cases.IMPOSSIBLE.items() if "model" not in given]


@pytest.mark.parametrize("name", [*CHEAP, "height"])
def test_what_cannot_run_is_refused_with_a_neighbour_that_does(name, planner, request_of, tmp_path):
    given, said = planner_cases.IMPOSSIBLE[name]
    request = request_of(**given)
    with pytest.raises(Impossible, match=rf"; the nearest possible: .*{said}") as error:
        planner.plan(request)
    nearest = error.value.nearest
    assert nearest != request
    assert planner_cases.runs(planner.plan(nearest), tmp_path)


def test_forecasts_are_near_what_a_run_takes(tmp_path):
    """The bench has 20 runs; bounds here are wide, as other tests may use the processor too."""
    zoo = planner_cases.Zoo(tmp_path)
    fields = {"prompts_per_iteration": 4, "prompts_per_round": 2, "max_batch": 16, "tape": 5}
    options = {"group": 4, "kl": 0.05}
    case = planner_cases.Case("digits", {}, True, "flow_grpo", options, 5, fields)
    row = planner_cases.compare(zoo, case)
    assert abs(row["memory_ratio"] - 1.0) <= 0.15
    assert 0.5 <= row["time_ratio"] <= 2.0


def test_a_probe_leaves_no_trace(planner, request_of):
    planned = planner.plan(request_of(leaves=4))
    module = planned.subject.model.module
    before = [p.detach().clone() for p in module.parameters()]
    torch.manual_seed(3)
    planner.forecast(planned)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_what_is_set_is_kept_and_what_is_open_is_chosen(planner, request_of):
    fields = {"prompts_per_iteration": 6, "prompts_per_round": 2, "tape": 3}
    planned = planner.plan(request_of(leaves=4, fields=fields))
    assert {k: getattr(planned.config, k) for k in fields} == fields
    assert planned.config.max_batch == 8  # a wave of two prompts of four chains
    small = planner.plan(request_of(leaves=4, memory=16_000_000, recipe="dance_grpo"))
    assert small.memory.peak <= 16_000_000
    assert small.config.tape < planner.plan(request_of(leaves=4, recipe="dance_grpo")).config.tape


def test_a_curve_goes_through_its_points():
    curve = Curve((1, 4), (1.0, 7.0))
    assert [curve.at(n) for n in (0, 1, 2, 4, 5)] == [0.0, 1.0, 3.0, 7.0, 9.0]
    assert Curve.line(1.0, 0.5).sum([1, 3]) == 1.5 + 2.5
    assert Curve((2,), (3.0,)).at(4) == 6.0


def test_sharding_divides_what_is_always_there():
    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(4))
    fixed = {"transformer": 1024, "moments": 2048, "gradients": 1024, "vae": 100}
    whole = Spread.of(ParallelConfig(), 1, module)
    assert whole.fixed(fixed) == fixed
    shard = Spread.of(ParallelConfig(kind="shard"), 4, module)
    assert shard.fixed(fixed) == fixed | {"transformer": 1024 + 256, "moments": 512}
    reshard = Spread.of(ParallelConfig(kind="shard", reshard=True, offload=True), 4, module)
    assert reshard.fixed(fixed) == fixed | {"transformer": 512, "moments": 0}
    with pytest.raises(ValueError, match="shards must divide the 4 GPUs, got 3 per copy"):
        Spread.of(ParallelConfig(kind="shard", shards=3), 4, module)


def test_a_named_gpu_is_forecast_from_its_data_sheet(planner, request_of):
    planned = planner.plan(request_of(leaves=4, gpus=4, gpu="H100"))
    found = planner.forecast(planned)
    assert "assume 40% of the 989.4 TFLOP/s" in found.source
    assert found.seconds["reduction"] > 0
    model = planned.subject.model
    flop = count(model, planned.subject.prompts[0])
    assert flop.backward > flop.forward > 2e6
    speed = sheet_speed(model, planned.subject.prompts[0], "A100")
    assert speed.call.at(512) == pytest.approx(max(512 * flop.forward / 124.8e12, speed.call.at(1)))
    assert "4 GPUs" in report(planned, found)


def test_the_command_says_what_an_iteration_does(capsys):
    words = ["plan", "flow_grpo", "--model", "digits", "--group", "4"]
    main([*words, "--prompts-per-update", "3", "--memory", "1GB", "--compare", "branch_mix"])
    said = capsys.readouterr().out
    assert said.startswith(
        "One iteration of flow_grpo takes 3 prompts and grows 4 images from each."
    )
    assert "Chosen, for train: --set prompts_per_round=3 --set max_batch=12 --set tape=" in said
    assert "rollout" in said
    assert "At as many leaves per prompt:" in said
    assert "branch_mix" in said.splitlines()[-2]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--memory", "10KB"])
    assert "the nearest possible: --memory" in str(stop.value)
    with pytest.raises(SystemExit, match="recipe must be named"):
        main(["plan"])


def test_train_logs_its_forecast_beside_what_happened(tmp_path, capsys):
    words = ["train", "--recipe", "flow_grpo", "--out", str(tmp_path / "run"), "--iterations", "2"]
    for setting in ("group=4", "prompts_per_iteration=2", "evaluate_every=9"):
        words += ["--set", setting]
    main(words)
    assert "forecast of an iteration:" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if json.loads(line)["iteration"] > 0]
    assert rows[0]["plan/seconds"] > 0.0
    assert rows[0]["plan/memory_gb"] > 0.003
    assert "plan/seconds" not in rows[1]


def test_requests_say_themselves_in_the_words_of_the_command_line():
    with pytest.raises(ValueError, match="gpus must be at least 1, got 0"):
        Request(gpus=0)
    request = Request(flags={"height": 16}, fields={"tape": 3}, leaves=4)
    assert request.given() == {
        ("flags", "height"): 16, ("fields", "tape"): 3, ("", "leaves"): 4, ("", "gpus"): 1,
    }  # fmt: skip
    assert request.put(("fields", "tape"), None).fields == {}
    assert request.put(("", "gpus"), 8).gpus == 8
    assert words_of(("fields", "tape"), 2) == "--set tape=2"
    assert words_of(("flags", "full"), None) == "no --full"
    assert bytes_of(size_text(12_345_678)) >= 12_345_678
