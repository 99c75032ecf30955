"""The trainer: exact resume, rounds, updates, EMA, and errors that leave nothing half-done."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
import rank_faults
import torch

from branchcore import checkpoint, recipes, schedule, stages
from branchcore.checkpoint import storage
from branchcore.metrics import repeatable
from branchcore.model_commands import settings
from branchcore.policy import BadUpdate
from branchcore.pruning_config import PruningConfig
from branchcore.rewards import Rewards, component_weights, score
from branchcore.stages import prompt_indices
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SG = schedule.shifted_linear(6)
PROMPTS = ["a", "b", "c", "d", "e"]
CONFIG = TrainerConfig(
    iterations=5, prompts_per_iteration=3, lr=1e-3, ema_decay=0.9, checkpoint_every=2,
    evaluate_every=2,
)  # fmt: skip


def reward(images, prompts):
    shift = torch.tensor([ord(p) for p in prompts]) % 3
    flat = images.flatten(1)
    return {"mean": -(flat.mean(1) - 0.2 * shift).abs(), "spread": -flat.std(1)}


def mix(**options):
    return recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7, kl=0.05, **options)


def run(toy, out, config=CONFIG, recipe=None, resume=False, stop_after=None, the_reward=reward):
    model = toy(torch.float32)

    def stop(metrics):
        if metrics["iteration"] == stop_after:
            raise KeyboardInterrupt

    trainer = Trainer(
        model, PROMPTS, the_reward, recipe or mix(), config, out,
        evaluate=lambda m: {"norm": sum(float(p.detach().norm()) for p in m.module.parameters())},
        callbacks=[stop], resume=resume,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()
    return trainer


def lagging():
    """A recipe whose sampling policy follows the trained one slowly, as DiffusionNFT's."""
    recipe = recipes.dance_grpo(SG, group=4, clip=0.5, eta=0.7)
    return dataclasses.replace(recipe, sampler_decay=lambda iteration: 0.9)


def rows(out):
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [repeatable(row) for row in lines]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()])


