"""The work of an iteration: rows against a model that counts them, operations against formulas."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from branchcore import recipes, schedule, stages
from branchcore.pruning_config import PruningConfig
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig
from branchcore.work_meter import _BACKWARDS, PassFlop, mfu, pass_flop, peak_tflops

SG = schedule.shifted_linear(6)
PROMPTS = ["a", "b", "c"]
CONFIG = TrainerConfig(iterations=2, prompts_per_iteration=3, lr=1e-3)
# of ToyModel's layers, 17 -> 24 -> 15; its input has no gradient
FIRST, SECOND = 2 * 17 * 24, 2 * 24 * 15


def reward(images, prompts):
    return {"mean": images.flatten(1).mean(1)}


def counting(toy):
    """A toy that counts rows of forwards, of references and of backwards."""

    class Counting(toy):
        def __init__(self):
            super().__init__(torch.float32)
            self.counts = dict.fromkeys(("forward", "reference", "backward"), 0)

        def velocity(self, x, sigma, prompt):
            self.counts["forward"] += len(x)
            v = super().velocity(x, sigma, prompt)
            if v.requires_grad:
                v.register_hook(self._backward)
            return v

        def _backward(self, gradient):
            # a row of the tape that was pruned has a gradient of zero
            self.counts["backward"] += int(gradient.flatten(1).any(1).sum())

        def reference_velocity(self, x, sigma, prompt):
            self.counts["reference"] += len(x)
            return super().reference_velocity(x, sigma, prompt)

    return Counting()


RUNS = {
    "tape": ({}, lambda: recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)),
    "kl": ({}, lambda: recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7, kl=0.1)),
    "no tape": ({"tape": 0}, lambda: recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)),
    "some tape": (
        {"tape": 5, "prompts_per_round": 2, "max_batch": 4},
        lambda: recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7),
    ),
    "updates": ({}, lambda: recipes.dance_grpo(SG, group=4, clip=0.5, updates=3)),
    "fast": ({"fast_steps": 2}, lambda: recipes.dance_grpo(SG, group=4, clip=0.5)),
    "matching": ({}, lambda: recipes.awm(SG, group=4, times=3)),
    "preference": ({}, lambda: recipes.flow_dpo(SG, group=4)),
    "pruned": (
        {"prune": PruningConfig(rule="optimal", rate=0.5)},
        lambda: recipes.dance_grpo(SG, group=4, clip=0.5),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_those_that_the_model_runs(toy, tmp_path, monkeypatch, name):
    options, build = RUNS[name]
    model, config = counting(toy), dataclasses.replace(CONFIG, **options)
    monkeypatch.setattr("branchcore.watch.pass_flop", lambda *_: PassFlop(1e12, 1e18))
    trainer = Trainer(model, PROMPTS, reward, build(), config, tmp_path / "run")
    trainer.step()  # what is measured once runs rows too
    model.counts = counts = dict.fromkeys(model.counts, 0)
    row = trainer.step()
    backwards, forwards = divmod(row["tflop"], 1e6)
    assert forwards == counts["forward"] + counts["reference"]
    # a fast step is none of the metrics; a pair loss runs rows that it gives no gradient
    assert backwards == counts["backward"] > 0 or name == "preference"
    assert backwards == row["parents"] or name == "fast"
    assert (counts["reference"] > 0) == (name in ("kl", "matching", "preference"))


def grown(toy, recipe=None):
    recipe = recipe or recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    model = toy(torch.float32)
    plan = recipe.plan([0, 1], seed=0, iteration=0)
    where = {"seed": 0, "iteration": 0}
    made = stages.grow(plan, model, recipe, PROMPTS[:2], [0, 1], **where)
    return model, SimpleNamespace(forest=made.forest, model=made.model)


@pytest.mark.parametrize("max_batch", [None, 1, 3])
def test_operations_of_a_pass_are_those_of_its_products(toy, max_batch):
    model, batch = grown(toy)
    state = torch.random.get_rng_state()
    every = list(model.module.parameters())
    every[0].grad = kept = torch.ones_like(every[0])
    whole = pass_flop(batch, every, max_batch)
    assert whole == PassFlop(FIRST + SECOND, FIRST + 2 * SECOND)
    model.module[0].requires_grad_(False)
    assert pass_flop(batch, every[2:], max_batch) == PassFlop(FIRST + SECOND, SECOND)
    assert [p.grad is None for p in every] == [False, True, True, True]
    assert every[0].grad is kept
    assert (kept == 1.0).all()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sharded_parameters_count_alike_and_keep_no_gradient(toy, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = toy(torch.float32)
        mesh = init_device_mesh("cpu", (1,))
        for part in (model.module[0], model.module[2], model.module):
            fully_shard(part, mesh=mesh)
        parameters = list(model.module.parameters())
        _, batch = grown(lambda _: model)
        assert pass_flop(batch, parameters) == PassFlop(FIRST + SECOND, FIRST + 2 * SECOND)
        assert all(p.grad is None for p in parameters)
    finally:
        dist.destroy_process_group()


def test_what_checkpointing_computes_again_is_counted(toy):
    class Checkpointed(toy):
        def _call(self, net, x, sigma, prompt):
            def run(x):
                return toy._call(self, net, x, sigma, prompt)

            return checkpoint(run, x, use_reentrant=False, early_stop=False)

    model, batch = grown(Checkpointed)
    flop = pass_flop(batch, list(model.module.parameters()))
    assert flop == PassFlop(FIRST + SECOND, FIRST + 2 * SECOND + FIRST + SECOND)


def test_attention_on_a_cpu_is_counted_in_both_directions():
    heads, rows, dim = 2, 8, 16

    class Attentive:
        latent_shape = (3, 5)

        def __init__(self):
            self.weight = torch.zeros(heads, rows, dim, requires_grad=True)

        def velocity(self, x, sigma, prompt):
            q = self.weight.expand(len(x), heads, rows, dim) + x.mean()
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            return x * y.mean((1, 2, 3))[:, None, None]

    model = Attentive()
    _, batch = grown_with(model)
    products = 2 * heads * rows * rows * dim
    assert pass_flop(batch, [model.weight]) == PassFlop(2 * products, 5 * products)


def grown_with(model):
    class Toy:
        latent_shape = model.latent_shape

        def with_prompts(self, prompts):
            return model

        def decode(self, latents):
            return latents

    return grown(lambda dtype: Toy())


def test_a_model_without_products_has_no_known_work(toy, tmp_path):
    class Pointwise(toy):
        def _call(self, net, x, sigma, prompt):
            return x * net[0].weight.sum()

    model = Pointwise(torch.float32)
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    trainer = Trainer(model, PROMPTS, reward, recipe, CONFIG, tmp_path / "run")
    assert not {"tflop", "mfu", "tokens"} & set(trainer.step())
    assert trainer.watch.state() == []


def test_tokens_are_those_of_all_forwards(toy, tmp_path):
    class Long(toy):
        variable_length = True

        def row_tokens(self, prompt):
            return np.array([10, 200, 3000])[prompt]

    config = dataclasses.replace(CONFIG, tape=0)
    recipe = recipes.dance_grpo(SG, group=4, clip=0.5, kl=0.1)
    trainer = Trainer(Long(torch.float32), PROMPTS, reward, recipe, config, tmp_path / "run")
    row = trainer.step()
    assert row["tokens"] % 10 == 0
    plan = recipe.plan([0, 1, 2], seed=0, iteration=0)
    rollout = np.bincount(plan.prompt[plan.evaluated], minlength=3)
    trained = np.bincount(plan.prompt[np.unique(plan.action[plan.trained(0)])], minlength=3)
    assert row["tokens"] == (rollout + 2 * trained) @ [10, 200, 3000]


def test_a_family_that_pads_counts_no_tokens(toy, tmp_path):
    class Padded(toy):
        variable_length = False

        def row_tokens(self, prompt):
            raise NotImplementedError("padded")

    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    trainer = Trainer(Padded(torch.float32), PROMPTS, reward, recipe, CONFIG, tmp_path / "run")
    assert "tokens" not in trainer.step()


def test_a_resumed_run_counts_with_the_same_operations(toy, tmp_path, monkeypatch):
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    config = dataclasses.replace(CONFIG, iterations=1)
    Trainer(toy(torch.float32), PROMPTS, reward, recipe, config, tmp_path / "run").run()

    def never(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr("branchcore.watch.pass_flop", never)
    longer = dataclasses.replace(CONFIG, iterations=2)
    model = toy(torch.float32)
    rest = Trainer(model, PROMPTS, reward, recipe, longer, tmp_path / "run", resume=True)
    rest.run()
    assert rest.watch.flop == PassFlop(FIRST + SECOND, FIRST + 2 * SECOND)


def test_a_failed_iteration_leaves_no_work_behind(toy, tmp_path):
    calls = []

    def second_fails(images, prompts):
        calls.append(0)
        if len(calls) == 2:
            raise OSError("gone")
        return reward(images, prompts)

    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    config = dataclasses.replace(CONFIG, prompts_per_round=1, reward_attempts=1)
    trainer = Trainer(toy(torch.float32), PROMPTS, second_fails, recipe, config, tmp_path / "run")
    with pytest.raises(RuntimeError, match="gone"):
        trainer.step()
    assert trainer.step()["tflop"] == trainer.step()["tflop"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
    ],
)
def test_peaks_belong_to_whole_names(name, peak):
    assert peak_tflops(name) == peak


def test_mfu_is_work_over_time_and_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert mfu(989.4, 2.0, torch.device("cuda")) == pytest.approx(0.5)
    assert mfu(989.4, 2.0, torch.device("cuda"), peak=494.7) == pytest.approx(1.0)
    assert mfu(1.0, 1.0, torch.device("cpu")) is None
    assert mfu(1.0, 2.0, torch.device("cpu"), peak=1.0) == 0.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert mfu(1.0, 1.0, torch.device("cuda")) is None


def test_a_row_of_a_gpu_has_its_share_and_its_memory(toy, tmp_path, monkeypatch):
    """The parts of a row that a GPU adds, with a CPU's clock and a GPU that is made up."""
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)
    trainer = Trainer(toy(torch.float32), PROMPTS, reward, recipe, CONFIG, tmp_path / "run")
    reset = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    trainer.watch.device = torch.device("cuda")
    row = trainer.step()
    assert row["memory_gb"] == 5.0
    assert len(reset) == 1
    assert row["mfu"] == pytest.approx(row["tflop"] / (row["wall_s"] * 989.4), rel=0.02)
    assert "rss_gb" not in row


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_in_groups_cost_as_much_backward_as_forward(groups, transposed):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = kind(8, 16, 3, stride=2, groups=groups)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        y = layer(x)
    forward = counter.get_total_flops()
    for inputs in ([x], [layer.weight], [x, layer.weight]):
        backward = FlopCounterMode(display=False, custom_mapping=_BACKWARDS)
        with backward:
            torch.autograd.grad(y.sum(), inputs, retain_graph=True)
        assert backward.get_total_flops() == len(inputs) * forward
