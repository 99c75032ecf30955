"""Scorers against transformers and Pillow themselves, and rewards by name."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from branchcore import rewards
from branchcore.rewards.images import Preprocessing, preprocessing

PROMPTS = ["a red cat", "the blue dog", "a red cat", "a red cat", "seven dogs"]
ENDS = {"height": 24, "width": 24}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0):
    """Smooth colours with some noise, and values that leave [0, 1] a little."""
    coarse = torch.rand(int(np.prod(shape[:-2])), 1, 4, 5, generator=seeded(seed))
    smooth = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")
    noise = torch.randn(shape, generator=seeded(seed + 1))
    return smooth.view(shape) * 1.1 - 0.05 + 0.05 * noise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random scorers, saved as transformers saves them."""
    pytest.importorskip("diffusers")
    import transformers
    from tiny_pipelines import parts
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root = tmp_path_factory.mktemp("scorers")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=ENDS)
    for name in ("clip", "blip"):
        processor.save_pretrained(root / name)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    layers["num_attention_heads"] = 2
    sight = {**layers, "image_size": 24, "patch_size": 8}
    words = parts.clip_tokenizer()
    words.save_pretrained(root / "clip")
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    ids["pad_token_id"] = words.pad_token_id
    text = {**layers, **ids, "vocab_size": len(words), "max_position_embeddings": 77}
    with parts.seeded():
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=sight, projection_dim=12)
        )
        parts.liven(clip).save_pretrained(root / "clip")
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *parts.WORDS]
        bert = transformers.BertTokenizer(vocab={x: i for i, x in enumerate(vocab)})
        bert.save_pretrained(root / "blip")
        reads = {**layers, "vocab_size": len(vocab), "max_position_embeddings": 40}
        blip = transformers.BlipForImageTextRetrieval(
            transformers.BlipConfig(text_config=reads, vision_config={**sight, "hidden_size": 24})
        )
        parts.liven(blip).save_pretrained(root / "blip")
        sizes = [16, 1024, 128, 64, 16, 1]
        weights = load_file(root / "blip" / "model.safetensors")
        for i, index in enumerate((0, 2, 4, 6, 7)):
            weights[f"mlp.layers.{index}.weight"] = torch.randn(sizes[i + 1], sizes[i]) / 6
            weights[f"mlp.layers.{index}.bias"] = torch.randn(sizes[i + 1])
        save_file(weights, root / "blip" / "model.safetensors")
    return root


def pil(images):
    """8-bit arrays, (N, H, W, 3)."""
    return images.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def processed(folder, images):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    return processor(list(pil(images)), return_tensors="pt").pixel_values


def cosines(folder, images, prompts):
    """One image and prompt at a time through CLIPModel.forward, as model cards show it."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokens, pixel_values=processed(folder, image[None]))
        found.append(out.logits_per_image[0, 0])
    scale = model.logit_scale.detach().exp()
    return torch.stack(found) / scale, float(scale)


@pytest.mark.parametrize(
    "size", [(24, 24), (24, 40), (40, 24), (57, 31), (128, 96), (16, 20)], ids=str
)
def test_preprocessing_is_the_processors(folders, size):
    """Pillow's fixed-point weights may differ by one of 255 levels here and there."""
    images = pictures(2, 3, *size)
    config = json.loads((folders / "clip" / "preprocessor_config.json").read_text())
    levels = torch.from_numpy(pil(images)).permute(0, 3, 1, 2).float()
    got, wanted = preprocessing("x", config)(levels), processed(folders / "clip", images)
    assert got.shape == wanted.shape == (2, 3, 24, 24)
    off = (got - wanted).abs()
    assert off.max() < 1.01 / 255 / 0.26
    assert (off > 1e-5).float().mean() < 0.03


def test_preprocessing_to_exact_size_and_in_old_words():
    levels = pictures(1, 3, 30, 50).mul(255).round().clamp(0, 255)
    base = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    blip = preprocessing("x", {**base, "size": {"height": 20, "width": 24}})
    assert blip(levels).shape == (1, 3, 20, 24)
    old = preprocessing("x", {**base, "size": 24, "crop_size": 24})
    assert old == Preprocessing(24, (24, 24), (0.5,) * 3, (0.25,) * 3)
    exact = blip._replace(resize=(30, 50))(levels)
    torch.testing.assert_close(exact, (levels / 255 - 0.5) / 0.25, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, r"resample must be 3 \(bicubic\), got 2"),
        ({"do_rescale": False}, "do_rescale of the image processor must be true"),
        ({"crop_size": {"height": 32, "width": 32}}, r"crop_size must be within size 24, got"),
        ({"image_mean": None}, "image processor must be CLIP's or BLIP's"),
    ],
)
def test_other_image_processors_are_refused(folders, change, message):
    config = json.loads((folders / "clip" / "preprocessor_config.json").read_text())
    with pytest.raises(ValueError, match=message):
        preprocessing("x", config | change)