RESUMED = {
    "tree": mix,
    "two updates": lambda: recipes.dance_grpo(SG, group=4, clip=0.1, updates=2),
    "lagging sampler": lagging,
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_resume_continues_bit_for_bit(toy, tmp_path, stop_after, kind):
    recipe = RESUMED[kind]()
    whole = run(toy, tmp_path / "whole", recipe=recipe)
    run(toy, tmp_path / "cut", recipe=recipe, stop_after=stop_after)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 9, "rew')
    rest = run(toy, tmp_path / "cut", recipe=recipe, resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert torch.equal(weights(rest), weights(whole))
    averaged = [
        torch.cat([v.flatten() for v in t.learner.ema.tensors().values()]) for t in (rest, whole)
    ]
    assert torch.equal(*averaged)


def test_rows_tell_what_happened(toy, tmp_path):
    run(toy, tmp_path / "run")
    logged = rows(tmp_path / "run")
    assert [r["iteration"] for r in logged] == [0, 1, 2, 3, 4, 5]
    assert [("eval/norm" in r) for r in logged] == [True, False, True, False, True, True]
    for row in logged[1:]:
        assert row["ratio_dev_max"] == 0.0
        assert row["clip_share"] == 0.0
        assert row["leaves"] == 3 * 8
        assert row["reward"] == pytest.approx(row["reward/mean"] + row["reward/spread"])
        assert 0 <= row["zero_std_share"] <= 1
    assert logged[1]["kl"] > 0
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-000005"


@pytest.mark.parametrize("options", [{"prompts_per_round": 1}, {"max_batch": 4}, {"tape": 0}])
def test_memory_options_change_only_rounding(toy, tmp_path, options):
    config = dataclasses.replace(CONFIG, iterations=1)
    whole = run(toy, tmp_path / "whole", config)
    part = run(toy, tmp_path / "part", dataclasses.replace(config, **options))
    assert (weights(whole) - weights(part)).abs().max() <= 2e-6


@pytest.fixture
def counting(toy):
    """A toy whose rows are as long as its prompts say, and a record of its calls with gradient."""

    class CountingToy(toy):
        variable_length = True

        def row_tokens(self, prompt):
            return np.array([3 + 7 * (ord(p) - 97) for p in self.prompts])[prompt]

        def velocity(self, x, sigma, prompt):
            self.calls.append((torch.is_grad_enabled(), self.row_tokens(prompt.numpy()).sum()))
            return super().velocity(x, sigma, prompt)

    CountingToy.calls = []
    return CountingToy


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("max_batch", [None, 5])
def test_calls_of_updates_are_filled_by_tokens(counting, tmp_path, updates, max_batch):
    recipe = recipes.dance_grpo(SG, group=4, clip=0.1, updates=updates)
    config = dataclasses.replace(CONFIG, iterations=2, tape=0, max_batch=max_batch)
    whole = run(counting, tmp_path / "whole", config, recipe)
    counting.calls.clear()
    packed = run(counting, tmp_path / "packed", dataclasses.replace(config, max_tokens=70), recipe)
    of_updates = [tokens for grad, tokens in counting.calls if grad]
    assert max(of_updates) <= 70
    assert sum(of_updates) > 70 * len(of_updates) / 3
    assert (weights(whole) - weights(packed)).abs().max() <= 1e-6
    first = [tokens for grad, tokens in counting.calls if not grad]
    assert max_batch == 5 or max(first) > 70
    kept = {"reward", "loss", "parents", "edges"}
    for one, other in zip(rows(tmp_path / "whole")[1:], rows(tmp_path / "packed")[1:], strict=True):
        assert {k: other[k] for k in kept} == pytest.approx({k: one[k] for k in kept}, abs=1e-5)


def test_the_noise_floor_is_measured_within_the_budget(counting, tmp_path):
    recipe = recipes.dance_grpo(SG, group=4, clip=0.1, updates=2)
    config = dataclasses.replace(CONFIG, iterations=1, max_tokens=70)
    trainer = Trainer(counting(torch.float32), PROMPTS, reward, recipe, config, tmp_path / "run")
    seen, floor = {}, stages.noise_floor

    def spy(batch, recipe, **limits):
        counting.calls.clear()
        found = floor(batch, recipe, **limits)
        seen.update(limits, tokens=[tokens for _, tokens in counting.calls])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "noise_floor", spy)
        trainer.step()
    assert seen["max_tokens"] == 70
    assert len(seen["tokens"]) == 1
    assert 35 < seen["tokens"][0] <= 70


def test_a_budget_of_tokens_is_checked_before_the_run(toy, counting, tmp_path):
    config = dataclasses.replace(CONFIG, max_tokens=20)
    out = tmp_path / "run"
    with pytest.raises(TypeError, match=r"must have row_tokens .* got ToyModel; try max_batch"):
        Trainer(toy(torch.float32), PROMPTS, reward, mix(), config, out)
    with pytest.raises(ValueError, match="max_tokens must hold a row of 31, got 20"):
        Trainer(counting(torch.float32), ["e", "a"], reward, mix(), config, out)
    Trainer(counting(torch.float32), PROMPTS, reward, mix(), config, out)
    assert not out.exists()
    for wrong, error in ((0, ValueError), (2.5, TypeError), ("70", TypeError)):
        with pytest.raises(error, match="max_tokens must be"):
            dataclasses.replace(CONFIG, max_tokens=wrong)
    options, fields = settings(
        ["max_tokens=4096", "prune=optimal", "prune_measure=20"], "flow_grpo"
    )
    assert options == {}
    assert fields == {"max_tokens": 4096, "prune": PruningConfig(rule="optimal", measure=20)}


def test_several_updates_use_stored_velocities(toy, tmp_path):
    recipe = recipes.dance_grpo(SG, group=6, eta=0.7, clip=0.2, updates=3)
    config = dataclasses.replace(CONFIG, iterations=2, lr=1e-2)
    run(toy, tmp_path / "run", config, recipe)
    row = rows(tmp_path / "run")[-1]
    assert row["ratio_dev_max"] > 1e-6
    assert row["edges"] <= 3 * 6 * 3
    assert 0.0 < row["noise_floor"] < 1e-5
    one = run(toy, tmp_path / "one", config, recipes.dance_grpo(SG, group=6, eta=0.7))
    assert rows(tmp_path / "one")[-1]["ratio_dev_max"] == 0.0
    assert int(one.learner.optimizer.state_dict()["state"][0]["step"]) == 2


def test_a_clip_below_the_noise_floor_warns(toy, tmp_path):
    recipe = recipes.dance_grpo(SG, group=6, clip=1e-12, updates=2)
    config = dataclasses.replace(CONFIG, iterations=1, max_batch=5)
    with pytest.warns(UserWarning, match="clip range must exceed the noise floor"):
        run(toy, tmp_path / "run", config, recipe)


def test_reward_improves(toy, tmp_path):
    config = dataclasses.replace(CONFIG, iterations=60, lr=5e-3, prompts_per_iteration=5)
    run(toy, tmp_path / "run", config)
    reached = [r["reward"] for r in rows(tmp_path / "run")[1:]]
    assert np.mean(reached[-10:]) > np.mean(reached[:10]) + 0.1


def test_averaged_puts_the_weights_back(toy, tmp_path):
    trainer = run(toy, tmp_path / "run")
    before = weights(trainer).clone()
    with trainer.averaged():
        assert not torch.equal(weights(trainer), before)
    assert torch.equal(weights(trainer), before)


def test_prompts_come_in_shuffled_epochs():
    drawn = np.concatenate([prompt_indices(5, 3, seed=1, iteration=i) for i in range(10)])
    for epoch in drawn.reshape(6, 5):
        assert sorted(epoch) == [0, 1, 2, 3, 4]
    again = prompt_indices(5, 3, seed=1, iteration=7)
    np.testing.assert_array_equal(again, drawn[21:24])
    assert len(prompt_indices(2, 7, seed=0, iteration=1)) == 7


def failing(kind):
    def broken(images, prompts):
        scores = reward(images, prompts)
        if kind == "raises":
            raise KeyError("service is down")
        if kind == "nan":
            scores["mean"][3] = float("nan")
        if kind == "inf":
            scores["mean"][0] = float("inf")
        if kind == "count":
            scores["mean"] = scores["mean"][:-1]
        if kind == "shape":
            scores["mean"] = scores["mean"][:, None]
        if kind == "tensor":
            return scores["mean"]
        return {} if kind == "empty" else scores

    return broken


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "raises",
            RuntimeError,
            "must score 24 images, raised KeyError: 'service is down'",
        ),
        ("nan", ValueError, r"reward: mean must be finite, got nan for image 3 \('.'\) and 0 more"),
        ("inf", ValueError, r"reward: mean must be finite, got inf for image 0"),
        ("count", ValueError, r"reward: mean must be \(24,\), one per image, got \(23,\)"),
        ("shape", ValueError, r"reward: mean must be \(24,\), one per image, got \(24, 1\)"),
        ("tensor", TypeError, "reward: result must be a mapping .*got Tensor"),
        ("empty", TypeError, "reward: result must be a mapping .*got dict"),
    ],
)
def test_a_broken_reward_stops_before_any_weight_changes(toy, tmp_path, kind, error, message):
    before = torch.cat([p.detach().flatten() for p in toy(torch.float32).module.parameters()])
    config = dataclasses.replace(CONFIG, reward_attempts=1)
    trainer = Trainer(toy(torch.float32), PROMPTS, failing(kind), mix(), config, tmp_path / "run")
    with pytest.raises(error, match=message):
        trainer.run()
    assert torch.equal(weights(trainer), before)
    assert not (tmp_path / "run").exists()


