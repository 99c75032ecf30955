"""Model calls that change nothing, so that all processes make equally many."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from branchcore.model import VelocityModel, call_velocity


def idle_calls(
    model: VelocityModel, count: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Makes forwards of one row without a gradient.

    Args:
        model: with at least one prompt.
        count: of calls.
        device: where the model lives.
        dtype: of the states.
    """
    with torch.no_grad():
        for _ in range(count):
            _call(model, device, dtype)


def idle_passes(
    model: VelocityModel,
    count: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    reference: bool = False,
) -> None:
    """Makes forwards and backwards of one row whose gradient is zero.

    Args:
        model: with at least one prompt.
        count: of passes.
        device: where the model lives.
        dtype: of the states.
        reference: each pass has a forward of the reference policy too, as a KL asks for.
    """
    for _ in range(count):
        v = _call(model, device, dtype)
        if reference:
            with torch.no_grad():
                _call(model, device, dtype, reference=True)
        (0.0 * v).sum().backward()


def _call(
    model: VelocityModel, device: torch.device, dtype: torch.dtype, *, reference: bool = False
) -> Tensor:
    x = torch.zeros(1, math.prod(model.latent_shape), device=device, dtype=dtype)
    sigma, prompt = x.new_full((1,), 0.5), torch.zeros(1, dtype=torch.int64, device=device)
    host = np.array([0.5]), np.array([0])
    return call_velocity(model, x, sigma, prompt, reference=reference, host=host)