def test_clip_scores_are_those_of_transformers(folders):
    images = pictures(5, 3, 24, 24)
    wanted, scale = cosines(folders / "clip", images, PROMPTS)
    names = {
        "clip": (rewards.ClipScore(folders / "clip"), 100.0),
        "pickscore": (rewards.PickScore(folders / "clip"), scale),
        "hps": (rewards.HPSv2(folders / "clip"), 1.0),
    }
    for name, (reward, factor) in names.items():
        (got,) = (scores := reward(images, PROMPTS)).values()
        assert list(scores) == [name]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, factor * wanted, rtol=1e-5, atol=1e-5)
    divided = rewards.PickScore(folders / "clip", divide_by_26=True)(images, PROMPTS)["pickscore"]
    torch.testing.assert_close(divided, scale * wanted / 26, rtol=1e-5, atol=1e-5)
    percent = rewards.HPSv2(folders / "clip", times_100=True)(images, PROMPTS)["hps"]
    torch.testing.assert_close(percent, 100 * wanted, rtol=1e-5, atol=1e-5)
    assert (wanted < 0).any()
    floor = rewards.ClipScore(folders / "clip", floor=True)(images, PROMPTS)["clip"]
    torch.testing.assert_close(floor, 100 * wanted.clamp(min=0), rtol=1e-5, atol=1e-5)


def blip_scores(folder, images, prompts):
    """BlipForImageTextRetrieval's first token, through the published head."""
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    model, weights = BlipForImageTextRetrieval.from_pretrained(folder).eval(), {}
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**tokens, pixel_values=processed(folder, images))
    x, weights = out.question_embeds[:, 0], load_file(folder / "model.safetensors")
    for index in (0, 2, 4, 6, 7):
        x = x @ weights[f"mlp.layers.{index}.weight"].T + weights[f"mlp.layers.{index}.bias"]
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_blip_and_the_published_head(folders):
    images = pictures(5, 3, 24, 24)
    wanted = blip_scores(folders / "blip", images, PROMPTS)
    got = rewards.ImageReward(folders / "blip", batch=2)(images, PROMPTS)
    assert list(got) == ["imagereward"]
    torch.testing.assert_close(got["imagereward"], wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 1e-2
    assert abs(wanted[0] - wanted[2]) > 1e-4


@pytest.mark.parametrize("name", ["clip", "imagereward"])
def test_neither_batch_nor_neighbours_matter(folders, name):
    make = rewards.ClipScore if name == "clip" else rewards.ImageReward
    folder = folders / ("clip" if name == "clip" else "blip")
    images = pictures(5, 3, 30, 24)
    whole = make(folder)(images, PROMPTS)[name]
    for batch in (1, 2):
        torch.testing.assert_close(make(folder, batch=batch)(images, PROMPTS)[name], whole)
    order = [4, 2, 0, 1, 3]
    mixed = make(folder)(images[order], [PROMPTS[i] for i in order])[name]
    torch.testing.assert_close(mixed, whole[order])


def test_a_prompt_is_encoded_once(folders, monkeypatch):
    reward = rewards.ClipScore(folders / "clip", batch=2)
    texts = []
    encode = reward.cosine._text
    monkeypatch.setattr(reward.cosine, "_text", lambda x: texts.append(x) or encode(x))
    reward(pictures(5, 3, 24, 24), PROMPTS)
    assert texts == [["a red cat", "the blue dog"], ["seven dogs"]]


def test_a_prompt_is_cut_at_77_tokens(folders):
    """Every word is a token here: two ends and 75 words count."""
    reward, image = rewards.ClipScore(folders / "clip"), pictures(1, 3, 24, 24)
    long = ["a b " * 60, "a b " * 37 + "a", "a b " * 37]
    first, same, other = (reward(image, [x])["clip"] for x in long)
    assert first == same
    assert (first - other).abs() > 1e-4


def test_scorers_are_frozen_and_in_their_dtype(folders):
    reward = rewards.ImageReward(folders / "blip", dtype=torch.bfloat16)
    parts = (reward.vision, reward.text, reward.mlp)
    assert [{p.dtype for p in part.parameters()} for part in parts] == [
        {torch.bfloat16}, {torch.bfloat16}, {torch.float32},
    ]  # fmt: skip
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())
    images = pictures(2, 3, 24, 24).requires_grad_()
    exact = rewards.ImageReward(folders / "blip")(images, PROMPTS[:2])["imagereward"]
    got = reward(images, PROMPTS[:2])["imagereward"]
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, exact, rtol=0, atol=0.3)


