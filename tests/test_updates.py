"""An iteration inside a trainer that keeps its optimizer, and a pipeline that it lends."""

import processes
import pytest
import ranked_updates
import torch

from branchcore import recipes, schedule, stages
from branchcore.updates import updates

SG = schedule.shifted_linear(5, 3.0)
PROMPTS = ["a", "b"]


def brightness(images, prompts):
    return {"mean": images.mean((1, 2)), "top": images.amax((1, 2))}


def test_an_update_has_the_gradient_of_the_stages(toy):
    recipe = recipes.flow_grpo(SG, group=3, kl=0.1)
    ours, exact = toy(), toy()
    (metrics,) = updates(
        ours, recipe, PROMPTS, brightness, iteration=4, seed=3, reward_weights={"mean": 1, "top": 2}
    )
    grown = stages.grow(
        recipe.plan([0, 1], seed=3, iteration=4), exact, recipe, PROMPTS, [0, 1],
        seed=3, iteration=4, tape=0, max_batch=2, dtype=torch.float64,
    )  # fmt: skip
    scores = stages.score(brightness, grown.images, grown.prompts)
    weights = {"mean": 1.0, "top": 2.0}
    batch = stages.finish(grown, scores, recipe, iteration=4, reward_weights=weights)
    stages.accumulate(batch, recipe)
    difference = ours.gradient() - exact.gradient()
    assert float(difference.norm() / exact.gradient().norm()) <= 1e-12
    assert metrics["reward"] == pytest.approx(float((scores.values @ [1.0, 2.0]).mean()))
    assert metrics["ratio_dev_max"] == 0.0
    assert metrics["leaves"] == 6
    assert metrics["edges"] == 2 * 3 * 4


def test_it_stops_at_every_update_and_the_second_one_is_off_policy(toy):
    model = toy()
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    recipe = recipes.flow_grpo(SG, group=4, kl=0.0, updates=2, clip=0.5)
    found = []
    for metrics in updates(model, recipe, PROMPTS, brightness, iteration=0, max_batch=3):
        found.append((metrics["ratio_dev_max"], float(model.gradient().norm())))
        optimizer.step()
        optimizer.zero_grad()
    assert len(found) == 2
    assert found[0][0] == 0.0
    assert 0.0 < found[1][0] < 1.0
    assert all(norm > 0 for _, norm in found)


def test_uids_and_seed_name_the_noise(toy):
    recipe = recipes.flow_grpo(SG, group=3, kl=0.0)

    def gradient(**options):
        model = toy()
        list(updates(model, recipe, PROMPTS, brightness, **{"iteration": 0, **options}))
        return model.gradient()

    usual = gradient()
    assert torch.equal(usual, gradient(uids=[0, 1], seed=0))
    for other in ({"uids": [5, 6]}, {"seed": 1}, {"iteration": 1}):
        assert not torch.equal(usual, gradient(**other))


def test_what_it_cannot_do_is_said_before_anything_runs(toy):
    recipe, model = recipes.flow_grpo(SG, group=3), toy()
    with pytest.raises(ValueError, match="prompts must be one or more, with as many uids, got 2"):
        updates(model, recipe, PROMPTS, brightness, iteration=0, uids=[1])
    with pytest.raises(ValueError, match="prompts must be one or more"):
        updates(model, recipe, [], brightness, iteration=0)
    lagging = recipes.diffusion_nft(SG, group=3)
    with pytest.raises(NotImplementedError, match="got diffusion_nft; try Trainer"):
        updates(model, lagging, PROMPTS, brightness, iteration=0)
    model.module.requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters, got none"):
        updates(model, recipe, PROMPTS, brightness, iteration=0)
    assert not model.rows


def bad_reward(images, prompts):
    raise OSError("no scorer")


def test_a_failed_reward_adds_no_gradient(toy):
    model = toy()
    with pytest.raises(RuntimeError, match="no scorer"):
        list(updates(model, recipes.flow_grpo(SG, group=3), PROMPTS, bad_reward, iteration=0))
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.ranks
def test_processes_average_their_gradients():
    alone = ranked_updates.gradient(None, (0, 1, 2, 3))
    for found in processes.values(2, ranked_updates.gradient, (0, 1, 2, 3)):
        assert float((found[0] - alone[0]).norm() / alone[0].norm()) <= 1e-12
        assert found[1] == pytest.approx(alone[1], rel=1e-12)


@pytest.mark.ranks
def test_what_fails_on_one_process_fails_on_all():
    found = processes.run(2, ranked_updates.gradient, (0, 1), 1)
    assert [ok for ok, _ in found] == [False, False]
    assert all("rank 1" in text and "no scorer" in text for _, text in found)
