"""A tiny FLUX.1-schnell pipeline: no embedded guidance, a constant shift."""

from tiny_pipelines import flux

FAMILY = "flux"
SIZE = {"height": 32, "width": 16}
OPTIONS = {"max_text_tokens": 16}


def call(guidance):
    """Returns the plain pipeline's arguments."""
    return {"true_cfg_scale": guidance, "max_sequence_length": 16}


def build(folder):
    """Writes the pipeline into a folder."""
    flux.build(folder, distilled=False, use_dynamic_shifting=False, shift=1.0)