def test_a_failed_iteration_leaves_no_gradient_behind(toy, tmp_path):
    """The reward fails in the second round; the iteration done again equals one never failed."""
    config = dataclasses.replace(CONFIG, prompts_per_round=1, iterations=1, reward_attempts=1)
    calls = []

    def second_fails(images, prompts):
        calls.append(0)
        if len(calls) == 2:
            raise OSError("gone")
        return reward(images, prompts)

    trainer = Trainer(toy(torch.float32), PROMPTS, second_fails, mix(), config, tmp_path / "a")
    with pytest.raises(RuntimeError, match="raised OSError: gone"):
        trainer.step()
    again = trainer.step()
    fresh = Trainer(toy(torch.float32), PROMPTS, reward, mix(), config, tmp_path / "b").step()
    assert again["grad_norm"] == fresh["grad_norm"]


@pytest.mark.parametrize(
    "options", [{"reward_weights": {"a": 1.0}}, {"reward_weights": {"mean": -1.0, "spread": 0.0}}]
)
def test_a_run_that_cannot_start_leaves_no_folder(toy, tmp_path, options):
    with pytest.raises(ValueError, match="reward: weights must"):
        run(toy, tmp_path / "run", dataclasses.replace(CONFIG, **options))
    assert not (tmp_path / "run").exists()
    assert run(toy, tmp_path / "run").iteration == 5


