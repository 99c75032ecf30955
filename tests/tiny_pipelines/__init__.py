"""Tiny diffusers pipelines with random weights: real classes, real tokenizers, no download.

A file of this folder with a function `build` is one; `tests/test_families.py` finds and tests it.

    build(folder)      writes the pipeline
    call(guidance)     the plain pipeline's arguments for a guidance scale and for OPTIONS
    SIZE               height, width, of a video num_frames: for both ways to load it
    OPTIONS            other arguments of `from_pretrained`, max_text_tokens at least
    FAMILY             module of branchcore.models; the file's own name where left out
    GUIDANCES          scales that are tested; (1.0, 3.0) where left out
"""

import importlib
from functools import cached_property
from pathlib import Path

import torch

HERE = Path(__file__).parent
NEGATIVE = "blue"


def names():
    """Returns the pipelines' names; imports none of them, as diffusers may be missing."""
    files = sorted(HERE.glob("*.py"))
    return [file.stem for file in files if "\ndef build(" in file.read_text()]


class Tiny:
    """One tiny pipeline on disk, and both ways to load it."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.spec = importlib.import_module(f"tiny_pipelines.{name}")
        self.guidances = getattr(self.spec, "GUIDANCES", (1.0, 3.0))

    def load(self, folder=None, **options):
        """Loads it by the family's `from_pretrained`, fp32 and without guidance by default."""
        family = importlib.import_module(
            f"branchcore.models.{getattr(self.spec, 'FAMILY', self.name)}"
        )
        default = {"guidance": 1.0, "negative_prompt": NEGATIVE, "dtype": torch.float32}
        options = default | self.spec.SIZE | self.spec.OPTIONS | options
        return family.from_pretrained(folder or self.folder, **options)

    @cached_property
    def plain(self):
        """The pipeline as diffusers loads it, in fp32."""
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(self.folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, model, prompts, x, guidance, steps, pipe=None):
        """Samples by diffusers alone; `pipe` replaces `plain`.

        Returns:
            States and guided predictions of every step, (steps, L, *latent_shape), and the images.
        """
        pipe, seen = pipe or self.plain, []
        step = type(pipe.scheduler).step.__get__(pipe.scheduler)

        def recorded(prediction, time, sample, *args, **kwargs):
            seen.append((sample, prediction))
            return step(prediction, time, sample, *args, **kwargs)

        pipe.scheduler.step = recorded
        images = pipe(
            prompt=prompts, negative_prompt=[NEGATIVE] * len(prompts) if guidance > 1 else None,
            latents=model.family.pack(x), num_inference_steps=steps, output_type="pt",
            return_dict=False, **self.spec.SIZE, **self.spec.call(guidance),
        )[0]  # fmt: skip
        unpack = [[model.family.unpack(t, model.latent_shape) for t in pair] for pair in seen]
        return *(torch.stack(parts) for parts in zip(*unpack, strict=True)), images
