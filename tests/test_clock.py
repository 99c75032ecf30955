"""Stage times: exclusive, complete, booked to who queued the work; skew between ranks."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch

from branchcore import clock, recipes, schedule, watch
from branchcore.clock import STAGES, Stages, skew
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

CPU = torch.device("cpu")
SG = schedule.shifted_linear(4)
CONFIG = TrainerConfig(
    iterations=2, prompts_per_iteration=2, ema_decay=0.9, checkpoint_every=1, evaluate_every=2
)


@pytest.fixture
def tick(monkeypatch):
    """Time that passes by being told to, for the clock and the watch alike."""
    now = [100.0]

    class Fake:
        @staticmethod
        def perf_counter():
            return now[0]

    for module in (clock, watch):
        monkeypatch.setattr(module, "time", Fake)

    def tick(seconds):
        now[0] += seconds

    return tick


def test_times_are_exclusive_and_add_up(tick):
    stages = Stages(CPU)
    tick(50)
    stages.begin()
    tick(1)
    with stages("rollout"):
        tick(2)
        with stages("reward"):
            tick(4)
            with stages("rollout"):
                tick(8)
        tick(16)
    with stages("reward"):
        tick(32)
    expected = {"rollout": 2 + 8 + 16, "reward": 4 + 32, "other": 1}
    assert stages.lap() == expected
    assert list(expected) == [s for s in STAGES if s in expected]
    tick(3)
    assert stages.lap() == {"other": 3}


def test_a_stage_that_fails_is_closed(tick):
    stages = Stages(CPU)

    @stages("update")
    def fails():
        with stages("optimizer"):
            tick(2)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    tick(1)
    assert stages.lap() == {"update": 0, "optimizer": 2, "other": 1}


def test_a_lap_inside_a_stage_splits_it(tick):
    stages = Stages(CPU)
    with stages("update"):
        tick(2)
        assert stages.lap() == {"update": 2, "other": 0}
        tick(3)
    assert stages.lap() == {"update": 3, "other": 0}


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match=r"stage must be one of .*'rollout'.*, got 'sleep'"):
        Stages(CPU)("sleep").__enter__()


class Device:
    """A GPU that works off what is queued; host and device have a time of their own."""

    def __init__(self):
        self.host, self.device, self.waits = 0.0, 0.0, 0

    def launch(self, seconds):
        self.device = max(self.device, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.device)
        self.waits += 1


def test_queued_work_is_booked_to_its_stage_without_waiting(monkeypatch):
    gpu = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.at = max(gpu.device, gpu.host)

        def synchronize(self):
            gpu.wait()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    stages = Stages(torch.device("cuda:1"))
    stages.begin()
    with stages("rollout"):
        gpu.host += 1.0
        gpu.launch(10.0)
    with stages("reward"):
        gpu.host += 3.0
    with stages("update"):
        gpu.launch(5.0)
        with stages("optimizer"):
            gpu.wait()
            gpu.host += 2.0
    assert gpu.waits == 1
    lap = stages.lap()
    assert gpu.waits == 2
    assert lap == {"rollout": 11.0, "reward": 0.0, "update": 5.0, "optimizer": 2.0, "other": 0.0}
    assert sum(lap.values()) == gpu.host


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_of_a_real_gpu_add_up_to_the_wall_time():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    stages, start = Stages(device), time.perf_counter()
    stages.begin()
    with stages("rollout"):
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)
        queued = time.perf_counter() - start
    with stages("reward"):
        pass
    lap, wall = stages.lap(), time.perf_counter() - start
    assert sum(lap.values()) == pytest.approx(wall, rel=0.02)
    assert lap["rollout"] > 0.9 * wall > queued
    assert lap["reward"] < 0.05 * wall


def test_skew_names_the_slowest_rank():
    seconds = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
    assert skew(seconds, ("rollout", "reward", "decode")) == {
        "skew/rollout": pytest.approx(1.0),
        "slowest/rollout": 2,
        "skew/reward": pytest.approx(0.0),
        "slowest/reward": 0,
    }
    assert skew(seconds[:1, :1], ("rollout",)) == {"skew/rollout": 0.0, "slowest/rollout": 0}


@pytest.mark.parametrize("shape", [(3,), (3, 2), (0, 3)])
def test_skew_checks_its_table(shape):
    with pytest.raises(ValueError, match=r"skew: seconds_WS must be \(W, S\) with W >= 1, S=3"):
        skew(np.zeros(shape), ("rollout", "reward", "decode"))


def parts(toy, tick):
    """A model, a reward and an evaluation that each take a known time."""

    class Slow(toy):
        def velocity(self, x, sigma, prompt):
            tick(0.25 if torch.is_grad_enabled() else 1.0)
            return super().velocity(x, sigma, prompt)

        def decode(self, latents):
            tick(10.0)
            return latents

    def reward(images, prompts):
        tick(100.0)
        return {"mean": images.flatten(1).mean(1)}

    def evaluate(model):
        tick(1000.0)
        return {"reward": 1.0}

    return Slow(torch.float32), reward, evaluate


def test_rows_tell_where_the_time_of_a_run_went(toy, tmp_path, tick):
    model, reward, evaluate = parts(toy, tick)
    recipe = recipes.dance_grpo(SG, group=4, clip=0.5, updates=2)

    def callback(metrics):
        tick(5000.0)

    trainer = Trainer(
        model, ["a", "b"], reward, recipe, CONFIG, tmp_path / "run",
        evaluate=evaluate, callbacks=[callback],
    )  # fmt: skip
    save, optimizer_step = trainer.learner.optimizer.state_dict, trainer.learner.optimizer.step
    trainer.learner.optimizer.step = lambda: (tick(0.5), optimizer_step())
    trainer.learner.optimizer.state_dict = lambda: (tick(7.0), save())[1]
    tick(10_000)  # between construction and run: nobody's
    start = clock.time.perf_counter()
    trainer.run()
    total = clock.time.perf_counter() - start
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [
        {k.removeprefix("time/"): v for k, v in r.items() if k.startswith("time/")} for r in lines
    ]
    assert times[0] == {"evaluation": 1000.0, "other": 0.0}
    for row, seconds in zip(lines, times, strict=True):
        assert sum(seconds.values()) == pytest.approx(row["wall_s"], rel=1e-9)
    first, second = times[1:]
    assert first["decode"] == second["decode"] == 10.0
    assert first["reward"] == second["reward"] == 100.0
    assert first["optimizer"] == second["optimizer"] == 1.0
    assert first["credit"] == 0.0
    assert first["rollout"] > 1.0
    assert first["update"] > 0.0
    assert "evaluation" not in first
    assert second["evaluation"] == 1000.0
    assert "checkpoint" not in first
    # of the first two rows, which are logged together, and of what followed them
    assert second["callbacks"] == 2 * 5000.0
    assert second["checkpoint"] == 7.0
    after = 5000.0 + 7.0
    assert sum(r["wall_s"] for r in lines) + after == pytest.approx(total)


def test_real_times_add_up_to_the_wall_time(toy, tmp_path):
    model, reward, evaluate = parts(toy, lambda seconds: time.sleep(seconds / 1e5))
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    config = dataclasses.replace(CONFIG, iterations=4)
    trainer = Trainer(
        model, ["a", "b"], reward, recipe, config, tmp_path / "run", evaluate=evaluate
    )
    trainer.run()
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        seconds = [v for k, v in row.items() if k.startswith("time/")]
        assert sum(seconds) == pytest.approx(row["wall_s"], rel=0.02)


def test_a_step_alone_has_its_times(toy, tmp_path, tick):
    model, reward, _ = parts(toy, tick)
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    trainer = Trainer(model, ["a", "b"], reward, recipe, CONFIG, tmp_path / "run")
    tick(10_000)
    for _ in range(2):
        row = trainer.step()
        assert row["time/reward"] == 100.0
        seconds = sum(v for k, v in row.items() if k.startswith("time/"))
        assert seconds == row["wall_s"] < 1000.0


def test_overlapped_rewards_count_as_the_wait_for_them(toy, tmp_path):
    """Three rounds of 0.3 s with rewards of 0.2 s: two of these hide behind the next round."""

    class Slow(toy):
        def decode(self, latents):
            time.sleep(0.3)
            return latents

    def reward(images, prompts):
        time.sleep(0.2)
        return {"mean": images.flatten(1).mean(1)}

    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    config = TrainerConfig(
        iterations=1, prompts_per_iteration=3, prompts_per_round=1, overlap_rewards=True
    )
    trainer = Trainer(Slow(torch.float32), ["a"], reward, recipe, config, tmp_path / "run")
    row = trainer.step()
    assert 0.15 <= row["time/reward"] < 0.35
    assert row["time/decode"] >= 0.9