def test_rewards_go_by_leaf_not_by_position():
    images = torch.arange(3.0)[:, None]
    scores = score(
        lambda x, p: {"r": x[:, 0], "len": torch.tensor([len(t) for t in p])},
        images,
        ["a", "bb", "c"],
    )
    np.testing.assert_array_equal(scores.values, [[0, 1], [1, 2], [2, 1]])


@pytest.mark.parametrize(
    ("weights_of", "message"),
    [
        ({"a": 1.0}, r"weights must name the components \['a', 'b'\], got \['a'\]"),
        ({"a": 1.0, "b": -1.0}, "weights must be >= 0 and not all 0"),
        ({"a": 0.0, "b": 0.0}, "weights must be >= 0 and not all 0"),
    ],
)
def test_component_weights_are_checked(weights_of, message):
    with pytest.raises(ValueError, match=message):
        component_weights(("a", "b"), weights_of)
    np.testing.assert_array_equal(component_weights(("b", "a"), {"a": 1, "b": 2}), [2, 1])


def test_a_folder_with_another_run_is_refused(toy, tmp_path):
    run(toy, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=r"out must be a new folder, got .* with another run"):
        run(toy, tmp_path / "run")
    for other in (recipes.flow_grpo(SG, group=4), mix(clip=0.5), mix(correlate=2.0)):
        with pytest.raises(ValueError, match="must be of a run with the same recipe, got"):
            run(toy, tmp_path / "run", recipe=other, resume=True)
    with pytest.raises(ValueError, match="must be of a run with the same config"):
        run(toy, tmp_path / "run", dataclasses.replace(CONFIG, lr=1.0), resume=True)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    longer = run(toy, tmp_path / "run", dataclasses.replace(CONFIG, iterations=7), resume=True)
    assert longer.iteration == 7


