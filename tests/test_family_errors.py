"""Encoding prompts, and one clear error for each thing that is wrong, before long work."""

import json
import re
import shutil

import pytest
import tiny_pipelines
import torch

huggingface_hub = pytest.importorskip("huggingface_hub")
diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a bold cat", "seven dogs on the red house, thin"]


@pytest.fixture(scope="module", params=tiny_pipelines.names())
def tiny(request, tiny_folder):
    return tiny_pipelines.Tiny(request.param, tiny_folder(request.param))


@pytest.fixture(scope="module")
def sd3(tiny_folder):
    """For what `loading` does alike for every family."""
    return tiny_pipelines.Tiny("sd3", tiny_folder("sd3"))


@pytest.fixture
def copy(sd3, tmp_path):
    """A copy of the pipeline that a test may damage."""
    return shutil.copytree(sd3.folder, tmp_path / "copy")


@pytest.fixture
def bare(tiny, tmp_path):
    """The pipeline without weights: whatever is refused here was refused before reading any."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin")
    return shutil.copytree(tiny.folder, tmp_path / "bare", ignore=ignored)


def test_prompts_are_encoded_once_and_known_after_the_release(tiny, monkeypatch):
    guidance = tiny.guidances[-1]
    model, seen, negatives = tiny.load(guidance=guidance), [], []
    encode, encode_negative = model.family.encode, model.family.encode_negative
    spies = {
        "encode": lambda pipe, prompts: seen.extend(prompts) or encode(pipe, prompts),
        "encode_negative": lambda pipe, p: negatives.append(p) or encode_negative(pipe, p),
    }
    for name, spy in spies.items():
        monkeypatch.setattr(model.family, name, spy)
    view = model.with_prompts([*PROMPTS, PROMPTS[0]])
    model.encode(PROMPTS[:1])
    assert [seen.count(prompt) for prompt in PROMPTS] == [1, 1]
    assert negatives == ([tiny_pipelines.NEGATIVE] if guidance > 1 else [])
    assert all(torch.equal(value[0], value[2]) for value in view.text.values())
    model.encode([], release=True)
    encoders = [n for n in model.pipe.components if n.startswith("text_encoder")]
    assert encoders
    assert all(getattr(model.pipe, name) is None for name in encoders)
    again = model.with_prompts(PROMPTS)
    assert all(torch.equal(value[0], view.text[name][0]) for name, value in again.text.items())
    with pytest.raises(ValueError, match=r"prompts must be known once .* got 'a cat' and 0 more"):
        model.with_prompts(["a cat"])


def test_too_long_a_prompt_names_tokens_and_limit(tiny):
    model, limit = tiny.load(), tiny.spec.OPTIONS["max_text_tokens"]
    prompt = "cat " * 200
    with pytest.raises(
        ValueError, match=rf"prompt must have at most {limit} tokens, got (\d+)"
    ) as error:
        model.encode([*(f"cat {i}" for i in range(20)), prompt])
    assert not model._texts
    assert int(re.search(r"got (\d+)", str(error.value))[1]) >= 200
    model.encode(["a cat"])


def test_sizes_and_guidance(tiny, bare):
    with pytest.raises(ValueError, match=r"height must be a positive multiple of \d+, got 15; try"):
        tiny.load(bare, height=15)
    with pytest.raises(ValueError, match=r"width must be a positive multiple of \d+, got 0; try"):
        tiny.load(bare, width=0)
    with pytest.raises(ValueError, match=r"guidance must be at least 1 \(1 = off\), got 0.5"):
        tiny.load(bare, guidance=0.5)
    with pytest.raises(ValueError, match=r"guidance must be at least 1 \(1 = off\), got nan"):
        tiny.load(bare, guidance=float("nan"))
    with pytest.raises(RuntimeError, match="device must be one that torch can use, got cuda:99"):
        tiny.load(bare, device="cuda:99")
    with pytest.raises(OSError, match="transformer must hold weights"):
        tiny.load(bare)


def test_folders(tiny, bare, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="path must be a folder or a name 'owner/model'"):
        tiny.load(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"must be a diffusers pipeline with model_index\.json"):
        tiny.load(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="owner/model must be a pipeline on this machine or, with a"):
        tiny.load("owner/model")
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps(index | {"_class_name": "DiTPipeline"}))
    with pytest.raises(ValueError, match=r"must be a \w+Pipeline, got DiTPipeline"):
        tiny.load(bare)
    found = {"_class_name": "DiTPipeline"}
    monkeypatch.setattr(getattr(diffusers, index["_class_name"]), "load_config", lambda *_: found)
    with pytest.raises(ValueError, match=r"owner/model must be a \w+Pipeline, got DiTPipeline"):
        tiny.load("owner/model")


def test_weights_that_lack_or_add_a_key(sd3, copy):
    from safetensors.torch import load_file, save_file

    (file,) = (copy / "transformer").glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"got 1 missing keys, such as {re.escape(name)}"):
        sd3.load(copy)
    save_file({**weights, "stranger": weights[name].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="got 1 unexpected keys, such as stranger"):
        sd3.load(copy)
    save_file({**weights, name: torch.zeros(7, 7)}, file, {"format": "pt"})
    with pytest.raises((ValueError, OSError), match=re.escape(name)):
        sd3.load(copy)


def test_a_pipeline_without_its_vae_weights(sd3, copy):
    for file in (copy / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="vae must hold weights, got"):
        sd3.load(copy)


def test_a_text_encoder_is_whole_or_refused(sd3, copy):
    from safetensors.torch import load_file, save_file

    (file,) = (copy / "text_encoder_3").glob("*.safetensors")
    whole = load_file(file)
    name = next(name for name in whole if "SelfAttention.q" in name)
    save_file({k: v for k, v in whole.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of T5EncoderModel, got 1 missing keys, such as"):
        sd3.load(copy)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OSError, match="text_encoder_3 must hold weights, got"):
        sd3.load(copy)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(OSError, match="must be a whole pipeline, got no folder tokenizer_2"):
        sd3.load(copy)
