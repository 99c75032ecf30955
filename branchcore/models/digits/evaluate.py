"""Evaluation of a digits model: fixed prompts, fixed held-out noise, Euler sampling.

A picture is right if its z-scores (features.py) lie where the prompt asks for: ink below -0.5 for
thin and above 0.5 for bold; lean below -0.5, within 0.5, above 0.5 for the three slants. All of
this and the judge can look perfect while the reward is being hacked; diversity and the distance to
the nearest real digit tell.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from branchcore.models.digits.classifier import classify
from branchcore.models.digits.dataset import load_real_digits
from branchcore.models.digits.features import z_scores
from branchcore.models.digits.model import LATENT_SHAPE, Digits
from branchcore.models.digits.prompts import PROMPTS, prompt_indices
from branchcore.models.digits.rewards import COMPONENT_WEIGHTS, DigitsReward
from branchcore.models.digits.weights import DigitsWeights, shipped_weights
from branchcore.noise import LATENT, NO_STREAM, Noise
from branchcore.ops.philox_normal import philox_normal

HELD_OUT_SEED = 4_000_000_000
SIDE = 0.5
MAX_BATCH = 256


class Evaluation(NamedTuple):
    """Means over all pictures."""

    both_right: float
    stroke_right: float
    slant_right: float
    judge_accuracy: float  # by a classifier that no reward and no generator gradient has seen
    diversity: float  # pixel standard deviation over the noises of a prompt; NaN for one noise
    nearest_real: float  # Euclidean distance to the nearest real digit
    reward: float  # sum of the components with COMPONENT_WEIGHTS
    legibility: float
    stroke: float
    slant: float


def is_right(z: Tensor, stroke_slant_digit: Tensor) -> Tensor:
    """Compare z-scores (L, 2) with prompt indices (L, 3); returns (L, 2) bool, stroke and slant."""
    ink, lean = z.unbind(1)
    stroke, slant, _ = stroke_slant_digit.unbind(1)
    stroke_seen = torch.where(ink < -SIDE, 0, torch.where(ink > SIDE, 1, -1))
    slant_seen = torch.where(lean < -SIDE, 0, torch.where(lean > SIDE, 2, 1))
    return torch.stack([stroke_seen == stroke, slant_seen == slant], 1)


@torch.no_grad()
def sample(
    model: Digits,
    prompts: Sequence[str] = PROMPTS,
    *,
    num_noises: int = 8,
    seed: int = HELD_OUT_SEED,
    num_steps: int = 10,
) -> Tensor:
    """Sample with Euler steps on sigma = 1, ..., 0 (linear).

    Args:
        model: the model.
        prompts: P prompts.
        num_noises: K pictures per prompt.
        seed: the k-th noise of a prompt is a function of (seed, prompt, k).
        num_steps: model evaluations per picture.

    Returns:
        (P, K, 8, 8) images.
    """
    view = model.with_prompts(prompts)
    x = root_noise(prompts, num_noises, seed).to(model.words)
    prompt = torch.arange(len(prompts), device=x.device).repeat_interleave(num_noises)
    for step in range(num_steps):
        sigma = torch.full_like(x[:, 0, 0, 0], 1 - step / num_steps)
        chunks = zip(
            x.split(MAX_BATCH), sigma.split(MAX_BATCH), prompt.split(MAX_BATCH), strict=True
        )
        x = x - torch.cat([view.velocity(*chunk) for chunk in chunks]) / num_steps
    return model.decode(x).unflatten(0, (len(prompts), num_noises))


def root_noise(prompts: Sequence[str], num_noises: int, seed: int) -> Tensor:
    """Draw the noise (P * K, 1, 8, 8) fp32 that `sample` starts from; grouped by prompt."""
    uid = torch.tensor([PROMPTS.index(prompt) for prompt in prompts]).repeat_interleave(num_noises)
    own = torch.arange(num_noises).repeat(len(prompts))
    counter = torch.stack([own, torch.full_like(own, NO_STREAM), uid], 1).int()
    mix = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(len(own), 1)
    noise = Noise(torch.tensor([seed, 0, LATENT]), counter, mix)
    return philox_normal(noise, 64).view(-1, *LATENT_SHAPE)


def score(
    images: Tensor, prompts: Sequence[str], weights: DigitsWeights | None = None
) -> Evaluation:
    """Evaluate images (P, K, 8, 8) of P prompts; `weights` default to those of the package."""
    weights = weights or shipped_weights()
    num_noises = images.shape[1]
    images = images.float().clamp(-1, 1).cpu()
    diversity = images.std(1).mean() if num_noises > 1 else torch.tensor(torch.nan)
    images = images.flatten(0, 1)
    prompts = [prompt for prompt in prompts for _ in range(num_noises)]
    indices = prompt_indices(prompts)
    digit = indices[:, 2]
    correct = is_right(z_scores(images, digit, weights.statistics), indices)
    judged = classify(weights.judge, images).argmax(1)
    distance = torch.cdist(images.flatten(1), load_real_digits().images.flatten(1))
    components = {
        name: r.mean().item() for name, r in DigitsReward(weights=weights)(images, prompts).items()
    }
    return Evaluation(
        both_right=correct.all(1).float().mean().item(),
        stroke_right=correct[:, 0].float().mean().item(),
        slant_right=correct[:, 1].float().mean().item(),
        judge_accuracy=(judged == digit).float().mean().item(),
        diversity=diversity.item(),
        nearest_real=distance.min(1).values.mean().item(),
        reward=sum(COMPONENT_WEIGHTS[name] * mean for name, mean in components.items()),
        **components,
    )


def evaluate(
    model: Digits,
    prompts: Sequence[str] = PROMPTS,
    *,
    num_noises: int = 8,
    seed: int = HELD_OUT_SEED,
    num_steps: int = 10,
) -> Evaluation:
    """Sample and score: by default 60 prompts x 8 noises in 10 steps, the sampler of training."""
    images = sample(model, prompts, num_noises=num_noises, seed=seed, num_steps=num_steps)
    return score(images, prompts)
