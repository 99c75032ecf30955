"""Models of tiny pipelines that tests may change, and what tests of their weights ask of them."""

import copy

import torch

PROMPTS = ["a bold cat", "seven dogs on the red house", "blue"]


class Copies:
    """Models of one tiny pipeline, loaded once; each has a transformer of its own."""

    def __init__(self, tiny):
        self.tiny, self.loaded = tiny, {}

    def load(self, dtype=torch.float32):
        if dtype not in self.loaded:
            self.loaded[dtype] = self.tiny.load(dtype=dtype)
            # the encoders' last bits depend on what is encoded together
            self.loaded[dtype].encode(PROMPTS)
            self.loaded[dtype].unshare()
        model = copy.copy(self.loaded[dtype])
        model.pipe = copy.copy(model.pipe)
        model.pipe.transformer = model.module = copy.deepcopy(model.module)
        model.share()
        return model


def velocity(model, reference=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, *model.latent_shape, generator=generator, dtype=dtype)
    sigma, prompt = torch.tensor([0.9, 0.9, 0.4, 0.4], dtype=dtype), torch.tensor([0, 1, 1, 1])
    view = model.with_prompts(PROMPTS[:2])
    with torch.no_grad():
        return (view.reference_velocity if reference else view.velocity)(x, sigma, prompt)


def differ(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def randomise(model, seed=0, scale=0.5):
    """Gives a LoRA weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale / len(parameter) ** 0.5 * noise)
