"""Published shapes and the census: the numbers of the releases, and what sharing saves."""

import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from branchcore.models.sizing import census, shapes
from branchcore.models.sizing.shapes import SHAPES, Shape

PUBLISHED = {"sd35m-512": 2.22, "flux-512": 21.5, "qwen-512": 16.7, "wan-240p33": 11.5}
PUBLISHED |= {"sana-1024": 2.97}
COMMITTED = Path(__file__).resolve().parent.parent / "bench" / "results" / "census.json"
LARGER = {"sd35m-1024": 11.25, "flux-1024": 74.4, "qwen-1024": 70.6, "wan-480p81": 283.0}


@functools.cache
def counted(name):
    return census.census(SHAPES[name])


def blocks(shape, **options):
    """A shape with other arguments of its transformer."""
    architecture = shape.architecture
    transformer = {**architecture.transformer, **options}
    return shape._replace(architecture=architecture._replace(transformer=transformer))


def rounding(number):
    """Returns half of the last digit of a number with three of them, or with two decimals."""
    return 0.005 if number < 12 and number != 11.5 else 0.05 if number < 100 else 0.5


def check(name, tera):
    shape = SHAPES[name]
    assert abs(counted(name).tera_per_row - tera) <= 0.005 * tera + rounding(tera)
    billions = shape.architecture.parameters
    assert abs(counted(name).parameters / 1e9 - billions) <= 0.005 * billions + rounding(billions)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_work_and_the_parameters_of_the_releases(name):
    check(name, PUBLISHED[name])


def test_committed_counts_are_theirs_at_larger_sizes_too():
    rows = json.loads(COMMITTED.read_text())["rows"]
    found = {row["shape"]: row["tera_per_row"] for row in rows}
    assert found.keys() == SHAPES.keys()
    for name, tera in (PUBLISHED | LARGER).items():
        assert abs(found[name] - tera) <= 0.005 * tera + rounding(tera)
    assert found["sana-1024"] == counted("sana-1024").tera_per_row


def test_parts_are_those_of_a_count_by_hand():
    """SD3.5-medium at 512 pixels: 24 blocks of width 1536, 1024 + 205 tokens, 13 of them dual."""
    width, image, text = 1536, 1024, 205
    both = image + text
    parts = counted("sd35m-512").parts
    scores = 24 * 4 * both**2 * width + 13 * 4 * image**2 * width
    assert parts["attention"] == scores
    last = 2 * 8 * text * width**2
    assert parts["MLP"] == 24 * 2 * 8 * both * width**2 - last
    # the last block's text stream has no output projection
    assert parts["projections"] == (24 * 8 * both - 2 * text + 13 * 8 * image) * width**2


def test_sharing_saves_what_depends_on_the_prompt_alone():
    shape = blocks(SHAPES["sana-1024"], num_layers=2)
    plain, shared = census.saved(shape, 16)
    one = census.census(shape)
    assert plain.total == 16 * one.total
    assert shared.parts["text K/V"] == one.parts["text K/V"] > 0
    for part in ("attention", "MLP", "projections"):
        assert shared.parts[part] == plain.parts[part]
    assert 0.03 < 1 - shared.total / plain.total < 0.06
    half = census.saved(shape, 16, prompts=2)[1]
    assert half.parts["text K/V"] == 2 * one.parts["text K/V"]


def test_impossible_spread_is_refused():
    with pytest.raises(ValueError, match=r"prompts and levels must be in \[1, 2\], got 3, 1"):
        census.saved(SHAPES["sana-1024"], 2, prompts=3)


def test_decoders_are_those_of_the_releases():
    assert census.decode_tera(SHAPES["sd35m-512"]) == pytest.approx(2.51, abs=0.005)
    assert census.decode_tera(SHAPES["sana-1024"]) == pytest.approx(8.4, abs=0.05)


SMALL = {
    "sd35m-512": {"num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 8},
    "flux-512": {"num_single_layers": 1, "num_attention_heads": 1},
    "wan-240p33": {"num_attention_heads": 1, "ffn_dim": 64},
    "qwen-512": {"num_attention_heads": 1},
    "sana-1024": {
        "num_attention_heads": 2, "num_cross_attention_heads": 1, "cross_attention_head_dim": 64,
        "cross_attention_dim": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_give_velocities_of_size_one_that_know_prompt_and_level(name):
    published = SHAPES[name]
    size = published.size._replace(height=64, width=64, frames=min(published.size.frames, 5))
    shape = Shape(blocks(published, num_layers=2, **SMALL[name]).architecture, size, 8)
    module, again = (shapes.build(shape, "cpu", torch.float32) for _ in range(2))
    weights = zip(module.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.count_nonzero() > 0 for a, b in weights)
    family, latent = shapes.family_of(shape), shapes.flow_model(shape).latent_shape
    prompt = torch.tensor([0, 1, 0])
    text = {k: v[prompt] for k, v in shapes.inputs(shape, 2, "cpu", torch.float32).items()}
    x = family.pack(torch.randn(latent).expand(3, *latent))
    v = family.predict(module, x, torch.tensor([0.9, 0.9, 0.3]), text, latent)
    assert v.isfinite().all()
    assert 0.02 < v.std() < 50
    for other in (1, 2):
        assert (v[0] - v[other]).std() > 1e-3 * v.std()
