"""FLOPs of a forward as the model runs it, and the work that pruning saves."""

import dataclasses

import numpy as np
import pytest
import torch
from test_pruning import SG, gradient_of, grown
from test_pruning_runs import CONFIG, dance, rows, run
from torch import nn

from branchcore import recipes, schedule
from branchcore.flops import Work, forward_flop, pass_work
from branchcore.gradient import live_edges
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.rollout import rollout
from branchcore.work_meter import PassFlop

HAND = 2 * (17 * 24 + 24 * 15)
"""Of the toy's two layers, per row."""


def tree(**options):
    return recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5, **options)


def forest_of(model, uids=(4, 9)):
    return grown(tree(), model, uids).forest


@pytest.mark.parametrize("uids", [(4,), (4, 9), tuple(range(7))])
def test_the_toy_has_the_flops_of_a_count_by_hand(toy, uids):
    model = toy()
    forest = forest_of(model, uids)
    random = torch.random.get_rng_state()
    model.rows.clear()
    assert forward_flop(forest, model) == HAND
    assert model.rows == [min(4, len(uids))]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in model.module.parameters())


def test_the_counted_call_keeps_within_a_batch_and_keeps_no_graph(toy):
    kept = []

    class Watched(toy):
        def velocity(self, x, sigma, prompt):
            kept.append(super().velocity(x, sigma, prompt))
            return kept[-1]

    model = Watched()
    forest = forest_of(model, tuple(range(7)))
    model.rows.clear()
    assert forward_flop(forest, model, max_batch=3) == HAND
    assert model.rows == [3]
    assert kept[-1].requires_grad
    with pytest.raises(RuntimeError, match="a counted call must have no backward"):
        kept[-1].sum().backward()


