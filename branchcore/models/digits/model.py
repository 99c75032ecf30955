"""The digits model: a small diffusers SD3 transformer behind the `Model` protocol.

The velocity is v = eps - x0 at x_sigma = (1 - sigma) x0 + sigma eps; the transformer's timestep is
1000 sigma. A prompt is four word embeddings, pooled = 2 * their mean. Letters: P prompts, N rows.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchcore.models.digits.prompts import prompt_indices, word_indices
from branchcore.models.digits.weights import (
    DigitsWeights,
    load_state,
    read_tensors,
    shipped_weights,
)

LATENT_SHAPE = (1, 8, 8)
TRANSFORMER_CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 4,
}


def build_transformer(config: dict[str, Any]) -> nn.Module:
    """Build the transformer with random weights.

    Raises:
        RuntimeError: diffusers is not installed.
    """
    try:
        from diffusers import SD3Transformer2DModel  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise RuntimeError(
            "build_transformer: diffusers must be installed, got none; "
            "try pip install 'branchcore[demo]'"
        ) from error
    return SD3Transformer2DModel(**config)


def transformer_velocity(
    transformer: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor
) -> Tensor:
    """Evaluate the transformer at x (N, 1, 8, 8), sigma (N,), text (N, 4, 32), pooled (N, 32)."""
    return transformer(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=1000 * sigma,
        return_dict=False,
    )[0]


def embed_words(words: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Look up words (16, 32) by indices (P, 4); returns text (P, 4, 32) and pooled (P, 32)."""
    text = words[indices]
    return text, 2 * text.mean(1)


class Digits:
    """The `Model` of the digits task.

    Args:
        module: the transformer that is trained.
        base: the transformer that `reference_velocity` evaluates; it is frozen here.
        words: (16, 32), embedding of each of prompts.WORDS.
    """

    latent_shape: tuple[int, ...] = LATENT_SHAPE

    def __init__(self, module: nn.Module, base: nn.Module, words: Tensor) -> None:
        self.module = module
        self.base = base.eval().requires_grad_(False)
        self.words = words

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> "Digits":
        """Move everything to a device or a float dtype (float64 for exactness); returns self."""
        self.module.to(device_or_dtype)
        self.base.to(device_or_dtype)
        self.words = self.words.to(device_or_dtype)
        return self

    def with_prompts(self, prompts: Sequence[str]) -> "PromptedDigits":
        """Return a view of this model whose `prompt` arguments index these prompts.

        Raises:
            ValueError: A prompt is not a sentence of the grammar.
        """
        indices = word_indices(prompt_indices(prompts)).to(self.words.device)
        return PromptedDigits(self, *embed_words(self.words, indices))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (L, 8, 8) of latents (L, 1, 8, 8), unclipped; 1 = ink, -1 = paper."""
        return latents.squeeze(1)


class PromptedDigits:
    """The `VelocityModel` of a digits model and a list of prompts; shares the model's weights."""

    latent_shape: tuple[int, ...] = LATENT_SHAPE

    def __init__(self, model: Digits, text: Tensor, pooled: Tensor) -> None:
        self.model = model
        self.text = text
        self.pooled = pooled

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Return the velocity (N, 1, 8, 8) at x (N, 1, 8, 8), sigma (N,), prompt (N,) int64."""
        return transformer_velocity(
            self.model.module, x, sigma, self.text[prompt], self.pooled[prompt]
        )

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Return the velocity of the frozen base model; arguments as of `velocity`."""
        return transformer_velocity(
            self.model.base, x, sigma, self.text[prompt], self.pooled[prompt]
        )


def load_digits_model(path: str | Path | None = None) -> Digits:
    """Load the digits model.

    Args:
        path: safetensors file, state of a trained `Digits.module`; None = the pretrained one.

    Returns:
        The model in float32 on the CPU; its reference is the pretrained generator in either case.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or does not fit the transformer.
    """
    model = digits_model(shipped_weights())
    if path is not None:
        load_state(model.module, read_tensors(Path(path))[0], Path(path))
    return model


def digits_model(weights: DigitsWeights) -> Digits:
    """Build the model whose module and reference both are the generator of `weights`."""
    base = build_transformer(weights.config)
    load_state(base, weights.generator, "the generator of the digits weights")
    return Digits(copy.deepcopy(base), base, weights.words)
