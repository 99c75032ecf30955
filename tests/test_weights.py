"""What is trained and saved, for every family: LoRA, all weights, references, averages, resume."""

import dataclasses

import pytest
import tiny_pipelines
import torch
from tiny_models import PROMPTS, differ, randomise, velocity

from branchcore import checkpoint, models, recipes, schedule
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from branchcore.models.adapters import lora_layers
from branchcore.models.weights import (
    LORA_FILE,
    add_lora,
    facts,
    load_lora,
    save_lora,
    train_all,
)

RECIPE = recipes.build("branch_grpo", schedule.shifted_linear(3, 3), splits=(0, 1))
CONFIG = TrainerConfig(
    iterations=1, prompts_per_iteration=2, lr=1e-2, max_grad_norm=1e9, ema_decay=0.5
)
FAMILIES = [name for name in tiny_pipelines.names() if name in models.FAMILIES]
BF16 = {"dtype": torch.bfloat16}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, copies):
    return copies(request.param)


@pytest.fixture(scope="module")
def sd3(copies):
    return copies("sd3")


def brightness(images, _prompts):
    return {"brightness": images.flatten(1).mean(1)}


def trainer_of(model, out, config=CONFIG, recipe=RECIPE, **options):
    return Trainer(model, PROMPTS, brightness, recipe, config, out, **options)


