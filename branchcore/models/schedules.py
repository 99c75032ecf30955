"""Noise levels as diffusers' pipelines make them."""

from __future__ import annotations

from typing import Any


def shift_of(scheduler: Any, tokens: int, *, max_shift: float = 1.15) -> float:
    """Returns mu, the shift of a sequence of `tokens`: linear between two lengths of the config.

    Args:
        scheduler: its configuration has the lengths and shifts.
        tokens: image tokens.
        max_shift: at the larger length where the configuration says nothing.

    Source: FLUX; diffusers' pipelines use the same defaults.
    """
    get = scheduler.config.get
    low, high = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    base, most = get("base_shift", 0.5), get("max_shift", max_shift)
    return base + (most - base) * (tokens - low) / (high - low)
