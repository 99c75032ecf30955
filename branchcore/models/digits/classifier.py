"""A small convolutional classifier of digits: one instance gives the reward, another one judges."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build_classifier() -> nn.Sequential:
    """Build an untrained classifier of images (L, 1, 8, 8) into logits (L, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


def frozen_classifier() -> nn.Sequential:
    """Build an untrained classifier in evaluation mode, without gradients, to load weights into."""
    return build_classifier().eval().requires_grad_(False)


def train_classifier(
    images: Tensor, labels: Tensor, seed: int, num_epochs: int = 40
) -> nn.Sequential:
    """Train a classifier: AdamW with cosine decay, input noise 0.1, label smoothing 0.05.

    Args:
        images: (L, 8, 8) fp32, pixels in [-1, 1].
        labels: (L,) int64, digits.
        seed: of initialisation, dropout, order and noise; sets torch's global generator.
        num_epochs: passes over the images.

    Returns:
        The classifier in evaluation mode.
    """
    torch.manual_seed(seed)
    classifier = build_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    num_steps = num_epochs * (len(images) // 64)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(images))[: len(images) // 64 * 64].view(-1, 64):
            noisy = images[rows] + 0.1 * torch.randn(64, 8, 8)
            logits = classifier(noisy[:, None])
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def classify(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return log-probabilities (L, 10) fp32 of images (L, 8, 8), clipped to [-1, 1]."""
    return classifier(images.float().clamp(-1, 1)[:, None]).log_softmax(1)
