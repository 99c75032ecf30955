"""The digits task: prompts, model, features, rewards, evaluation, weights file."""

import math

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from branchcore.models.digits import (
    PROMPTS,
    DigitsReward,
    load_digits_model,
    sample,
    sample_grid,
    score,
)
from branchcore.models.digits.evaluate import is_right
from branchcore.models.digits.features import ink_and_lean
from branchcore.models.digits.prompts import WORDS, prompt_indices, word_indices
from branchcore.models.digits.weights import SHIPPED_WEIGHTS, read_weights, shipped_weights


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return load_digits_model()


@pytest.fixture
def calls():
    """Mixed sigmas and prompts of one velocity call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 1, 8, 8, generator=generator)
    return x, torch.linspace(1, 0.1, 7), torch.tensor([0, 59, 3, 3, 17, 42, 8])


def test_prompts_are_sentences_of_the_grammar():
    words = [[WORDS[i] for i in row] for row in word_indices(prompt_indices(PROMPTS)).tolist()]
    assert [" ".join(row) for row in words] == list(PROMPTS)
    assert len(set(PROMPTS)) == 60


@pytest.mark.parametrize(
    "prompt", ["a thin upright cat", "thin upright seven", "a upright thin seven", "", "a  b c d"]
)
def test_unknown_prompt_names_the_grammar(model, prompt):
    with pytest.raises(ValueError, match=r"must be 'a \{thin\|bold\} \{left-leaning\|upright"):
        model.with_prompts([PROMPTS[0], prompt])


def test_unknown_word_is_named():
    with pytest.raises(ValueError, match=r"unknown words \['cat'\]"):
        prompt_indices(["a thin upright cat"])


def test_velocity_of_a_batch_equals_single_rows(model, calls):
    view = model.with_prompts(PROMPTS)
    with torch.no_grad():
        batch = view.velocity(*calls)
        rows = [view.velocity(*(part[i : i + 1] for part in calls)) for i in range(7)]
    torch.testing.assert_close(torch.cat(rows), batch, rtol=0, atol=1e-5)


def test_velocity_depends_on_prompt_and_sigma(model, calls):
    x, sigma, prompt = calls
    view = model.with_prompts(PROMPTS)
    with torch.no_grad():
        v = view.velocity(x, sigma, prompt)
        assert (view.velocity(x, sigma, prompt.flip(0)) - v)[0].abs().max() > 0.1
        assert (view.velocity(x, sigma.flip(0), prompt) - v)[0].abs().max() > 0.1


def test_float64_is_the_same_function(model, calls):
    view = model.with_prompts(PROMPTS)
    exact = load_digits_model().to(torch.float64).with_prompts(PROMPTS)
    x, sigma, prompt = calls
    with torch.no_grad():
        v = exact.velocity(x.double(), sigma.double(), prompt)
        assert v.dtype == torch.float64
        torch.testing.assert_close(v.float(), view.velocity(*calls), rtol=0, atol=1e-4)


def test_reference_is_frozen_while_the_module_trains(calls):
    model = load_digits_model()
    view = model.with_prompts(PROMPTS)
    v = view.velocity(*calls)
    reference = view.reference_velocity(*calls)
    assert torch.equal(v, reference)
    assert v.requires_grad
    assert not reference.requires_grad
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.1)
    assert torch.equal(view.reference_velocity(*calls), reference)
    assert (view.velocity(*calls) - v).abs().max() > 1e-2


def stroke(columns):
    """Draw one pixel of ink per row, at these columns."""
    image = torch.full((8, 8), -1.0)
    image[torch.arange(8), torch.tensor(columns)] = 1
    return image


def test_ink_and_lean_of_strokes():
    upright, right = stroke([4] * 8), stroke([7, 6, 5, 4, 3, 2, 1, 0])
    grey = torch.where(upright > 0, 1.0, 0.0)
    blank = torch.full((8, 8), -1.0)
    ink, lean = ink_and_lean(torch.stack([upright, right, right.flip(1), grey, blank])).unbind(1)
    variance = 5.25  # of the rows 0..7
    diagonal = variance / (variance + 0.1)
    torch.testing.assert_close(lean, torch.tensor([0, diagonal, -diagonal, 0, 0]))
    torch.testing.assert_close(ink, torch.tensor([8, 8, 8, 8 + 56 / 4, 0]) / 64)


def test_features_ignore_what_clipping_removes():
    image = stroke([2, 2, 3, 3, 4, 4, 5, 5])
    assert torch.equal(ink_and_lean(image[None]), ink_and_lean(3 * image[None]))


def test_reward_has_no_prize_for_overshooting():
    levels = torch.linspace(-0.9, 1, 40)
    images = torch.where(stroke([4] * 8) > 0, 1.0, levels[:, None, None])
    statistics = shipped_weights().statistics
    z = (ink_and_lean(images)[:, 0] - statistics.mean[1, 0]) / statistics.std[1, 0]
    reward = DigitsReward()(images, ["a bold upright one"] * 40)["stroke"]
    torch.testing.assert_close(reward, -(z - 1.25).abs().clamp_max(4))
    assert reward[z > 6].unique().tolist() == [-4.0]


def test_reward_is_finite_and_capped():
    images = torch.cat([torch.zeros(1, 8, 8), torch.full((1, 8, 8), -5.0), torch.randn(2, 8, 8)])
    reward = DigitsReward()(images, PROMPTS[:4])
    assert list(reward) == ["legibility", "stroke", "slant"]
    for component in reward.values():
        assert component.shape == (4,)
        assert component.dtype == torch.float32
        assert component.isfinite().all()
    assert (reward["legibility"] <= math.log(0.9)).all()
    assert (reward["legibility"] >= -6).all()


def test_reward_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"must be \(2, 8, 8\) for 2 prompts, got \(3, 8, 8\)"):
        DigitsReward()(torch.zeros(3, 8, 8), PROMPTS[:2])


def test_right_sides():
    prompts = ["a thin left-leaning one", "a bold upright one", "a bold right-leaning one"]
    z = torch.tensor([[-0.6, -0.6], [0.6, 0.4], [0.4, 0.6]])
    expected = [[True, True], [True, True], [False, True]]
    assert is_right(z, prompt_indices(prompts)).tolist() == expected


def test_base_model_draws_legible_digits_without_style(model):
    images = sample(model, PROMPTS[::2], num_noises=4)
    evaluation = score(images, PROMPTS[::2])
    assert evaluation.judge_accuracy >= 0.97
    assert evaluation.both_right < 0.25
    assert 0.2 < evaluation.diversity < 0.35
    assert 1.9 < evaluation.nearest_real < 2.6


def test_sample_is_a_function_of_seed_and_prompt(model):
    both = sample(model, PROMPTS[3:5], num_noises=2, num_steps=2)
    alone = sample(model, PROMPTS[4:5], num_noises=1, num_steps=2)
    torch.testing.assert_close(both[1, :1], alone[0], rtol=0, atol=1e-5)
    other = sample(model, PROMPTS[4:5], num_noises=1, num_steps=2, seed=1)
    assert (other - alone).abs().max() > 0.1


def test_shipped_weights_are_small():
    assert SHIPPED_WEIGHTS.stat().st_size <= 3_000_000
    assert sum(p.numel() for p in load_digits_model().module.parameters()) == 432_132


def test_trained_weights_load(tmp_path):
    model = load_digits_model()
    torch.nn.init.ones_(model.module.proj_out.bias)
    save_file(model.module.state_dict(), tmp_path / "trained.safetensors")
    loaded = load_digits_model(tmp_path / "trained.safetensors")
    assert (loaded.module.proj_out.bias == 1).all()
    assert (loaded.base.proj_out.bias != 1).any()


def test_damaged_weights_are_refused(tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(SHIPPED_WEIGHTS.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"damaged.safetensors must be an intact safetensors file"):
        read_weights(damaged)
    with pytest.raises(ValueError, match=r"damaged.safetensors must be an intact safetensors file"):
        load_digits_model(damaged)


def test_foreign_weights_are_refused(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match=r"must have format and version .* got \(None, None\)"):
        read_weights(foreign)
    with pytest.raises(ValueError, match=r"must hold the weights of SD3Transformer2DModel"):
        load_digits_model(foreign)


def test_sample_grid_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    panels = {"before": torch.zeros(3, 4, 8, 8), "after": torch.ones(3, 2, 8, 8)}
    sample_grid(panels, PROMPTS[:3], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"panel 'before' must be \(2, K, 8, 8\) for 2 titles"):
        sample_grid(panels, PROMPTS[:2], tmp_path / "grid.png")
