"""The memory planner: its bytes against those of real tensors, its choice, its words."""

import dataclasses

import pytest
import torch

from branchcore import recipes, schedule
from branchcore.pruning_config import PruningConfig
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

pytest.importorskip("diffusers")

from branchcore.models import sd3, weights
from branchcore.models.sizing.live_bytes import LiveBytes, faked, measure
from branchcore.models.sizing.memory import MARGIN, bytes_of, plan_memory, predict_memory
from branchcore.models.sizing.memory_need import Need

SG = schedule.shifted_linear(4)
PROMPTS = ["a cat", "a dog", "red house", "blue dog"]
CONFIG = TrainerConfig(iterations=9, prompts_per_iteration=4)
SIZES = ((16, 32), (32, 32), (64, 64))


def mix(kl=0.0):
    return recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7, kl=kl)


def tree():
    return recipes.branch_grpo(SG, splits=(0, 1), clip=0.1)


RUNS = {
    "LoRA, all on the tape": (True, 1.0, {}, mix()),
    "LoRA, guidance, KL": (True, 3.0, {"max_batch": 4}, mix(0.05)),
    "full, no tape, KL": (False, 1.0, {"max_batch": 4, "tape": 0, "ema_decay": 0.9}, mix(0.05)),
    "LoRA, half of the tape": (
        True, 1.0, {"prune": PruningConfig(rule="uniform", rate=0.5, draw="fixed")}, tree(),
    ),
    "LoRA, tapes of two rounds": (
        True, 1.0, {"prompts_per_round": 1, "overlap_rewards": True}, mix(),
    ),
    "full, two updates": (
        False, 1.0, {"max_batch": 8, "prompts_per_round": 1, "tape": 3},
        recipes.dance_grpo(SG, group=4, clip=0.1, updates=2),
    ),
}  # fmt: skip


def load(folder, size=(16, 32), lora=True, guidance=1.0, reference=False, dtype=torch.float32):
    model = sd3.from_pretrained(
        folder, height=size[0], width=size[1], guidance=guidance, dtype=dtype, max_text_tokens=24
    )
    model.encode(PROMPTS, release=True)
    if lora:
        weights.add_lora(model, rank=4)
    else:
        weights.train_all(model, reference=reference)
    return model


def reward(images, prompts):
    return {"mean": images.flatten(1).mean(1)}


def measured(model, recipe, config, out):
    """Most bytes of real tensors at any time of the second iteration."""
    with LiveBytes() as live:
        for module in (model.module, model.vae, model.frozen):
            if module is not None:
                live.watch([*module.parameters(), *module.buffers()])
        trainer = Trainer(model, PROMPTS, reward, recipe, config, out)
        trainer.step()
        live.restart()
        trainer.step()
    return live.peak


CASES = [("LoRA, all on the tape", size) for size in SIZES]
CASES += [(kind, (32, 32)) for kind in RUNS if kind != "LoRA, all on the tape"]


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_prediction_is_the_measured_peak(tiny_folder, tmp_path, kind, size):
    lora, guidance, options, recipe = RUNS[kind]
    model = load(tiny_folder("sd3"), size, lora, guidance, reference=recipe.objective.kl > 0)
    config = TrainerConfig(iterations=9, prompts_per_iteration=2, **options)
    predicted = max(predict_memory(model, recipe, config, prompt=PROMPTS[0]).values())
    real = measured(model, recipe, config, tmp_path)
    assert abs(predicted / real - 1) < 0.1, (predicted, real)


def test_masters_of_bf16_weights_are_counted(tiny_folder, tmp_path):
    model = load(tiny_folder("sd3"), lora=False, dtype=torch.bfloat16)
    config = TrainerConfig(iterations=9, prompts_per_iteration=1, max_batch=2, tape=0)
    phases = predict_memory(model, mix(), config, prompt=PROMPTS[0])
    assert abs(max(phases.values()) / measured(model, mix(), config, tmp_path) - 1) < 0.1


def test_live_bytes_are_those_of_storages_that_somebody_holds():
    with LiveBytes() as live:
        x = torch.zeros(250)
        y = (x + 1.0)[:10]
        assert live.now == 2000
        del x
        assert live.now == 1000
        y.sum()
        assert live.peak == 2004 - 4
        del y
        assert live.now == 0


def test_the_probe_leaves_the_model_alone(tiny_folder):
    model = load(tiny_folder("sd3"))
    before = {name: (id(p), p.clone()) for name, p in model.module.named_parameters()}
    measure(model, PROMPTS[0])
    for name, p in model.module.named_parameters():
        assert id(p) == before[name][0]
        assert p.grad is None
        assert torch.equal(p, before[name][1])
    with faked([model.module], torch.device("cpu")):
        pass


