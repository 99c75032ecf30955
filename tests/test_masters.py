"""fp32 masters of 16-bit weights, and averages in fp32."""

import dataclasses

import pytest
import torch

from branchcore import recipes, schedule
from branchcore.checkpoint import load_group, trained
from branchcore.ema import Ema
from branchcore.masters import Masters
from branchcore.slow_fast import FastPath
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

RECIPE = recipes.branchcore(schedule.shifted_linear(5, 3), splits=(0, 1), clip=0.5)
CONFIG = TrainerConfig(iterations=1, prompts_per_iteration=2, lr=1e-2, max_grad_norm=1e9)


def reward(images, _prompts):
    return {"mean": images.flatten(1).mean(1)}


@pytest.fixture
def short(toy):
    """A toy whose weights are bf16."""

    class Short(toy):
        def __init__(self):
            super().__init__(torch.bfloat16)

        def _call(self, net, x, sigma, prompt):
            return super()._call(net, x.bfloat16(), sigma.bfloat16(), prompt)

    return Short


def steps(module, parameters, count, write):
    """Adam with a gradient of one sign moves every weight by lr = 1e-5 a step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        write()
    return module.weight.detach().float()


def test_steps_far_below_bf16_add_up_in_the_masters_only():
    module = torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
    assert steps(module, list(module.parameters()), 400, lambda: None).tolist() == [[1.0] * 3]
    masters = Masters(module)
    moved = steps(module, masters.parameters, 100, masters.write)
    torch.testing.assert_close(masters.copies["weight"], torch.full((1, 3), 1 - 1e-3))
    assert moved.tolist() == [[1.0] * 3]
    moved = steps(module, masters.parameters, 300, masters.write)
    torch.testing.assert_close(masters.copies["weight"], torch.full((1, 3), 1 - 4e-3))
    assert moved.tolist() == [[1.0 - 2**-8] * 3]


def test_gradients_add_up_in_fp32_and_only_within_the_block():
    module = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    masters = Masters(module)
    inputs = torch.tensor([[1.0]] + [[2**-9]] * 64).bfloat16()
    with masters.receiving():
        for x in inputs:
            module(x).sum().backward()
    assert module.weight.grad is None
    assert float(masters.copies["weight"].grad) == 1.0 + 64 * 2**-9
    masters.copies["weight"].grad = None
    for x in inputs:
        module(x).sum().backward()
    assert float(module.weight.grad) == 1.0
    assert masters.copies["weight"].grad is None


def test_wide_parameters_are_their_own_masters(toy):
    module = toy(torch.float32).module
    module[0].weight.requires_grad_(False)
    masters = Masters(module)
    assert not masters.copies
    own = [p for p in module.parameters() if p.requires_grad]
    assert [id(p) for p in masters.parameters] == [id(p) for p in own]


def test_the_trainer_moves_masters_and_rounds_them(short, tmp_path):
    model = short()
    trainer = Trainer(model, ["a", "b"], reward, RECIPE, CONFIG, tmp_path)
    start = {name: copy.clone() for name, copy in trainer.learner.masters.copies.items()}
    trainer.run()
    saved = load_group(tmp_path / "checkpoint-000001", "masters")
    for name, p in model.module.named_parameters():
        copy = trainer.learner.masters.copies[name]
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.detach(), copy.bfloat16())
        assert not torch.equal(copy, start[name])
        assert torch.equal(saved[name], copy)
        assert p.grad is None
    assert any(not torch.equal(copy, copy.bfloat16().float()) for copy in saved.values())


def test_fast_steps_of_share_0_leave_no_trace_in_masters(short, tmp_path):
    found = []
    for fast in (0, 2):
        model = short()
        config = dataclasses.replace(CONFIG, fast_steps=fast, fast_share=0.0)
        trainer = Trainer(model, ["a", "b"], reward, RECIPE, config, tmp_path / str(fast))
        trainer.run()
        found.append(
            torch.cat([copy.flatten() for copy in trainer.learner.masters.copies.values()])
        )
    once, after = found
    start = torch.cat([p.detach().float().flatten() for p in short().module.parameters()])
    assert float((after - once).abs().mean()) < 0.05 * float((once - start).abs().mean())


def test_going_back_moves_masters():
    module = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    masters = Masters(module)
    optimizer = torch.optim.AdamW(masters.parameters, lr=1e-3, weight_decay=0.0)
    start = masters.copies["weight"].clone()
    path = FastPath(masters.parameters, optimizer)
    masters.copies["weight"].grad = torch.ones(1, 2)
    optimizer.step()
    path.go_back(0.25)
    torch.testing.assert_close(masters.copies["weight"], start - 0.25e-3)


def test_averages_are_fp32_and_follow_the_masters():
    module = torch.nn.Linear(3, 1, dtype=torch.bfloat16)
    module.bias.requires_grad_(False)
    masters = Masters(module)
    ema = Ema(module, 0.9, masters=masters)
    expected = None
    for step in range(3):
        masters.copies["weight"].add_(1e-4 * (step + 1))
        masters.write()
        ema.update()
        now = masters.copies["weight"].double()
        expected = now.clone() if expected is None else 0.9 * expected + 0.1 * now
    assert list(ema.tensors()) == ["weight"] == list(trained(module))
    torch.testing.assert_close(ema.tensors()["weight"].double(), expected, rtol=1e-6, atol=0)
    before = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight.detach(), ema.tensors()["weight"].bfloat16())
    assert torch.equal(module.weight.detach(), before)
    alone = Ema(module, 0.9)
    alone.update()
    assert torch.equal(alone.tensors()["weight"], before.float())
    alone.tensors()["weight"].fill_(1.0)
    alone.update()
    torch.testing.assert_close(alone.tensors()["weight"], 0.9 + 0.1 * before.float())
