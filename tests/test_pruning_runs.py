"""Pruning in a run: bitwise baselines, resume, coins of prompts, what the command line says."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from branchcore import recipes, schedule, unbiased
from branchcore.cli import main
from branchcore.flops import Work
from branchcore.metrics import repeatable
from branchcore.model_commands import settings
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.pruning_sums import Sums
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SG = schedule.shifted_linear(6, 3)
PROMPTS = ["a", "b", "c", "d", "e"]
CONFIG = TrainerConfig(
    iterations=4, prompts_per_iteration=4, lr=1e-3, ema_decay=0.9, checkpoint_every=1
)
COINS = (*Sums().metrics(), *Work().metrics(1.0))


def reward(images, prompts):
    shift = torch.tensor([ord(p) for p in prompts]) % 3
    flat = images.flatten(1)
    return {"mean": -(flat.mean(1) - 0.2 * shift).abs(), "spread": -flat.std(1)}


def run(toy, out, prune, recipe=None, stop_after=None, resume=False, config=CONFIG):
    def stop(metrics):
        if metrics["iteration"] == stop_after:
            raise KeyboardInterrupt

    model = toy(torch.float32)
    recipe = recipe or recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7, kl=0.05)
    config = dataclasses.replace(config, prune=prune)
    trainer = Trainer(model, PROMPTS, reward, recipe, config, out, callbacks=[stop], resume=resume)
    try:
        trainer.run()
    except KeyboardInterrupt:
        assert stop_after is not None
    return trainer


def rows(out):
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [repeatable(row) for row in lines]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()])


def dance():
    return recipes.dance_grpo(SG, group=4, clip=0.2, updates=3)


@pytest.mark.parametrize("recipe", [None, dance])
def test_rate_0_is_the_baseline_bit_for_bit(toy, tmp_path, recipe):
    recipe = None if recipe is None else recipe()
    config = dataclasses.replace(CONFIG, iterations=2, checkpoint_every=9)
    base = run(toy, tmp_path / "base", PruningConfig(), recipe, config=config)
    logged = rows(tmp_path / "base")
    for rule in ("uniform", "threshold", "optimal"):
        other = run(toy, tmp_path / rule, PruningConfig(rule=rule), recipe, config=config)
        assert torch.equal(weights(base), weights(other))
        got = [{k: v for k, v in row.items() if k not in COINS} for row in rows(tmp_path / rule)]
        assert got == logged
        assert {row["kept_share"] for row in rows(tmp_path / rule)} == {1.0}


def test_pruned_training_resumes_bit_for_bit_with_its_history(toy, tmp_path):
    """Prompts without spread get a history of 0 and are dropped by chance."""
    prune = PruningConfig(rule="threshold", rate=0.5, prompts=0.7)
    whole = run(toy, tmp_path / "whole", prune)
    logged = rows(tmp_path / "whole")
    assert logged[0]["prompts_share"] == 1.0
    assert min(row["prompts_share"] for row in logged) < 1.0
    assert all(0.0 < row["kept_share"] < 1.0 for row in logged)
    for stop in (1, 2, 3):
        out = tmp_path / str(stop)
        run(toy, out, prune, stop_after=stop)
        rest = run(toy, out, prune, resume=True)
        assert rows(out) == logged
        assert torch.equal(weights(rest), weights(whole))
        assert (
            rest.learner.pruning.past.means["prompts"]
            == whole.learner.pruning.past.means["prompts"]
        )
    state = tmp_path / "whole" / "checkpoint-000004" / "state.json"
    known = json.loads(state.read_text())
    assert known["pruning"]["prompts"] == {
        str(k): v for k, v in whole.learner.pruning.past.means["prompts"].items()
    }
    assert known["pruning"]["steps"] == {}
    state.write_text(json.dumps(known | {"pruning": known["pruning"] | {"prompts": {"0": -1.0}}}))
    with pytest.raises(ValueError, match=r"must hold a number >= 0 per key of prompts, got -1\.0"):
        run(toy, tmp_path / "whole", prune, resume=True)


def test_dropped_prompts_cost_no_rollout_and_stay_in_the_normaliser(toy, tmp_path):
    recipe = dance()
    pruning = Pruning(PruningConfig(prompts=0.6), recipe, seed=2)
    indices = np.arange(6)
    pruning.past.means["prompts"] = dict(enumerate([0.0, 1.0, 0.9, 0.0, 0.0, 1.0]))
    seen = set()
    for iteration in range(30):
        draw = pruning.draw(indices, iteration, per_round=2)
        assert {1, 2, 5} <= set(draw.weight)
        assert all(draw.weight[uid] == (1.0 if uid in (1, 2, 5) else 2.5) for uid in draw.weight)
        assert sum(draw.rounds, ()) == tuple(draw.weight) == tuple(sorted(draw.weight))
        assert sum(p.num_prompts for p in draw.plans) == len(draw.weight)
        seen.add(frozenset(draw.weight))
        if iteration < 4:
            every = recipe.plan(range(6), seed=2, iteration=iteration)
            assert draw.planned == [len(every.trained(u)) for u in range(3)]
    assert len(seen) >= 6
    pruning.past.means["prompts"] = {0: 0.5, 3: 0.5}
    assert len(pruning.draw(indices, 0).weight) == 6
    pruning.past.means["prompts"] = {}
    assert len(pruning.draw(indices, 0).weight) == 6


def test_fast_steps_draw_again(toy, tmp_path, monkeypatch):
    drawn = []
    coins = unbiased.unit_coins

    def spy(*args, **where):
        drawn.append(where["inner"])
        return coins(*args, **where)

    monkeypatch.setattr(unbiased, "unit_coins", spy)
    config = dataclasses.replace(CONFIG, iterations=1, fast_steps=3)
    run(toy, tmp_path / "run", PruningConfig(rule="threshold", rate=0.5), config=config)
    assert drawn == [0, 1, 2, 3]
    drawn.clear()
    config = dataclasses.replace(CONFIG, iterations=1)
    run(toy, tmp_path / "3", PruningConfig(rule="optimal", rate=0.5), dance(), config=config)
    assert drawn == [0, 1, 2]


def test_late_coins_leave_the_tape_alone_unless_asked(toy, tmp_path):
    config = dataclasses.replace(CONFIG, iterations=1)
    both = {}
    for tape in (None, 10**6):
        prune = PruningConfig(rule="optimal", rate=0.5)
        one = dataclasses.replace(config, tape=tape)
        both[tape] = run(toy, tmp_path / str(tape), prune, config=one)
    assert (weights(both[None]) - weights(both[10**6])).abs().max() <= 2e-6
    parents = rows(tmp_path / "None")[0]["parents"]
    assert rows(tmp_path / "1000000")[0]["parents"] == parents
    forwards = {tape: sum(trainer.model.rows) for tape, trainer in both.items()}
    assert forwards[None] - forwards[10**6] == parents


def plainly(recipe):
    """The recipe, with a credit of the same values that has no pool."""
    return dataclasses.replace(recipe, credit=recipe.credit.credit)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: plainly(recipes.flow_grpo(SG, group=4, global_std=True)), "global_std=True"),
        (lambda: plainly(recipes.flow_dppo(SG, group=4, credit="gdpo")), "credit='gdpo'"),
        (lambda: recipes.branch_grpo(SG, splits=(0, 1), prune_pool="call"), "prune_pool='call'"),
    ],
)
def test_prompts_are_not_dropped_from_under_a_common_spread(build, named):
    with pytest.raises(ValueError, match=f"prompts must be 0 with {named}"):
        Pruning(PruningConfig(prompts=0.5), build(), 0)
    Pruning(PruningConfig(rule="threshold", rate=0.5), build(), 0)


def test_settings_of_the_command_line(capsys):
    options, fields = settings(
        ["prune=optimal", "prune_rate=0.5", "prune_prompts=0.2", "lr=1e-3"], "branch_grpo"
    )
    assert options == {}
    config = PruningConfig(rule="optimal", rate=0.5, prompts=0.2)
    assert fields == {"prune": config, "lr": 1e-3}
    assert settings(["prune_share=0.3"], "branch_grpo") == ({"prune_share": 0.3}, {})
    names = {"prune", *(f"prune_{f.name}" for f in dataclasses.fields(PruningConfig))}
    for recipe in recipes.RECIPES:
        assert not names & set(recipes.options_of(recipe)), recipe
    with pytest.raises(SystemExit, match="rate must be in"):
        main(["plan", "flow_grpo", "--set", "prune=uniform", "--set", "prune_rate=1"])
    with pytest.raises(TypeError, match="prune must be a PruningConfig, got 'optimal'"):
        dataclasses.replace(CONFIG, prune="optimal")


def test_plan_forecasts_the_kept_share(capsys):
    """1116 forwards; 18 parents on the tape, or 25.65 after it with a forward of their own."""
    known = {
        "uniform": ("18.0", "1152"),
        "optimal": ("18.0", "1170"),
        "threshold": ("25.6", "1193"),
    }
    for rule, (kept, work) in known.items():
        words = ["plan", "tempflow_grpo", "--leaves", "24", "--set", "kl=0"]
        main([*words, "--set", f"prune={rule}", "--set", "prune_rate=0.5"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"keeps {kept} of 36 trained parents" in last
        assert last.endswith(f": work {work}.")
    main(
        [
            "plan",
            "tempflow_grpo",
            "--leaves",
            "24",
            "--set",
            "prune=uniform",
            "--set",
            "prune_rate=0.5",
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1].endswith(": work 1170.")


def test_a_biased_pruner_by_name_in_a_run(toy, tmp_path):
    recipe = recipes.flow_grpo(SG, group=4, kl=0.0)
    run(toy, tmp_path / "run", PruningConfig(rule="best_of_n", rate=0.5), recipe)
    assert all(row["kept_share"] < 0.8 for row in rows(tmp_path / "run"))
