"""Make the weights that ship with the package, in about two minutes of one CPU core.

    python -m branchcore.models.digits.pretrain --out weights.safetensors

Flow matching on all real digits, conditioned on the digit word; the style words are drawn at
random, so the generator starts without any knowledge of stroke and slant. The reward classifier is
trained on half A of the digits, the judge on half B.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from branchcore.models.digits.classifier import classify, train_classifier
from branchcore.models.digits.dataset import RealDigits, load_real_digits
from branchcore.models.digits.evaluate import sample, score
from branchcore.models.digits.features import class_statistics
from branchcore.models.digits.model import (
    TRANSFORMER_CONFIG,
    build_transformer,
    digits_model,
    embed_words,
    transformer_velocity,
)
from branchcore.models.digits.prompts import PROMPTS, SLANTS, STROKES, WORDS, word_indices
from branchcore.models.digits.weights import DigitsWeights, write_weights

NUM_STEPS, BATCH, LEARNING_RATE, WARM_UP, EMA = 1500, 128, 2e-3, 50, 0.995


def flow_matching_loss(transformer: nn.Module, x0: Tensor, digit: Tensor, words: Tensor) -> Tensor:
    """Mean squared error of the velocity at images x0 (N, 1, 8, 8) of digits (N,)."""
    num = len(x0)
    styles = [torch.randint(len(group), (num,)) for group in (STROKES, SLANTS)]
    text, pooled = embed_words(words, word_indices(torch.stack([*styles, digit], 1)))
    sigma = torch.sigmoid(1.2 * torch.randn(num))
    eps = torch.randn_like(x0)
    x = torch.lerp(x0, eps, sigma[:, None, None, None])
    return F.mse_loss(transformer_velocity(transformer, x, sigma, text, pooled), eps - x0)


def train_generator(real: RealDigits, words: Tensor, num_steps: int, seed: int) -> nn.Module:
    """Train the transformer by flow matching and return its exponential moving average."""
    torch.manual_seed(seed)
    transformer = build_transformer(TRANSFORMER_CONFIG)
    average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    parameters = list(transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, num_steps))
    bar = tqdm(range(num_steps), desc="flow matching")
    for step in bar:
        rows = torch.randint(len(real.images), (BATCH,))
        loss = flow_matching_loss(transformer, real.images[rows, None], real.labels[rows], words)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(transformer)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return average.module


def rate(step: int, num_steps: int) -> float:
    """Return the learning rate factor: linear warm-up, then cosine decay to 2 %."""
    progress = min(1.0, step / num_steps)
    return min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * progress))


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (L, 8, 8) that are recognised."""
    return (classify(classifier, images).argmax(1) == labels).float().mean().item()


def pretrain(num_steps: int = NUM_STEPS, seed: int = 0) -> DigitsWeights:
    """Train the classifiers and the generator."""
    real = load_real_digits()
    halves = [(real.images[half], real.labels[half]) for half in (real.half_a, real.half_b)]
    reward_classifier, judge = (
        train_classifier(*half, seed=seed + index) for index, half in enumerate(halves)
    )
    tqdm.write(
        f"reward classifier on half B: {accuracy(reward_classifier, *halves[1]):.3f}, "
        f"judge on half A: {accuracy(judge, *halves[0]):.3f}"
    )
    words = torch.randn(len(WORDS), 32, generator=torch.Generator().manual_seed(seed))
    generator = train_generator(real, words, num_steps, seed)
    statistics = class_statistics(real.images, real.labels)
    return DigitsWeights(
        generator.state_dict(), reward_classifier, judge, statistics, words, TRANSFORMER_CONFIG
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Make the weights of the digits task.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    weights = pretrain(seed=options.seed)
    write_weights(options.out, weights)
    evaluation = score(sample(digits_model(weights)), PROMPTS, weights)
    for name, value in evaluation._asdict().items():
        tqdm.write(f"{name:>16} {value:.3f}")
    tqdm.write(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
