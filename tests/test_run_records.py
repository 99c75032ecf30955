"""What a run leaves for its report: the first prompt's tree, sample grids, sessions."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from branchcore import recipes, schedule, stages
from branchcore.models.commands.sample_history import keep_samples
from branchcore.pruning_config import PruningConfig
from branchcore.run_records import recorded
from branchcore.run_report import read_run
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig
from branchcore.tree_record import tree_of

SG = schedule.shifted_linear(6)
PROMPTS = ["a", "b", "c"]
CONFIG = TrainerConfig(iterations=5, prompts_per_iteration=3, evaluate_every=2, checkpoint_every=2)
WEIGHTS = {"mean": 2.0, "spread": 0.5}


def reward(images, prompts):
    flat = images.flatten(1)
    return {"mean": flat.mean(1), "spread": flat.std(1)}


def mix(**options):
    return recipes.branch_mix(SG, splits=(0, 1, 3), window=0, eta=0.7, **options)


def train(toy, out, *, resume=False, stop_after=None, **options):
    def stop(metrics):
        if metrics["iteration"] == stop_after:
            raise KeyboardInterrupt

    config = dataclasses.replace(CONFIG, reward_weights=WEIGHTS, **options)
    where = {"callbacks": [stop], "resume": resume}
    trainer = Trainer(toy(torch.float32), PROMPTS, reward, mix(), config, out, **where)
    if stop_after is None:
        trainer.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    return trainer


def texts(out):
    return {at: path.read_text() for at, path in recorded(out, "trees").items()}


@pytest.fixture(scope="module")
def batch():
    from conftest import ToyModel

    recipe = mix()
    plan = recipe.plan([4, 9], seed=5, iteration=3)
    where = {"seed": 5, "iteration": 3, "reward_weights": WEIGHTS}
    model = ToyModel(torch.float32)
    return stages.collect(plan, model, recipe, ["x", "y"], [4, 9], reward, **where)


def test_a_record_is_the_first_prompts_part_of_the_batch(batch):
    plan = batch.forest.plan
    chosen = np.flatnonzero(plan.prompt == 0)
    pruned = batch.weight.copy()
    dropped = chosen[plan.train[chosen]][:2]
    pruned[dropped] = 0.0
    tree = json.loads(json.dumps(tree_of(batch._replace(weight=pruned), "x", WEIGHTS)))
    parent = np.array(tree["parent"])
    up = plan.parent[chosen]
    np.testing.assert_array_equal(parent >= 0, up >= 0)
    np.testing.assert_array_equal(chosen[parent[parent >= 0]], up[up >= 0])
    net = batch.credit.advantage[chosen] @ [1.0, -1.0]
    assert np.abs(net).max() > 0.1
    np.testing.assert_allclose(tree["advantage"], net, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(tree["train"], plan.train[chosen])
    np.testing.assert_array_equal(np.flatnonzero(tree["pruned"]), np.searchsorted(chosen, dropped))
    leaves = np.flatnonzero(plan.leaf)
    mine = plan.prompt[leaves] == 0
    np.testing.assert_array_equal(chosen[tree["leaves"]], leaves[mine])
    np.testing.assert_allclose(tree["rewards"], batch.scores.values[mine], rtol=1e-5)
    assert (tree["components"], tree["reward_weights"]) == (["mean", "spread"], [2.0, 0.5])


def test_a_masked_leaf_has_no_reward(batch):
    values = batch.scores.values.copy()
    values[1] = np.nan
    tree = tree_of(batch._replace(scores=batch.scores._replace(values=values)), "x", None)
    assert tree["rewards"][1] == [None, None]
    assert None not in tree["rewards"][0]
    assert tree["reward_weights"] == [1.0, 1.0]


def test_trees_are_kept_where_a_run_is_evaluated(toy, tmp_path):
    train(toy, tmp_path / "run", prune=PruningConfig(rule="optimal", rate=0.5))
    trees = {at: json.loads(text) for at, text in texts(tmp_path / "run").items()}
    assert list(trees) == [1, 2, 4, 5]
    assert all(trees[at]["iteration"] == at for at in trees)
    assert any(any(tree["pruned"]) for tree in trees.values())
    order = stages.prompt_indices(3, 3, seed=0, iteration=3)
    assert trees[4]["prompt"] == PROMPTS[order[0]]
    run = read_run(tmp_path / "run")
    assert list(run.trees) == [1, 2, 4, 5]
    assert run.notes == ()
    (session,) = run.sessions
    assert {k: session[k] for k in ("after", "iterations", "processes")} == {
        "after": 0, "iterations": 5, "processes": 1,
    }  # fmt: skip
    assert session["versions"]["torch"] == torch.__version__


def test_a_resumed_run_has_the_trees_of_an_undisturbed_one(toy, tmp_path):
    train(toy, tmp_path / "whole")
    train(toy, tmp_path / "cut", stop_after=4)
    (tmp_path / "cut" / "trees" / "000099.json").write_text("{}")
    assert list(texts(tmp_path / "cut")) == [1, 2, 4, 99]
    train(toy, tmp_path / "cut", resume=True)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert [session["after"] for session in read_run(tmp_path / "cut").sessions] == [0, 2]
    train(toy, tmp_path / "cut", resume=True)  # there is nothing left to do
    assert len(read_run(tmp_path / "cut").sessions) == 2


def test_a_single_step_keeps_no_tree(toy, tmp_path):
    trainer = Trainer(toy(torch.float32), PROMPTS, reward, mix(), CONFIG, tmp_path / "run")
    trainer.step()
    assert not (tmp_path / "run").exists()


def pixels(path):
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        return np.asarray(picture)


def test_a_sheet_of_tiny_samples_is_exact(tmp_path):
    pytest.importorskip("PIL.Image")
    levels = torch.randint(0, 256, (2, 3, 1, 4, 5), generator=torch.Generator().manual_seed(0))
    path = keep_samples(tmp_path, 7, levels / 255, ["a", "b"])
    assert path == tmp_path / "samples" / "000007.png"
    sheet = pixels(path)
    assert sheet.shape == (2 * 6, 3 * 7)
    for r in range(2):
        for k in range(3):
            cell = sheet[6 * r : 6 * r + 6, 7 * k : 7 * k + 7]
            np.testing.assert_array_equal(cell[1:-1, 1:-1], levels[r, k, 0])
            assert (cell[[0, -1]] == 255).all()
            assert (cell[:, [0, -1]] == 255).all()
    grid = json.loads((tmp_path / "samples" / "grid.json").read_text())
    assert grid == {"prompts": ["a", "b"], "aspect": 3.5, "pixelated": True}


def test_large_samples_are_made_small(tmp_path):
    pytest.importorskip("PIL.Image")
    shades = torch.tensor([0.2, 0.8]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 700, 700)
    path = keep_samples(tmp_path, 0, shades, ["a"])
    assert path.suffix == ".jpg"
    sheet = pixels(path).astype(int)
    assert sheet.shape == (516, 2 * 516, 3)
    assert np.abs(sheet[100:400, 100:400] - 51).max() <= 2
    assert np.abs(sheet[100:400, 600:900] - 204).max() <= 2
    videos = torch.linspace(0, 1, 7).view(1, 1, 7, 1, 1, 1).expand(1, 1, 7, 3, 100, 100)
    strip = pixels(keep_samples(tmp_path, 0, videos, ["a"])).astype(int)
    assert strip.shape == (104, 404, 3)
    shown = [strip[50, 52 + 100 * i, 0] for i in range(4)]
    assert np.abs(np.array(shown) - [0, 85, 170, 255]).max() <= 3
    assert list(recorded(tmp_path, "samples")) == [0]


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 1, 8, 8), (2, 3, 2, 8, 8)])
def test_samples_of_another_shape_are_refused(tmp_path, shape):
    pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=r"images must be \(R, K, C, H, W\) or .* with R=2, C = 1"):
        keep_samples(tmp_path, 0, torch.zeros(shape), ["a", "b"])
    assert not (tmp_path / "samples").exists()