def damage(folder, kind):
    model, state = folder / "model" / "rank-00000.safetensors", folder / "state.json"
    known = json.loads(state.read_text())
    if kind == "cut":
        model.write_bytes(model.read_bytes()[:200])
    if kind == "pickle":
        torch.save({"a": torch.zeros(1)}, model)
    if kind == "missing":
        model.unlink()
    if kind == "state":
        state.write_text(state.read_text()[:30])
    if kind == "keys":
        del known["cpu_s"]
        state.write_text(json.dumps(known))
    if kind == "list":
        state.write_text("[1]")
    if kind == "run":
        (folder.parent / "run.json").write_text('{"recipe": ')
    if kind == "log":
        (folder.parent / "metrics.jsonl").write_text("not a row\n")
    if kind == "format":
        state.write_text(json.dumps(known | {"format": "other"}))
    if kind == "reward":
        state.write_text(json.dumps(known | {"reward": [{"seed": 1}]}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "must be whole safetensors"),
        ("pickle", "must be whole safetensors"),
        ("missing", "must hold model/rank-00000.safetensors, got no such file"),
        ("state", "must be JSON, got damaged text"),
        ("keys", "must have a cpu_s, got nothing"),
        ("list", "must hold an object, got list"),
        ("run", "run.json must be JSON, got damaged text"),
        ("log", "must hold one JSON row per iteration"),
        ("format", "must have format 'branchcore-checkpoint-2', got 'other'"),
        ("reward", "state.json must hold no state of function, got one"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(toy, tmp_path, kind, message):
    run(toy, tmp_path / "run", dataclasses.replace(CONFIG, iterations=2))
    damage(checkpoint.latest(tmp_path / "run"), kind)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        run(toy, tmp_path / "run", resume=True)
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


def foreign(folder, kind):
    """Writes the checkpoint again with other tensors in place of some."""
    tensors = {name: checkpoint.load_group(folder, name) for name in ("model", "ema", "optimizer")}
    if kind == "model":
        tensors["model"] = {"other.weight": torch.zeros(2)}
    if kind == "shape":
        tensors["model"] = {k: v[:1].contiguous() for k, v in tensors["model"].items()}
    if kind == "moments":
        tensors["optimizer"] = {"x": torch.zeros(2)}
    if kind == "moment shape":
        tensors["optimizer"]["0.exp_avg"] = tensors["optimizer"]["0.exp_avg"][:1]
    if kind == "no moments":
        del tensors["optimizer"]
    state = checkpoint.load_state(folder)
    again = checkpoint.Checkpoints(folder.parent, keep=2)
    again.save(state.pop("iteration"), tensors, state)
    again.wait()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("model", "must hold this model's 4 tensors, got 4 missing .* and 1 foreign"),
        ("shape", r"0.weight must be \(24, 17\), got \(1, 17\)"),
        ("moments", "must hold this model's 12 tensors, got 12 missing .* and 1 foreign"),
        ("moment shape", r"0.exp_avg must be \(24, 17\), got \(1, 17\)"),
        ("no moments", "must hold this model's 12 tensors, got 12 missing"),
    ],
)
def test_tensors_of_another_model_are_refused_whole(toy, tmp_path, kind, message):
    run(toy, tmp_path / "run", dataclasses.replace(CONFIG, iterations=2))
    foreign(checkpoint.latest(tmp_path / "run"), kind)
    model = toy(torch.float32)
    before = torch.cat([p.detach().flatten() for p in model.module.parameters()])
    with pytest.raises(ValueError, match=message):
        run(lambda dtype: model, tmp_path / "run", resume=True)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.module.parameters()]), before)


def test_a_full_disk_while_saving_leaves_the_last_whole_checkpoint(toy, tmp_path, monkeypatch):
    trainer = run(toy, tmp_path / "run", dataclasses.replace(CONFIG, iterations=2))
    real, calls = storage.write_file, []

    def full_disk(path, parts):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(path, parts)

    monkeypatch.setattr(storage, "write_file", full_disk)
    with pytest.raises(OSError, match=r"got No space left on device .*whole .* checkpoint-000002"):
        run(toy, tmp_path / "run", resume=True)
    assert len(calls) == 2
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-000002"
    rest = run(toy, tmp_path / "run", resume=True)
    assert rest.iteration == 5
    assert torch.equal(weights(rest), weights(run(toy, tmp_path / "whole")))
    assert trainer.iteration == 2


