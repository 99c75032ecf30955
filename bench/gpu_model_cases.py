"""The timed cases of the model ops on a GPU: transformer sites and the norms of a VAE decoder.

Sizes are those of SD3.5-M at 512 px, FLUX at 1024 px and Wan 1.3B at 480p with 81 frames, and of
the SD3 and FLUX autoencoder at 512 and 1024 px. Backward cases run on one forward, made before.
Letters: B samples, S tokens, C channels, H heads, D channels of a head, R modulation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from gpu_cases import Case, Wrap
from gpu_timing import Call, Make
from torch import Tensor
from torch.nn import functional as F

from branchcore import ops

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-6
ROWS = 2
"""Modulation rows of a batch: nodes at the same noise level share theirs."""


class Model(NamedTuple):
    """One transformer: tokens of a sample, channels, heads, and how its queries are normed."""

    tokens: int
    channels: int
    heads: int
    across: bool
    rope: bool


MODELS = {
    "wan-480p": Model(32_760, 1536, 12, across=True, rope=True),
    "sd35-512": Model(1024 + 205, 1536, 24, across=False, rope=False),
    "flux-1024": Model(4096 + 512, 3072, 24, across=False, rope=True),
}
TINY = {
    name: MODELS[name]._replace(tokens=6, channels=24, heads=2) for name in ("wan-480p", "sd35-512")
}
DECODERS = {
    "vae-512": (8, ((256, 256), (128, 512), (512, 128), (512, 64))),
    "vae-1024": (2, ((128, 1024), (256, 512))),
}
"""Images, and (channels, side) of the norms that a decoder spends its time in."""
TINY_DECODERS = {"vae-512": (2, ((32, 4),))}
SAMPLES = 8

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]


def model_cases(device: torch.device) -> Iterator[Case]:
    """Yields the cases of all model ops."""
    on_gpu = device.type == "cuda"
    samples = SAMPLES if on_gpu else 2
    for size, model in (MODELS if on_gpu else TINY).items():
        for direction in ("forward", "backward"):
            yield _gate_norm_modulate(size, model, samples, direction, device)
            yield _qk_norm_rope(size, model, samples, direction, device)
    for size, (images, norms) in (DECODERS if on_gpu else TINY_DECODERS).items():
        for channels, side in norms:
            yield _group_norm_silu(size, images, channels, side, "forward", device)
    # nobody trains a decoder: one backward is enough
    images, ((channels, side), *_) = (DECODERS if on_gpu else TINY_DECODERS)["vae-512"]
    yield _group_norm_silu("vae-512", images, channels, side, "backward", device)


def _randn(device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return (mean + scale * drawn).to(BF16)

    return draw


def _make(function: Function, inputs: Callable[[int], Tensors], direction: str) -> Make:
    """Calls a function of tensors, or the backward of its results in all of its inputs."""

    def forward(i: int) -> Call:
        def run() -> Any:
            with torch.no_grad():
                return function(*inputs(i))

        return run

    def backward(i: int) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs(i)]
        results = function(*leaves)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        draw = _randn(leaves[0].device, seed=1000 + i)
        # in the results' own layout, as the next layer would hand them back
        cotangents = [torch.empty_like(r).copy_(draw(*r.shape)) for r in results]
        return lambda: torch.autograd.grad(results, leaves, cotangents, retain_graph=True)

    return forward if direction == "forward" else backward


def modulated_norm(
    x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, row: Tensor
) -> Tensors:
    """The site as diffusers writes it, each step in the dtype of the states."""
    r = x + gate[row, None] * y
    normed = F.layer_norm(r, r.shape[-1:], eps=EPS)
    return r, normed * (1 + scale[row, None]) + shift[row, None]


def _gate_norm_modulate(
    size: str, model: Model, samples: int, direction: str, device: torch.device
) -> Case:
    shape = (samples, model.tokens, model.channels)
    row = torch.arange(samples, device=device) % ROWS

    @cache
    def inputs(seed: int) -> Tensors:
        draw = _randn(device, seed)
        tables = (draw(ROWS, model.channels, scale=0.2) for _ in range(3))
        return draw(*shape), draw(*shape), *tables

    def site(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Any:
        return ops.gate_norm_modulate(x, scale, shift, row, y_BSC=y, gate_RC=gate, eps=EPS)

    def baseline(wrap: Wrap) -> Make:
        function = wrap(modulated_norm)
        return _make(lambda *given: function(*given, row), inputs, direction)

    num_elements = samples * model.tokens * model.channels
    # x, y, r, out; backward: gradients of r and out, r, y in, those of x and y out
    num_bytes = (8 if direction == "forward" else 12) * num_elements
    return Case(
        op="gate_norm_modulate",
        size=size,
        label=f"{samples}x{model.tokens}x{model.channels} bfloat16",
        direction=direction,
        num_bytes=num_bytes,
        num_normals=0,
        footprint=num_bytes,
        dtype=BF16,
        ours=_make(site, inputs, direction),
        baseline=baseline,
        checked=(("gate_norm_modulate", _gate_options(model)),),
    )


def _gate_options(model: Model) -> dict[str, Any]:
    options = {"counts": (1, 1), "num_elements": model.channels, "dtypes": (BF16, BF16, BF16)}
    return options | {"num_tokens": min(model.tokens, 300)}


def rotated_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *tables: Tensor) -> Any:
    """RMSNorm in the dtype of the states, rotation in fp32, as FluxAttnProcessor has them."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        across = weight.numel() != x.shape[-1]
        flat = x.flatten(2) if across else x
        normed = F.rms_norm(flat, flat.shape[-1:], weight, EPS).view(x.shape)
        if not tables:
            return normed
        cos, sin = (table[:, None] for table in tables)
        a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), dim=-1).flatten(-2)
        return (normed.float() * cos + turned.float() * sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def _qk_norm_rope(
    size: str, model: Model, samples: int, direction: str, device: torch.device
) -> Case:
    num_channels = model.channels // model.heads
    shape = (samples, model.tokens, model.heads, num_channels)
    angle = torch.randn(model.tokens, num_channels // 2, device=device).repeat_interleave(2, 1)
    tables = (angle.cos(), angle.sin()) if model.rope else ()

    @cache
    def inputs(seed: int) -> Tensors:
        draw = _randn(device, seed)
        length = model.channels if model.across else num_channels
        weights = (draw(length, scale=0.2, mean=1.0) for _ in range(2))
        return draw(*shape), draw(*shape), *weights

    def baseline(wrap: Wrap) -> Make:
        function = wrap(rotated_norm)
        return _make(lambda *given: function(*given, *tables), inputs, direction)

    num_elements = samples * model.tokens * model.channels
    # q and k in and out; backward: gradient and state in, gradient out, of both
    num_bytes = (8 if direction == "forward" else 12) * num_elements
    return Case(
        op="qk_norm_rope",
        size=size,
        label=f"{samples}x{model.tokens}x{model.heads}x{num_channels} bfloat16",
        direction=direction,
        num_bytes=num_bytes,
        num_normals=0,
        footprint=num_bytes,
        dtype=BF16,
        ours=_make(lambda *given: ops.qk_norm_rope(*given, *tables, eps=EPS), inputs, direction),
        baseline=baseline,
        checked=(("qk_norm_rope", _qk_options(model)),),
    )


def _qk_options(model: Model) -> dict[str, Any]:
    return {
        "sizes": (2, min(model.tokens, 300)),
        "heads": (model.heads,) * 2,
        "num_channels": model.channels // model.heads,
        "dtypes": (BF16, BF16),
        "across": model.across,
        "rope": model.rope,
    }


def _group_norm_silu(
    size: str, images: int, channels: int, side: int, direction: str, device: torch.device
) -> Case:
    groups = 32
    shape = (images, channels, side, side)

    @cache
    def inputs(seed: int) -> Tensors:
        draw = _randn(device, seed)
        x = draw(*shape).to(memory_format=torch.channels_last)
        return x, draw(channels, scale=0.2, mean=1.0), draw(channels, scale=0.2)

    @cache
    def contiguous(seed: int) -> Tensors:
        x, *rest = inputs(seed)
        # on a GPU torch's own norm wants NCHW, and copies anything else to it first
        return x.contiguous(), *rest

    def baseline(wrap: Wrap) -> Make:
        function = wrap(lambda x, w, b: F.silu(F.group_norm(x, groups, w, b, EPS)))
        return _make(function, contiguous, direction)

    num_elements = images * channels * side**2
    return Case(
        op="group_norm_silu",
        size=size,
        label=f"{images}x{channels}x{side}x{side} bfloat16",
        direction=direction,
        # two passes: read, then read and write; backward: gradient and x twice, dx once
        num_bytes=(6 if direction == "forward" else 10) * num_elements,
        num_normals=0,
        footprint=4 * num_elements,
        dtype=BF16,
        ours=_make(lambda x, w, b: ops.group_norm_silu(x, w, b, groups, EPS), inputs, direction),
        baseline=baseline,
        checked=(("group_norm_silu", _group_options(channels, side)),),
    )


def _group_options(channels: int, side: int) -> dict[str, Any]:
    sizes = (min(side, 32), side)
    options = {"num_images": 1, "sizes": sizes, "num_channels": channels, "num_groups": 32}
    return options | {"dtypes": (BF16, BF16)}
