"""What cannot be trained, saved or loaded is refused, and the model stays as it was."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import velocity

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from branchcore.models.adapters import lora_layers
from branchcore.models.weights import (
    LORA_FILE,
    add_lora,
    load_lora,
    save_lora,
    save_transformer,
    train_all,
)


@pytest.fixture(scope="module")
def sd3(copies):
    return copies("sd3")


@pytest.fixture(scope="module")
def untouched(sd3):
    """A model for calls that fail."""
    return sd3.load()


def test_a_frozen_copy_refuses_patched_blocks(sd3):
    model = sd3.load()
    block = model.module.transformer_blocks[0]
    block.forward = block.forward
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0 must have its own forward"):
        train_all(model, reference=True)
    assert model.sharing is not None
    assert not any(p.requires_grad for p in model.module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1 and alpha positive, got 0 and 0"),
        ({"alpha": 0.0}, "rank must be at least 1 and alpha positive, got 32 and 0.0"),
        ({"targets": ("attn.to_q", "to_z")}, "linear layers of SD3Tr.*, got 'to_z' that ends none"),
        ({"targets": ("pos_embed.proj",)}, "got 'pos_embed.proj' that ends none"),
        ({"targets": ("proj",)}, "got 'proj' that also ends pos_embed.proj; try names such as"),
        ({"targets": ()}, "targets must name at least one layer, got none"),
    ],
)
def test_bad_loras_leave_the_model_as_it_was(untouched, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(untouched, **options)
    assert not lora_layers(untouched.module)
    assert untouched.sharing is not None


def test_what_is_trained_cannot_be_prepared_again(sd3, tmp_path):
    model = sd3.load()
    with pytest.raises(ValueError, match="must have a LoRA or a frozen copy of its weights, got"):
        velocity(model, reference=True)
    with pytest.raises(ValueError, match=r"save_lora: model must have a LoRA, got none"):
        save_lora(model, tmp_path)
    with pytest.raises(OSError, match="path must be a LoRA file or a folder with"):
        load_lora(model, tmp_path)
    add_lora(model)
    for prepare in (add_lora, train_all, lambda m: load_lora(m, tmp_path)):
        with pytest.raises(ValueError, match=r"without a LoRA, got a LoRA"):
            prepare(model)
    with pytest.raises(ValueError, match="save_transformer: model must have no LoRA, got one"):
        save_transformer(model, tmp_path)
    model = sd3.load()
    train_all(model)
    with pytest.raises(ValueError, match=r"must have frozen weights .* got trainable weights"):
        add_lora(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape", "error", "message"),
    [
        ("transformer.proj_in.lora_A.weight", (2, 32), ValueError, "for proj_in, which takes none"),
        ("transformer.proj_out.lora_A.weight", (2, 9), ValueError, r"takes \{'A': \(2, 32\), 'B'"),
        ("text_encoder.q.lora_A.weight", (2, 32), NotImplementedError, "of the transformer, got t"),
        ("transformer.proj_out.lora_A.weight", (2, 32, 1, 1), NotImplementedError, "LoRA matrices"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(untouched, tmp_path, name, shape, error, message):
    other = name.replace("lora_A", "lora_B")
    save_file({name: torch.zeros(shape), other: torch.zeros(16, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(error, match=message):
        load_lora(untouched, tmp_path)
    assert not lora_layers(untouched.module)


def test_files_without_matrices_are_refused_and_pickles_not_read(untouched, tmp_path):
    file = tmp_path / LORA_FILE
    torch.save({"transformer.proj_out.lora_A.weight": torch.zeros(2, 32)}, file)
    with pytest.raises(OSError, match=r"load_lora: .* must be safetensors, got Error while"):
        load_lora(untouched, tmp_path)
    save_file({}, file)
    with pytest.raises(ValueError, match="must hold LoRA matrices, got none"):
        load_lora(untouched, file)
    assert not lora_layers(untouched.module)
