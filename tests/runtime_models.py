"""Tiny models for the tests of `models.runtime`, and rows of mixed prompts and levels."""

import torch
from tiny_pipelines import Tiny

PROMPTS = ["a red cat", "a thin blue dog of the house", "a"]
FAMILIES = ["sd3", "flux", "qwen_image", "wan", "sana"]
MIXED = ([0.3, 0.3, 0.8, 0.8], [1, 1, 1, 0])


def loader(tiny_folder):
    """Returns a function: name of a family and options -> its tiny model."""

    def load(name="sd3", **options):
        return Tiny(name, tiny_folder(name)).load(**options)

    return load


def rows(model, sigma=MIXED[0], prompt=MIXED[1], seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(sigma), *model.latent_shape, generator=generator, dtype=torch.float64)
    return x.to(model.dtype), torch.tensor(sigma, dtype=model.dtype), torch.tensor(prompt)


def close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