class Dice:
    """A reward that draws a number for every image, from a state of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        noise = torch.randn(len(images), generator=self.generator)
        return {"dice": noise, **reward(images, prompts)}

    def state_dict(self):
        return {"generator": self.generator.get_state(), "calls": [self.calls, None, "x"]}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.calls = state["calls"][0]


@pytest.mark.parametrize("combined", [False, True])
def test_a_reward_goes_on_with_its_random_state(toy, tmp_path, combined):
    def dice():
        return Rewards({"a": Dice(), "plain": reward}) if combined else Dice()

    whole = run(toy, tmp_path / "whole", the_reward=dice())
    run(toy, tmp_path / "cut", the_reward=dice(), stop_after=3)
    rest = run(toy, tmp_path / "cut", the_reward=dice(), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert torch.equal(weights(rest), weights(whole))
    with pytest.raises(ValueError, match=r"must hold no state of function, got one; try the rew"):
        run(toy, tmp_path / "whole", the_reward=reward, resume=True)


def test_a_reward_without_its_state_is_refused(toy, tmp_path):
    run(toy, tmp_path / "run", dataclasses.replace(CONFIG, iterations=2))
    with pytest.raises(ValueError, match=r"state.json must hold a state of Dice, got none"):
        run(toy, tmp_path / "run", the_reward=Dice(), resume=True)


def test_old_checkpoints_go_and_a_new_name_replaces_the_same(toy, tmp_path):
    trainer = run(toy, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-000004", "checkpoint-000005"]
    trainer.save()
    trainer.checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == names
    for stale in (".partial-checkpoint-000006", ".old-checkpoint-000005"):
        shutil.copytree(tmp_path / "run" / "checkpoint-000005", tmp_path / "run" / stale)
    assert run(toy, tmp_path / "run", resume=True).iteration == 5
    assert not list((tmp_path / "run").glob(".*"))


def test_a_gradient_that_is_not_finite_changes_nothing(toy, tmp_path):
    trainer = Trainer(toy(torch.float32), PROMPTS, reward, mix(), CONFIG, tmp_path / "run")
    before = weights(trainer).clone()
    trainer.learner.masters.parameters[0].register_hook(lambda g: g * float("nan"))
    with pytest.raises(
        FloatingPointError, match="must be finite, got nan at iteration 0, update 0"
    ):
        trainer.run()
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("iterations", 0, r"iterations must be in \[1, .*\], got 0"),
        ("max_batch", 0, r"max_batch must be in \[1, .*\], got 0"),
        ("tape", -1, r"tape must be in \[0, .*\], got -1"),
        ("seed", 2**32, r"seed must be in \[0, 4294967295\], got 4294967296"),
        ("lr", 0.0, r"lr must be in \[.*\], got 0.0"),
        ("lr", float("nan"), r"lr must be in \[.*\], got nan"),
        ("ema_decay", 1.0, r"ema_decay must be in \[0.0, .*\], got 1.0"),
        ("betas", (0.9, 1.0), r"betas must be two in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_config_refuses_bad_values(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(("field", "value"), [("lr", "abc"), ("iterations", 2.5), ("seed", True)])
def test_config_refuses_wrong_types(field, value):
    with pytest.raises(TypeError, match=f"{field} must be (int|float), got {value!r}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_tied_weights_are_saved(toy, tmp_path):
    model = toy(torch.float32)
    model.module.register_parameter("tied", model.module[0].weight)
    trainer = Trainer(model, PROMPTS, reward, mix(), CONFIG, tmp_path / "run")
    trainer.step()
    folder = trainer.save()
    trainer.checkpoints.wait()
    saved = checkpoint.load_group(folder, "model")
    assert torch.equal(saved["tied"], saved["0.weight"])


def test_frozen_modules_are_refused(toy, tmp_path):
    model = toy(torch.float32)
    model.module.requires_grad_(False)
    with pytest.raises(ValueError, match="module must have trainable parameters, got none"):
        Trainer(model, PROMPTS, reward, mix(), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_policy_that_samples_follows_at_its_own_pace(toy, tmp_path):
    """decay 1 never moves it, decay 0 is the trained policy one iteration later, on policy."""
    config = dataclasses.replace(CONFIG, iterations=2, ema_decay=None)
    devs, samplers = {}, {}
    for decay in (0.0, 0.5, 1.0):
        recipe = dataclasses.replace(lagging(), sampler_decay=lambda i, decay=decay: decay)
        trainer = run(toy, tmp_path / str(decay), config, recipe)
        devs[decay] = [row["ratio_dev_max"] for row in rows(tmp_path / str(decay))[1:]]
        samplers[decay] = torch.cat(
            [p.flatten() for p in trainer.learner.sampler.tensors().values()]
        )
    trained, start = weights(trainer), weights(type("T", (), {"model": toy(torch.float32)}))
    assert devs[0.0][1] < 1e-5 < devs[0.5][1] < devs[1.0][1]
    assert torch.equal(samplers[1.0], start)
    assert not torch.equal(samplers[0.5], start)
    assert not torch.equal(trained, start)


def test_bad_updates_in_a_row_are_counted_over_a_resume(tmp_path):
    for iterations in (2, 4):
        resume = iterations == 4
        part = rank_faults.build(
            tmp_path / "run", bad_updates=1, iterations=iterations, resume=resume
        )
        rank_faults.bad_velocity(part, True, {1, 2})
        with pytest.raises(BadUpdate) if resume else contextlib.nullcontext():
            part.run()
    assert [row.get("skipped_updates") for row in rank_faults.rows(tmp_path / "run")] == [0, 1]
