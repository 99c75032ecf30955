"""Speed of a model on a GPU that is not here: operations and bytes over the data sheet's numbers.

Letters: N rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from branchcore.model import Model, call_velocity
from branchcore.models.sizing.live_bytes import faked
from branchcore.planner.speed import NOTHING, Curve, Speed

REACHED, STREAMED = 0.4, 0.7
"""Shares of the peak and of the memory's bandwidth that runs are assumed to reach."""
LAUNCH = 5e-6
"""Seconds per module of a call, at least."""


class Sheet(NamedTuple):
    """What a GPU is sold with."""

    tflops: float
    """Dense bf16."""
    bandwidth: float
    """Bytes per second of its memory."""
    memory: int
    """Bytes."""
    link: float
    """Bytes per second to other GPUs of its machine, one way."""


GPUS: dict[str, Sheet] = {
    "A100": Sheet(312.0, 2.04e12, 80 * 10**9, 300e9),
    "H100": Sheet(989.4, 3.35e12, 80 * 10**9, 450e9),
    "H200": Sheet(989.4, 4.8e12, 141 * 10**9, 450e9),
    "B200": Sheet(2250.0, 8.0e12, 180 * 10**9, 900e9),
    "L40S": Sheet(362.1, 0.864e12, 48 * 10**9, 32e9),
    "RTX4090": Sheet(165.2, 1.008e12, 24 * 10**9, 32e9),
    "MI300X": Sheet(1307.4, 5.3e12, 192 * 10**9, 448e9),
}
"""Vendors' data sheets: SXM boards, NVLink or Infinity Fabric; L40S and RTX 4090 over PCIe 4.0."""


def sheet_of(name: str) -> Sheet:
    """Returns a GPU's numbers.

    Raises:
        ValueError: an unknown GPU.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu must be from {tuple(GPUS)}, got {name!r}")
    return GPUS[name]


class Flop(NamedTuple):
    """Operations per row or image, a multiply-add being two."""

    forward: float
    backward: float
    decode: float


def count(model: Model, prompt: str) -> Flop:
    """Counts a forward, its backward and a decode on tensors without memory."""
    modules = [m for m in (model.module, getattr(model, "vae", None)) if isinstance(m, nn.Module)]
    device = next(model.module.parameters()).device
    away = device.type == "meta"
    if away:
        model.device = torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        view = model.with_prompts([prompt])
        with faked(modules, torch.device("cpu") if away else device):
            on = next(model.module.parameters()).device
            x = torch.empty(1, int(np.prod(model.latent_shape)), device=on)
            sigma, row = torch.full((1,), 0.5, device=on), torch.zeros(1, dtype=torch.int64)
            host = (np.full(1, 0.5), np.zeros(1, np.int64))
            with FlopCounterMode(display=False) as forward:
                v = call_velocity(view, x, sigma, row.to(on), host=host)
            with FlopCounterMode(display=False) as backward:
                v.backward(torch.empty_like(v))
            latent: Tensor = x.view(1, *model.latent_shape)
            with torch.no_grad(), FlopCounterMode(display=False) as decode:
                model.decode(latent)
    finally:
        if away:
            model.device = device  # pyright: ignore[reportAttributeAccessIssue]
    return Flop(*(float(c.get_total_flops()) for c in (forward, backward, decode)))


def sheet_speed(model: Model, prompt: str, name: str) -> Speed:
    """Returns the speed that a data sheet and two assumed shares of it come to."""
    sheet, flop = sheet_of(name), count(model, prompt)
    weights = sum(p.nbytes for p in model.module.parameters())
    trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    modules = sum(1 for _ in model.module.modules())
    read = weights / (STREAMED * sheet.bandwidth)

    def curve(operations: float, base: float) -> Curve:
        each = operations / (REACHED * sheet.tflops * 1e12)
        sizes: Sequence[int] = [2**i for i in range(10)]
        return Curve(tuple(sizes), tuple(max(base, each * n) for n in sizes))

    least = max(read, modules * LAUNCH)
    return Speed(
        call=curve(flop.forward, least),
        tape_call=curve(flop.forward, least),
        backward=curve(flop.backward, 2 * least),
        decode=curve(flop.decode, LAUNCH),
        reward=NOTHING,
        # weights, gradients and two moments are read, three of them written
        optimizer=7 * 4 * trained / (STREAMED * sheet.bandwidth),
        source=(
            f"Times are not measured: they assume {REACHED:.0%} of the {sheet.tflops:g} TFLOP/s "
            f"that an {name} is sold with, and {STREAMED:.0%} of its memory's bandwidth."
        ),
    )