def test_videos_score_the_mean_of_spaced_frames(folders):
    videos, prompts = pictures(2, 5, 3, 24, 24), PROMPTS[:2]
    for make in (
        lambda frames: rewards.ClipScore(folders / "clip", frames=frames),
        lambda frames: rewards.ImageReward(folders / "blip", frames=frames),
        lambda frames: rewards.JpegCompressibility(frames=frames),
    ):
        alone = [next(iter(make(None)(videos[:, i], prompts).values())) for i in range(5)]
        for frames, chosen in ((1, [2]), (2, [1, 3]), (5, range(5))):
            (got,) = make(frames)(videos, prompts).values()
            torch.testing.assert_close(got, torch.stack([alone[i] for i in chosen]).mean(0))


@pytest.mark.parametrize(
    ("shape", "frames", "message"),
    [
        ((2, 5, 3, 8, 8), None, r"frames must be in 1..5 for videos of 5 frames, got None"),
        ((2, 5, 3, 8, 8), 6, r"frames must be in 1..5 for videos of 5 frames, got 6"),
        ((2, 3, 8, 8), 2, "frames must be None for images, got 2"),
        ((2, 1, 8, 8), None, r"images must be \(N, 3, H, W\), or videos .*got \(2, 1, 8, 8\)"),
    ],
)
def test_shapes_that_are_neither(shape, frames, message):
    with pytest.raises(ValueError, match=message):
        rewards.JpegCompressibility(frames=frames)(torch.zeros(shape), ["a", "b"])


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"images must be floats in \[0, 1\], got torch.uint8"):
        rewards.JpegCompressibility()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])


