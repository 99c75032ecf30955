"""Settings of the foreign trainers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    model: str
    prompts: tuple[str, ...]
    out: str
    size: tuple[int, int] = (16, 32)
    tokens: int = 24
    steps: int = 10
    guidance: float = 4.5
    noise_level: float = 0.7
    group: int = 8
    prompts_per_epoch: int = 2
    batch: int = 8
    updates: int = 1
    epochs: int = 2
    kl: float = 0.04
    clip: float = 1e-4
    max_advantage: float = 5.0
    rank: int = 4
    lr: float = 3e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    save_every: int = 10
    seed: int = 0
    dtype: torch.dtype = torch.float32
