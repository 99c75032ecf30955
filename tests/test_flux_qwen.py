"""What only FLUX.1 and Qwen-Image have: embedded guidance, lengths, variants."""

import json
import shutil

import pytest
import tiny_pipelines
import torch

pytest.importorskip("diffusers")


@pytest.fixture
def tiny(tiny_folder):
    return lambda name: tiny_pipelines.Tiny(name, tiny_folder(name))


def set_transformer_option(folder, **options):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def test_each_kind_of_guidance_needs_a_model_that_has_it(tiny, tmp_path):
    ignored = shutil.ignore_patterns("*.safetensors")
    for name in ("flux", "flux_schnell"):
        shutil.copytree(tiny(name).folder, tmp_path / name, ignore=ignored)
    with pytest.raises(
        ValueError, match=r"guidance must be 1 for a guidance-distilled model, got 4"
    ):
        tiny("flux").load(tmp_path / "flux", guidance=4.0)
    with pytest.raises(
        ValueError, match=r"embedded_guidance must be left out .* got 3.5; try guid"
    ):
        tiny("flux_schnell").load(tmp_path / "flux_schnell", embedded_guidance=3.5)


def test_embedded_guidance_is_3_5_unless_said_otherwise(tiny):
    model, velocities = tiny("flux").load(embedded_guidance=None), []
    view, x = model.with_prompts(["a cat"]), torch.ones(1, *model.latent_shape)
    for scale in (None, 3.5, 2.5):
        model.family.embedded_guidance = scale
        with torch.no_grad():
            velocities.append(view.velocity(x, torch.tensor([0.5]), torch.tensor([0])))
    assert torch.equal(velocities[0], velocities[1])
    assert float((velocities[0] - velocities[2]).abs().max()) > 1e-3


def test_qwen_pads_and_masks_only_prompts_of_different_length(tiny):
    model = tiny("qwen_image").load()
    prompts = ["a bold cat", "a thin dog", "the red house on the dog, blue"]
    same, mixed = (model.with_prompts(p).text for p in (prompts[:2], prompts))
    assert "mask" not in same
    length = same["embeds"].shape[1]
    assert mixed["mask"].sum(1).tolist() == [length, length, mixed["embeds"].shape[1]]
    assert torch.equal(mixed["embeds"][:2, :length], same["embeds"])
    assert not mixed["embeds"][:2, length:].any()


def test_qwen_takes_no_longer_prompts_than_its_pipeline(tiny):
    """The pipeline's tokenizer cuts there, whatever `max_text_tokens` says."""
    model = tiny("qwen_image").load(max_text_tokens=2000)
    with pytest.raises(ValueError, match=r"prompt must have at most 1024 tokens, got \d+ in 'cat"):
        model.encode(["cat " * 1025])


def test_qwen_variants_that_are_not_text_to_image_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen_image").folder, tmp_path / "edit")
    for option in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        set_transformer_option(folder, **{option: True})
        with pytest.raises(NotImplementedError, match=f"{option} of the transformer must be false"):
            tiny("qwen_image").load(folder)
        set_transformer_option(folder, **{option: False})