def test_jpeg_is_pillows_size():
    Image = pytest.importorskip("PIL.Image")
    images = pictures(3, 3, 40, 56)
    sizes = []
    for pixels in pil(images):
        Image.fromarray(pixels).save(file := io.BytesIO(), format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    small = rewards.JpegCompressibility()(images, ["a"] * 3)
    large = rewards.JpegCompressibility(incompressibility=True)(images, ["a"] * 3)
    assert small["jpeg"].tolist() == pytest.approx([-size for size in sizes], rel=1e-6)
    assert large["jpeg_incompressibility"].tolist() == pytest.approx(sizes, rel=1e-6)
    assert len(set(sizes)) == 3


def test_rewards_are_named_and_weighted_by_component():
    def two(images, prompts):
        return {"a": images.mean(1), "b": images.amax(1)}

    def one(images, prompts):
        return {"inner": images.sum(1)}

    images = torch.rand(4, 6, generator=seeded())
    both = rewards.Rewards({"x": two, "y": one})
    scores = rewards.score(both, images, ["p"] * 4)
    assert scores.names == ("x/a", "x/b", "y")
    weights = rewards.component_weights(scores.names, {"y": 0.5, "x/a": 2.0, "x/b": 0.0})
    total = 2.0 * images.mean(1) + 0.5 * images.sum(1)
    assert scores.values @ weights == pytest.approx(total.double().numpy(), rel=1e-6)


def test_rewards_refuse_what_they_cannot_name():
    for wrong in ({}, {"a/b": len}):
        with pytest.raises(ValueError, match="rewards must have names without '/', got"):
            rewards.Rewards(wrong)
    with pytest.raises(TypeError, match="Rewards: x must return a mapping of components, got Tens"):
        rewards.Rewards({"x": lambda images, prompts: torch.zeros(1)})(torch.zeros(1), ["a"])


def test_rewards_by_name(folders):
    images, prompts = pictures(2, 3, 24, 24), PROMPTS[:2]
    clip, blip = folders / "clip", folders / "blip"
    specs = [f"hpsv2={clip}", f"clip={clip},processor={clip},device=cpu", "jpeg"]
    reward = rewards.build([*specs, f"imagereward={blip}", f"pickscore={clip}"], batch=1)
    got = reward(images, prompts)
    assert list(got) == ["hps", "clip", "jpeg", "imagereward", "pickscore"]
    torch.testing.assert_close(got["clip"], 100 * got["hps"])
    alone = rewards.build("jpeg_incompressibility")
    assert torch.equal(alone(images, prompts)["jpeg_incompressibility"], -got["jpeg"])


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ("hps=x", ValueError, "name must be one of clip, pickscore, hpsv2, .* got 'hps'"),
        ("clip", ValueError, "spec must read 'clip=...', got 'clip'"),
        ("jpeg=95", ValueError, "spec must read 'jpeg', got 'jpeg=95'"),
        (
            "clip=a/b,batch=2",
            ValueError,
            "options of clip must be processor, device, got 'batch=2'",
        ),
        ("jpeg,x=1", ValueError, "options of jpeg must be none, got 'x=1'"),
        ([], ValueError, "specs must name one reward or more, each once"),
        (["jpeg", "jpeg"], ValueError, r"each once, got \['jpeg', 'jpeg'\]"),
        ("pickscore=/no/where", OSError, "pickscore: path must be a folder or .* got /no/where"),
        ("clip=EMPTY", OSError, r"EMPTY must hold config.json, got none"),
        ("imagereward=CLIP", OSError, "CLIP must hold model.safetensors, got none"),
        ("clip=CLIP", OSError, "must hold model.safetensors or model.safetensors.index.json, got"),
        ("clip=WHOLE,processor=EMPTY", OSError, "must hold preprocessor_config.json or proc.*none"),
        ("hpsv2=PT", OSError, "got the file .*HPS_v2.1.pt; try converting the checkpoint"),
        ("subprocess=scorer", ValueError, "factory must be 'module:function' or .*got 'scorer'"),
        ("subprocess=no.py:make", OSError, "factory must be in a file, got no.py"),
        ("subprocess=a:b,python=/no/py", OSError, "python must be a program, got /no/py"),
        (
            "subprocess=a:b,timeout=soon",
            ValueError,
            "timeout of subprocess must be a number",
        ),
        ("subprocess=a:b,retries=2", ValueError, "must be python, timeout, name, got 'retries=2'"),
        ("http://", ValueError, "url must be http://host"),
        ("http://h/x,timeout=0", ValueError, "timeout_s must be positive and finite, got 0.0"),
        ("http://h/x,dtype=bf16", ValueError, "dtype must be one of float32, uint8, got 'bf16'"),
        (
            ["http://h/a", "http://h/b"],
            ValueError,
            "each once, got .*http', 'http'",
        ),
    ],
)
def test_wrong_names_are_told_before_anything_is_loaded(
    folders, tmp_path, monkeypatch, specs, error, message
):
    monkeypatch.setattr(rewards.clip, "load_weights", lambda *_: pytest.fail("loaded"))
    for name in ("EMPTY", "CLIP"):
        (tmp_path / name).mkdir()
    (tmp_path / "CLIP" / "config.json").write_text("{}")
    (tmp_path / "PT").mkdir()
    (tmp_path / "PT" / "HPS_v2.1.pt").write_bytes(b"")
    places = {"EMPTY": tmp_path / "EMPTY", "CLIP": tmp_path / "CLIP", "WHOLE": folders / "clip"}
    places["PT"] = tmp_path / "PT" / "HPS_v2.1.pt"
    given = [specs] if isinstance(specs, str) else specs
    for word, path in places.items():
        given = [spec.replace(f"={word}", f"={path}") for spec in given]
    whole = [] if error is ValueError or "hpsv2" in given[0] else [f"hpsv2={folders / 'clip'}"]
    with pytest.raises(error, match=message):
        rewards.build([*whole, *given])


def test_weights_of_another_model_are_told(folders, tmp_path):
    for name in ("clip", "blip"):
        shutil.copytree(folders / name, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        gone = "visual_projection.weight" if name == "clip" else "mlp.layers.4.bias"
        del weights[gone]
        save_file(weights, tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"fit for 1, such as visual_projection.weight"):
        rewards.HPSv2(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"must hold mlp.layers.4.bias of shape \(64,\), got none"):
        rewards.ImageReward(tmp_path / "blip")
    save_file({**weights, gone: torch.zeros(64), "bert.x": torch.zeros(1)},
              tmp_path / "blip" / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"got 1 other tensors, such as bert.x"):
        rewards.ImageReward(tmp_path / "blip")
    (tmp_path / "blip" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(OSError, match=r"model.safetensors must be whole, got"):
        rewards.ImageReward(tmp_path / "blip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(OSError, match=r"HPSv2: .*clip must hold weights, got"):
        rewards.HPSv2(tmp_path / "clip")