def snapshot(model):
    """Copies of every tensor of a pipeline, under the names they have without a LoRA."""
    parts = {n: c for n, c in model.pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {
        f"{part}.{name.replace('.base_layer', '')}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


def without_effect(model, names):
    """Those parameters that no velocity depends on."""
    parameters, found = dict(model.module.named_parameters()), set()
    base = velocity(model)
    for name in names:
        kept = parameters[name].detach().clone()
        with torch.no_grad():
            parameters[name].add_(1.0)
            if torch.equal(velocity(model), base):
                found.add(name)
            parameters[name].copy_(kept)
    return found


def test_an_iteration_with_lora_changes_the_lora_only(family, tmp_path):
    model = family.load()
    before, v = snapshot(model), velocity(model)
    add_lora(model, rank=2)
    assert torch.equal(velocity(model), v)
    start = {n: p.detach().clone() for n, p in model.module.named_parameters() if p.requires_grad}
    assert set(start) == {n for n, _ in model.module.named_parameters() if ".lora_" in n}
    trainer_of(model, tmp_path).run()
    assert not differ(before, snapshot(model))
    after = dict(model.module.named_parameters())
    same = set(start) - differ(start, {name: after[name].detach() for name in start})
    same |= {name for name in start if "lora_B" in name and not after[name].any()}
    assert same == without_effect(model, same)
    assert len(same) < len(start) / 3
    assert float((velocity(model) - v).abs().max()) > 1e-4
    assert torch.equal(velocity(model, reference=True), v)


def test_an_iteration_with_all_weights_changes_the_transformer_only(family, tmp_path):
    model = family.load()
    before, v = snapshot(model), velocity(model)
    train_all(model, reference=True)
    trainer_of(model, tmp_path).run()
    changed = differ(before, snapshot(model))
    weights = dict(model.module.named_parameters())
    assert changed <= {f"transformer.{name}" for name in weights}
    same = {name for name in weights if f"transformer.{name}" not in changed}
    assert same == without_effect(model, same)
    assert len(same) < len(weights) / 3
    assert float((velocity(model) - v).abs().max()) > 1e-4
    assert torch.equal(velocity(model, reference=True), v)
    assert not any(p.requires_grad for p in model.frozen.parameters())


def test_lora_over_bf16_is_fp32_and_computes_in_bf16(family, tmp_path):
    model = family.load(**BF16)
    add_lora(model, rank=2, alpha=6)
    randomise(model)
    x = torch.randn(3, *model.latent_shape)
    view = model.with_prompts(PROMPTS)
    v = view.velocity(x, torch.tensor([0.3, 0.3, 0.9]), torch.arange(3))
    v.float().square().mean().backward()
    trained = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    reached = {name: p for name, p in trained.items() if p.grad is not None}
    assert len(reached) > len(trained) / 2
    for p in reached.values():
        assert p.dtype == p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
    assert all(p.grad.any() for name, p in reached.items() if "to_v" in name)
    save_lora(model, tmp_path)
    again = family.load(**BF16)
    load_lora(again, tmp_path / LORA_FILE)
    found = dict(again.module.named_parameters())
    assert not differ(trained, {name: found[name] for name in trained})
    again.to(torch.float32).to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in again.module.parameters() if p.requires_grad)
    layer = next(iter(lora_layers(model.module).values()))
    inputs = torch.randn(5, layer.in_features).bfloat16()
    a, b = layer.lora_A["default"].weight.bfloat16(), layer.lora_B["default"].weight.bfloat16()
    expected = layer.base_layer(inputs) + inputs @ a.T @ b.T * 3.0
    assert torch.equal(layer(inputs), expected)


class TwoModels:
    """A policy whose reference is another model; told nothing from the host."""

    def __init__(self, policy, base):
        self.latent_shape, self.velocity = policy.latent_shape, policy.velocity
        self.reference_velocity = base.velocity


@pytest.mark.parametrize(
    ("form", "guidance"), [("full graph", 1.0), ("block inputs", 3.0), ("no tape", 1.0)]
)
def test_kl_gradient_with_the_lora_off_equals_that_of_two_models(sd3, form, guidance):
    from branchcore.models.runtime import checkpoint_blocks
    from branchcore.stages import accumulate, collect

    policy, base = sd3.tiny.load().to(torch.float64), sd3.load()
    policy.guidance = base.guidance = guidance
    policy.encode(PROMPTS)
    base.module.to(torch.float64)
    base.dtype = torch.float64
    add_lora(policy, rank=2)
    randomise(policy)
    if form == "block inputs":
        checkpoint_blocks(policy)
    found = {}
    for kl, two in ((0.5, False), (0.5, True), (0.0, False)):
        recipe = recipes.build("flow_grpo", schedule.shifted_linear(3, 3), group=3, kl=kl)
        plan = recipe.plan([0, 1], seed=0, iteration=0)
        batch = collect(
            plan, policy, recipe, PROMPTS[:2], [0, 1], brightness, seed=0, iteration=0,
            tape=0 if form == "no tape" else None,
        )  # fmt: skip
        if two:
            batch = batch._replace(model=TwoModels(batch.model, base.with_prompts(PROMPTS[:2])))
        policy.module.zero_grad(set_to_none=True)
        accumulate(batch, recipe)
        grads = [p.grad.flatten() for p in policy.module.parameters() if p.grad is not None]
        found[kl, two] = torch.cat(grads)
    expected = found[0.5, True]
    assert float((found[0.5, False] - expected).norm() / expected.norm()) <= 1e-10
    assert float((found[0.0, False] - expected).norm() / expected.norm()) > 1e-3


def test_the_reference_leaves_what_is_trainable_alone(sd3):
    model = sd3.load()
    add_lora(model, rank=2)
    parameters = [p for name, p in model.module.named_parameters() if ".lora_" in name]
    parameters[-1].requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    layers = lora_layers(model.module).values()
    with model.as_reference():
        assert all(layer.disable_adapters for layer in layers)
    assert flags == [p.requires_grad for p in parameters]
    assert not any(layer.disable_adapters for layer in layers)


KINDS = {
    "LoRA": ({}, lambda model: add_lora(model, rank=2)),
    "all in bf16": (BF16, train_all),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resume_continues_bit_for_bit(sd3, tmp_path, kind):
    dtype, prepare = KINDS[kind]
    config = dataclasses.replace(CONFIG, iterations=2)

    def run(out, stop, resume=False):
        model = sd3.load(**dtype)
        prepare(model)
        if kind != "all in bf16":
            randomise(model, seed=int(resume))
        trainer = trainer_of(model, tmp_path / out, config, facts=facts(model), resume=resume)
        while trainer.iteration < stop:
            trainer._log(trainer.step())
        trainer.save()
        trainer.checkpoints.wait()
        return trainer

    run("whole", 2)
    run("cut", 1)
    run("cut", 2, resume=True)
    folders = [tmp_path / out / "checkpoint-000002" for out in ("whole", "cut")]
    indices = [checkpoint.read_index(folder) for folder in folders]
    assert indices[0] == indices[1]
    groups = {name.split(".", 1)[0] for name in indices[0].tensors}
    assert groups == {"model", "ema", "optimizer"} | ({"masters"} & groups)
    assert ("masters" in groups) == (kind == "all in bf16")
    for group in groups:
        whole, cut = (checkpoint.load_group(folder, group) for folder in folders)
        assert not differ(whole, cut), group
    held = checkpoint.load_group(folders[0], "model")
    averages = checkpoint.load_group(folders[0], "ema")
    if kind != "all in bf16":
        assert all(".lora_" in name for name in held)
        assert averages.keys() == held.keys()
    assert all(averages[name].dtype == torch.float32 for name in held if "lora" in name)


def test_a_checkpoint_of_another_lora_is_refused(sd3, tmp_path):
    for rank, resume in ((2, False), (3, True)):
        model = sd3.load()
        add_lora(model, rank=rank)
        if resume:
            with pytest.raises(ValueError, match=r"must be \(3, 32\), got \(2, 32\)"):
                trainer_of(model, tmp_path, resume=True)
        else:
            trainer_of(model, tmp_path).run()
    with pytest.raises(ValueError, match="must be of a run with the same facts"):
        trainer_of(model, tmp_path, facts=facts(model), resume=True)


def test_averages_of_a_lora_cost_no_base_and_act_on_the_shared_model(sd3, tmp_path):
    model = sd3.load()
    add_lora(model, rank=2)
    trainer = trainer_of(model, tmp_path, dataclasses.replace(CONFIG, iterations=2))
    trainer.run()
    assert len(trainer.learner.ema.averages) == 2 * len(lora_layers(model.module))
    trained = velocity(model)
    with trainer.averaged():
        averaged = velocity(model)
        save_lora(model, tmp_path / "average")
    assert torch.equal(velocity(model), trained)
    assert not torch.equal(averaged, trained)
    other = sd3.load()
    load_lora(other, tmp_path / "average")
    assert torch.equal(velocity(other), averaged)


def test_initial_weights_depend_on_the_seed_only(sd3):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        model = sd3.load()
        torch.set_rng_state(state)
        add_lora(model, rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(torch.cat([p.flatten() for p in model.module.parameters() if p.requires_grad]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert 0 < float(found[0].detach().abs().max()) <= 32**-0.5