@pytest.fixture(scope="module")
def planned(tiny_folder):
    model = load(tiny_folder("sd3"))
    cost = measure(model, PROMPTS[0])
    return lambda budget: plan_memory(model, mix(), CONFIG, budget, prompt=PROMPTS[0], cost=cost)


def test_a_large_budget_holds_everything_at_once(planned):
    plan = planned(10**9)
    assert (plan.config.prompts_per_round, plan.config.tape) == (4, plan.trained)
    assert plan.limit == "none: everything fits at once"


def test_less_budget_costs_rows_or_tape_and_the_choice_keeps_to_it(planned, tiny_folder, tmp_path):
    full = planned(10**9)
    small = planned(int(full.peak * 0.4))
    chosen = small.config
    assert 1 <= small.decode_batch < full.decode_batch == full.config.max_batch
    assert (chosen.tape < full.config.tape) or (chosen.max_batch < full.config.max_batch)
    model = load(tiny_folder("sd3"))
    model.decode_batch = small.decode_batch
    assert measured(model, mix(), chosen, tmp_path) <= small.budget
    assert small.peak <= small.usable < small.budget * (1 - MARGIN) + 1
    assert str(small).startswith(f"memory: {small.peak / 1e6:.1f} MB of {small.budget / 1e6:.1f}")
    assert f"{chosen.max_batch} rows per call, {chosen.tape} of {small.trained}" in str(small)
    assert f"on the tape, {small.decode_batch} decoded at once" in str(small)


def test_a_budget_too_small_for_one_node_says_what_is_needed(planned):
    with pytest.raises(ValueError, match=r"plan_memory: budget must be at least 1\.\d MB") as error:
        planned(1000)
    needed = float(str(error.value).split("at least ")[1].split(" MB")[0])
    assert planned(int((needed + 0.1) * 1e6)).config.max_batch == 1
    with pytest.raises(ValueError, match="budget must be at least"):
        planned(int((needed - 0.1) * 1e6))


def test_as_many_images_are_decoded_at_once_as_fit(tiny_folder):
    model = load(tiny_folder("sd3"))
    cost = measure(model, PROMPTS[0])
    cost = cost._replace(decode=cost.decode._replace(per_row=10.0 * cost.decode.per_row))
    model.decode_batch = 3  # the planner neither reads nor changes it
    plan = plan_memory(model, mix(), CONFIG, 20_000_000, prompt=PROMPTS[0], cost=cost)
    assert 1 < plan.decode_batch < plan.config.max_batch
    assert model.decode_batch == 3
    config, need = plan.config, Need.of(model, mix(), CONFIG, cost)
    rounds = -(-CONFIG.prompts_per_iteration // config.prompts_per_round)

    def peak(images):
        wider = need._replace(decode_batch=images)
        wave = need.plan(config.prompts_per_round)
        return max(wider.phases(wave, rounds, config.max_batch, config.tape).values())

    assert peak(plan.decode_batch) == plan.peak <= plan.usable < peak(plan.decode_batch + 1)


def test_frozen_models_are_refused(tiny_folder):
    model = sd3.from_pretrained(
        tiny_folder("sd3"), height=16, width=32, dtype=torch.float32, max_text_tokens=24
    )
    with pytest.raises(ValueError, match="model must have trainable weights, got none"):
        plan_memory(model, mix(), CONFIG, 10**9, prompt=PROMPTS[0])


def test_sizes_are_read():
    assert [bytes_of(x) for x in ("80GB", "1.5 GiB", "512m")] == [80e9, 1.5 * 2**30, 512e6]
    with pytest.raises(ValueError, match="text must be like '80GB' or '24GiB', got 'much'"):
        bytes_of("much")


def test_what_pruned_parents_leave_goes_to_the_others(tiny_folder):
    """A budget that parts the rounds of a whole tape holds all prompts of half a tape."""
    model = load(tiny_folder("sd3"))
    cost = measure(model, PROMPTS[0])
    half = PruningConfig(rule="uniform", rate=0.5, draw="fixed")

    def planned(budget, prune):
        config = dataclasses.replace(CONFIG, prune=prune)
        return plan_memory(model, tree(), config, budget, prompt=PROMPTS[0], cost=cost)

    whole, pruned = (planned(10**9, prune) for prune in (PruningConfig(), half))
    assert (whole.trained, pruned.trained, pruned.config.tape) == (4 * 7, 4 * 4, 4 * 4)
    budget = int(1.02 * pruned.peak / (1 - MARGIN))
    assert planned(budget, half).config == pruned.config
    assert planned(budget, PruningConfig()).config != whole.config
