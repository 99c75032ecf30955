"""Rows of a tape that lose their gradient: same gradient, and only the others are multiplied."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from branchcore import recipes, schedule
from branchcore.masked_backward import MaskedBackward
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.rollout import rollout
from branchcore.stages import Batch, accumulate

SG = schedule.shifted_linear(6, 3)


class Block(nn.Module):
    """Attention, an MLP with a bias, and rows that several others read, as shared prompts are."""

    def __init__(self, mask=None, causal=False):
        super().__init__()
        torch.manual_seed(3)
        self.qkv, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12)
        self.shared = nn.Linear(4, 12)
        self.options = {"attn_mask": mask, "is_causal": causal}
        self.double()

    def forward(self, x, shared, of_row):
        x = x + self.shared(shared)[of_row][:, None]
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return x + self.out(F.gelu(y.transpose(1, 2).flatten(2)))


def gradients(block, inputs, gradient, mode):
    x, shared, of_row = (t.detach().clone() for t in inputs)
    x.requires_grad_()
    shared.requires_grad_()
    block.zero_grad()
    with mode:
        y = block(x, shared, of_row)
    y.backward(gradient)
    return y.detach(), [x.grad, shared.grad, *(p.grad for p in block.parameters())]


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "of all rows": (torch.tril(torch.ones(5, 5)).bool(), False),
    "of each row": (torch.rand(9, 1, 5, 5, generator=torch.Generator().manual_seed(0)), False),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("kept", [[], [2], [0, 3, 7], [0, 1, 2, 3, 4, 6, 8], list(range(9))])
def test_gradients_are_the_same_and_only_live_rows_are_multiplied(kind, kept):
    mask, causal = MASKS[kind]
    block = Block(mask.double() if kind == "of each row" else mask, causal)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(9, 5, 12, generator=rng, dtype=torch.float64)
    shared = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    inputs = x, shared, torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 2])
    gradient = torch.zeros_like(x)
    gradient[kept] = torch.randn(len(kept), 5, 12, generator=rng, dtype=torch.float64)
    plain, wanted = gradients(block, inputs, gradient, torch.enable_grad())
    mode = MaskedBackward()
    y, got = gradients(block, inputs, gradient, mode)
    assert torch.equal(y, plain)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    prompts = len({int(inputs[2][i]) for i in kept})
    assert mode.rows == 9 + 9 + 3
    assert mode.rows_run == 2 * len(kept) + prompts


def test_frozen_weights_and_vectors():
    """As under a LoRA: no gradient of the weight; 1-d inputs stay as they are."""
    layer = nn.Linear(3, 2).requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    gradient = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    with MaskedBackward() as mode:
        layer(x).backward(gradient)
        assert mode.rows_run == 2
        torch.testing.assert_close(x.grad, gradient @ layer.weight)
        layer(torch.ones(3, requires_grad=True)).sum().backward()
        with torch.no_grad():
            assert not layer(x).requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert (mode.rows, layer.weight.grad) == (4, None)


def test_attention_that_cannot_be_masked_is_left_alone():
    q = torch.randn(4, 2, 3, 5, requires_grad=True)
    other = torch.randn(1, 2, 3, 5)
    bias = torch.zeros(3, 3, requires_grad=True)
    for args, options in (
        ((q, other, other), {}),
        ((q, q, q), {"attn_mask": bias}),
        ((q, q, q), {"dropout_p": 0.5}),
    ):
        with MaskedBackward():
            out = F.scaled_dot_product_attention(*args, **options)
        assert "_Attention" not in type(out.grad_fn).__name__
    with MaskedBackward():
        out = F.scaled_dot_product_attention(query=q, key=q, value=q, scale=0.1)
    assert "_Attention" in type(out.grad_fn).__name__
    plain = F.scaled_dot_product_attention(q, q, q, scale=0.1)
    assert torch.equal(out, plain)


def test_a_compiled_module_works_inside():
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, backend="aot_eager")
    inputs = (
        torch.randn(4, 5, 12, dtype=torch.float64),
        torch.randn(2, 4, dtype=torch.float64),
        torch.tensor([0, 1, 1, 0]),
    )
    gradient = torch.randn(4, 5, 12, dtype=torch.float64)
    gradient[1:3] = 0.0
    wanted = gradients(block, inputs, gradient, torch.enable_grad())[1]
    got = gradients(compiled, inputs, gradient, MaskedBackward())[1]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def batch_of(recipe, model, **options):
    plan = recipe.plan([4, 9], seed=5, iteration=3)
    view = model.with_prompts(["a", "b"])
    forest = rollout(plan, view, [4, 9], seed=5, iteration=3, dtype=torch.float64, **options)
    rewards = forest.leaves.mean(1, keepdim=True).numpy().round(9)
    credit = recipe.credit(plan, rewards, np.ones(1), forest.log_prob.numpy())
    return Batch(forest, view, None, credit, np.ones(len(plan)), (4, 9))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "threshold", "rate": 0.7},
        {"rule": "optimal", "rate": 0.6},
        {"rule": "cppo", "rate": 0.5},
        {"rule": "parent_top1"},
    ],
)
def test_parents_pruned_after_the_rewards_cost_no_backward_on_the_tape(toy, options):
    recipe, model = recipes.branch_grpo(SG, splits=(0, 1, 2), clip=0.5, kl=0.1), toy()
    pruning = Pruning(PruningConfig(**options), recipe, 5)
    assert pruning.late
    assert pruning.ahead(recipe.plan([4, 9], seed=5, iteration=3), (4, 9), 3) is None
    off, taped = (
        batch_of(recipe, model, tape=tape, masked_backward=pruning.late) for tape in (0, 10**6)
    )
    found = []
    for batch in (off, taped):
        batch = pruning.weigh(batch, {4: 1.0, 9: 1.0})
        weight, sums = pruning.weights(batch, iteration=3)
        model.zero_grad()
        model.rows.clear()
        stats = accumulate(batch._replace(weight=weight), recipe)
        assert stats.parents == sums.kept < sums.parents
        assert sum(model.rows) == (sums.kept if batch.forest is off.forest else 0)
        found.append(model.gradient())
    assert float((found[0] - found[1]).norm() / found[0].norm()) <= 1e-12
    layers = 2
    assert off.forest.masked.rows == 0
    assert taped.forest.masked.rows == layers * sums.parents
    assert taped.forest.masked.rows_run == layers * sums.kept
