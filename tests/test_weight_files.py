"""Weights on disk, for every family: diffusers reads what is saved, and the other way round."""

import json
import shutil

import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS, randomise, velocity

from branchcore import checkpoint, models, passes
from branchcore.rollout import rollout
from branchcore.steps import euler
from branchcore.tree import Tree

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from branchcore.models.adapters import lora_layers
from branchcore.models.weights import (
    LORA_FILE,
    add_lora,
    facts,
    load_lora,
    save_lora,
    save_transformer,
    train_all,
)

FAMILIES = [name for name in tiny_pipelines.names() if name in models.FAMILIES]
BF16 = {"dtype": torch.bfloat16}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, copies):
    return copies(request.param)


@pytest.fixture(scope="module")
def sd3(copies):
    return copies("sd3")


def engine_images(model, x):
    chain, sigmas = Tree(), model.sigmas(2)
    chain.leaf(chain.chain(chain.given(1, float(sigmas[0])), sigmas[1:], euler))
    plan = passes.concat([chain.plan()] * len(x))
    view, given = model.with_prompts(PROMPTS[:2]), x.flatten(1)[:, None]
    leaves = rollout(plan, view, [0, 1], seed=0, given=given).leaves
    return model.decode(leaves.view_as(x))


def plain_images(tiny, pipe, model, x):
    return pipe(
        prompt=PROMPTS[:2], latents=model.family.pack(x), num_inference_steps=2,
        output_type="pt", return_dict=False, **tiny.spec.SIZE, **tiny.spec.call(1.0),
    )[0]  # fmt: skip


def test_a_saved_lora_gives_the_plain_pipeline_the_same_images(family, tmp_path):
    from diffusers import DiffusionPipeline

    model = family.load()
    add_lora(model, rank=2, alpha=6)
    randomise(model)
    save_lora(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    got = engine_images(model, x)
    pipe = DiffusionPipeline.from_pretrained(family.tiny.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert float((plain_images(family.tiny, pipe, model, x) - got).abs().max()) > 1e-2
    pipe.load_lora_weights(tmp_path)
    assert float((plain_images(family.tiny, pipe, model, x) - got).abs().max()) <= 1e-4
    again = family.load()
    load_lora(again, tmp_path)
    assert torch.equal(velocity(again), velocity(model))
    assert facts(again) == facts(model)


def test_all_weights_are_a_diffusers_folder(sd3, tmp_path, monkeypatch):
    from diffusers import SD3Transformer2DModel

    model = sd3.load(**BF16)
    train_all(model)
    with torch.no_grad():
        model.module.proj_out.bias.add_(1.0)
    shutil.copytree(sd3.tiny.folder, tmp_path / "pipeline")
    save_transformer(model, tmp_path / "pipeline")
    assert torch.equal(velocity(sd3.tiny.load(tmp_path / "pipeline", **BF16)), velocity(model))
    (file,) = (tmp_path / "pipeline" / "transformer").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    before = {p: p.read_bytes() for p in (tmp_path / "pipeline").rglob("*") if p.is_file()}

    def full_disk(_module, folder):
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SD3Transformer2DModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_transformer(model, tmp_path / "pipeline")
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_lora_without_metadata_has_scale_1(sd3, tmp_path):
    """diffusers' convention for files that say nothing of alpha."""
    model = sd3.load()
    add_lora(model, rank=2, alpha=2)
    randomise(model)
    save_lora(model, tmp_path)
    save_file(load_file(tmp_path / LORA_FILE), tmp_path / "bare.safetensors")
    again = sd3.load()
    load_lora(again, tmp_path / "bare.safetensors")
    torch.testing.assert_close(velocity(again), velocity(model), rtol=0, atol=1e-6)


def test_metadata_is_what_every_version_of_peft_knows(sd3, tmp_path):
    from safetensors import safe_open

    model = sd3.load()
    add_lora(model, rank=2, alpha=6, targets=("attn.to_q", "ff.net.2"))
    with safe_open(save_lora(model, tmp_path), "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said == {
        "transformer.r": 2,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": ["attn.to_q", "ff.net.2"],
    }
    assert checkpoint.trained(model.module).keys() == {
        f"{name}.lora_{side}.default.weight" for name in lora_layers(model.module) for side in "AB"
    }
