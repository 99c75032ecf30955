"""Noise levels as diffusers' pipelines make them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from branchcore.credit import Floats


def scheduler_sigmas(scheduler: Any) -> Floats:
    """Returns a scheduler's sigmas in float64, with the last 0."""
    sigmas = np.asarray(scheduler.sigmas.double().cpu())
    return sigmas if sigmas[-1] == 0.0 else np.append(sigmas, 0.0)


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


def flow_sigmas(family: str, scheduler: Any, steps: int) -> Floats:
    """Returns the (steps + 1,) levels of a flow-matching scheduler, Euler's or a multistep one's.

    Multistep schedulers (UniPC, DPM-Solver++) take the pure noise that they start from to be
    0.03 % or less below level 1; their first level becomes 1.

    Args:
        family: named in the error.
        scheduler: with the configuration that the pipeline was released with.
        steps: number of sampling steps.

    Raises:
        ValueError: the scheduler's levels are not those of flow matching.
    """
    scheduler.set_timesteps(steps)
    sigmas = scheduler_sigmas(scheduler)
    if not 0.99 < sigmas[0] <= 1.0:
        raise ValueError(
            f"{family}: scheduler must start at sigma 1, got {sigmas[0]:.4g} from "
            f"{type(scheduler).__name__}; try use_flow_sigmas=True in its configuration"
        )
    sigmas[0] = 1.0
    return sigmas


def timestep_of(sigma: Tensor, whole: bool) -> Tensor:
    """Returns 1000 sigma, what transformers are told of the noise level.

    Args:
        sigma: (N,) noise levels.
        whole: round down to 0..999, as schedulers with integer timesteps do.
    """
    return (1000 * sigma).floor().clamp(max=999) if whole else 1000 * sigma


def even_sigmas(scheduler: Any, steps: int, tokens: int) -> Floats:
    """Returns (steps + 1,) float64 levels: 1 to 1/steps evenly, then the scheduler's shift, then 0.

    Args:
        scheduler: shifts by `shift_of` or by its constant, as its configuration says.
        steps: T.
        tokens: image tokens.

    Source: diffusers' pipelines of FLUX and Qwen-Image.
    """
    even = np.linspace(1.0, 1.0 / steps, steps)
    scheduler.set_timesteps(sigmas=even, mu=shift_of(scheduler, tokens))
    return scheduler_sigmas(scheduler)