class Attending(nn.Module):
    """A layer, an attention over 4 tokens, a layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(17, 32), nn.Linear(32, 15)
        self.double()

    def forward(self, x):
        q = self.inner(x).view(-1, 1, 4, 8)
        return self.outer(nn.functional.scaled_dot_product_attention(q, q, q).flatten(1))


def test_attention_and_compiled_regions_are_counted(toy):
    model = toy()
    forest = forest_of(model)
    model.module = Attending()
    exact = 2 * 17 * 32 + 2 * 2 * 4 * 4 * 8 + 2 * 32 * 15
    assert forward_flop(forest, model) == exact
    model.module.compile(backend="aot_eager")
    for taped in (0, 9):
        rollout(forest.plan, model, [4, 9], seed=1, tape=taped, dtype=torch.float64)
    assert forward_flop(forest, model) == exact


def test_calls_without_gradient_that_hide_their_work_are_not_asked(toy):
    class Graphs(toy):
        def velocity(self, x, sigma, prompt):
            return super().velocity(x, sigma, prompt) if torch.is_grad_enabled() else x

    model = Graphs()
    assert forward_flop(forest_of(model), model) == HAND


def test_what_the_counter_cannot_see_is_not_guessed(toy):
    class Numpy(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.detach().numpy()[:, :15] * 2.0)

    model = toy()
    forest = forest_of(model)
    model.module = Numpy()
    assert forward_flop(forest, model) is None

    @torch.library.custom_op("branchcore_tests::attend", mutates_args=())
    def attend(x: torch.Tensor) -> torch.Tensor:
        return x + x

    class Package(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(17, 15).double()

        def forward(self, x):
            return attend(self.layer(x))

    model.module = Package()
    assert forward_flop(forest, model) is None

    class Integers(Package):
        def forward(self, x):
            eight = torch.ones(32, 32, dtype=torch.int8)
            return self.layer(x) + torch._int_mm(eight, eight).sum()

    model.module = Integers()
    assert forward_flop(forest, model) is None


@pytest.mark.parametrize("name", ["sd35m-512", "sana-1024", "qwen-512"])
def test_a_family_has_the_flops_of_the_census(name):
    pytest.importorskip("diffusers")
    from test_census import SMALL, blocks

    from branchcore.models.sizing import census, shapes
    from branchcore.models.sizing.shapes import SHAPES, Shape

    size = SHAPES[name].size._replace(height=64, width=64)
    shape = Shape(blocks(SHAPES[name], num_layers=2, **SMALL[name]).architecture, size, 8)
    model = shapes.flow_model(shape, "cpu", torch.float32)
    recipe = recipes.branch_grpo(schedule.shifted_linear(2, 3), splits=(0,))
    plan = recipe.plan([0], seed=0, iteration=0)
    view = model.with_prompts(["a"])
    forest = rollout(plan, view, [0], seed=0)
    exact = census.census(shape).total
    assert forward_flop(forest, view) == pytest.approx(exact, rel=0.01)
    # rows share what depends on prompt and level alone
    chains = recipes.flow_grpo(schedule.shifted_linear(2, 3), group=4)
    forest = rollout(chains.plan([0], seed=0, iteration=0), view, [0], seed=0)
    assert forward_flop(forest, view) == pytest.approx(
        census.saved(shape, 4)[1].total / 4, rel=0.01
    )


def parents(batch, recipe, weight):
    edges = live_edges(batch.forest.plan, batch.credit.advantage, weight, recipe.objective, 0)
    return np.unique(batch.forest.plan.action[edges])


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("tape", [0, 5, 10**6])
@pytest.mark.parametrize("rule", ["optimal", "uniform"])
def test_work_is_that_of_the_calls(toy, rule, tape, kl):
    """Forwards of the update are counted; what is saved is all that the whole pass would cost."""
    recipe, model = tree(kl=kl), toy()
    references = []
    base = model.reference_velocity
    model.reference_velocity = lambda *a: references.append(len(a[0])) or base(*a)
    pruning = Pruning(PruningConfig(rule=rule, rate=0.5), recipe, 5)
    spent = {}
    for name in ("pruned", "whole"):
        off = None
        if name == "pruned":
            off = pruning.ahead(recipe.plan([4, 9], seed=5, iteration=3), (4, 9), 3)
        batch = grown(recipe, model, tape=tape, off_tape=off)
        ones = np.ones(len(batch.weight))
        weight = pruning.weights(batch, iteration=3).weight if name == "pruned" else ones
        kept = parents(batch, recipe, weight)
        work = pass_work(batch, weight, recipe, update=0, tape=tape)
        model.rows.clear()
        references.clear()
        gradient_of(batch, recipe, model, weight)
        spent[name] = 2 * len(kept) + sum(model.rows) + sum(references)
        assert work.spent == spent[name]
        if name == "pruned":
            saved = work.saved
    assert work.saved == 0
    assert saved == spent["whole"] - spent["pruned"] > 0


def test_saved_per_parent(toy):
    """2 for a backward, 1 for a forward off the tape, 1 for a reference."""
    model = toy()
    for kl, tape, rule, each in (
        (0.0, 0, "optimal", 3),
        (0.1, 0, "optimal", 4),
        (0.0, None, "uniform", 2),
        (0.1, None, "uniform", 3),
        (0.1, 0, "uniform", 4),
    ):
        recipe = tree(kl=kl)
        pruning = Pruning(PruningConfig(rule=rule, rate=0.5), recipe, 5)
        off = pruning.ahead(recipe.plan([4, 9], seed=5, iteration=3), (4, 9), 3)
        batch = grown(recipe, model, tape=10**6 if tape is None else tape, off_tape=off)
        weight, sums = pruning.weights(batch, iteration=3)
        work = pass_work(batch, weight, recipe, update=0, tape=tape)
        assert sums.parents > sums.kept
        assert work.saved == each * (sums.parents - sums.kept)
    batch = grown(dance(), model, keep_velocity=True)
    ones = np.ones(len(batch.weight))
    half = np.where(np.arange(len(ones)) % 2, ones, 0.0)
    for update in (1, 2):
        work = pass_work(batch, half, dance(), update=update, tape=0)
        both = pass_work(batch, ones, dance(), update=update, tape=0)
        assert (
            work.spent + work.saved
            == both.spent
            == 3 * len(np.unique(batch.forest.plan.action[batch.forest.plan.trained(update)]))
        )
        assert both.saved == 0


def test_shares_and_teraflops():
    got = Work(30.0, 10.0).plus(Work(0.0, 20.0)).metrics(2e12)
    assert got == {"work_saved": 0.5, "tflop_saved": 60.0}
    assert Work(30.0, 10.0).metrics(None) == {"work_saved": 0.25}
    assert Work().metrics(None) == {"work_saved": 0.0}


@pytest.mark.parametrize("rule", ["optimal", "uniform", "threshold", "cppo"])
def test_a_run_logs_what_it_saved(toy, tmp_path, rule):
    """Against a run that drops nothing, with the same tape: forwards counted by the model."""
    config = dataclasses.replace(CONFIG, iterations=1, tape=0)
    whole = run(toy, tmp_path / "whole", PruningConfig(rule="optimal"), tree(), config=config)
    pruned = run(toy, tmp_path / "run", PruningConfig(rule=rule, rate=0.5), tree(), config=config)
    row = rows(tmp_path / "run")[0]
    forwards = sum(whole.model.rows) - sum(pruned.model.rows)
    assert forwards == row["parents_saved"] > 0
    assert row["tflop_saved"] == pytest.approx(3 * forwards * HAND / 1e12)
    counting = 8  # rows of the calls that count operations
    every = sum(whole.model.rows) - counting + 2 * rows(tmp_path / "whole")[0]["parents"]
    assert row["work_saved"] == pytest.approx(3 * forwards / every)
    assert rows(tmp_path / "whole")[0]["work_saved"] == 0.0


def test_prompts_that_are_not_rolled_out_save_their_rollout(toy, tmp_path):
    config = dataclasses.replace(CONFIG, iterations=3, tape=0)
    run(toy, tmp_path / "run", PruningConfig(prompts=0.7), tree(), config=config)
    each = tree().plan([0], seed=0, iteration=0).counts().forwards
    logged = rows(tmp_path / "run")
    assert min(row["prompts_share"] for row in logged) < 1.0
    for row in logged:
        dropped = round(4 * (1 - row["prompts_share"]))
        assert row["tflop_saved"] == pytest.approx(dropped * each * HAND / 1e12)


def test_flops_are_counted_once_and_survive_a_resume(toy, tmp_path, monkeypatch):
    calls = []

    def counted(result):
        monkeypatch.setattr("branchcore.watch.pass_flop", lambda *a: calls.append(a) or result)

    counted(PassFlop(7e12, 14e12))
    prune = PruningConfig(rule="uniform", rate=0.5)
    run(toy, tmp_path / "run", prune, stop_after=2)
    assert len(calls) == 1
    run(toy, tmp_path / "run", prune, resume=True)
    assert len(calls) == 1
    assert all(row["tflop_saved"] > 1 for row in rows(tmp_path / "run"))
    counted(None)
    run(toy, tmp_path / "none", prune)
    assert len(calls) == 2
    assert all("tflop_saved" not in row for row in rows(tmp_path / "none"))
    run(toy, tmp_path / "off", PruningConfig())
    assert all("work_saved" not in row for row in rows(tmp_path / "off"))
