"""Standard normals as a function of (seed, iteration, purpose, stream, uid)."""

from typing import Any

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.noise import Noise

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def philox_normal(noise: Noise, num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw the normals that a `Noise` names: root noise, and the specification of all noise.

    Args:
        noise: M draws, mix0 * normal(own stream) + mix1 * normal(shared stream).
        num_elements: D, latent elements of a draw; a prefix of a longer draw is the same numbers.
        dtype: float32, bfloat16 (rounded from float32) or float64 (reference only).

    Returns:
        (M, D) `dtype`.

    Numerics: the same integers on every device and implementation; normals bitwise equal on one
        device, within 1e-6 across CPUs and 4e-6 between a CPU and a GPU.
    Source: Philox4x32-10 of Salmon et al. 2011, then Box-Muller.
    """
    op = "philox_normal"
    _check.noise(op, noise)
    if num_elements < 0:
        raise ValueError(f"{op}: num_elements must be >= 0, got {num_elements}")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be {_check.names(DTYPES)}, got {_check.names((dtype,))}")
    return _forward(*noise, num_elements, dtype)


def _cpp(*inputs: Any) -> Tensor:
    out_MD = _fake(*inputs)
    _dispatch.native().philox_normal(*inputs[:3], out_MD)
    return out_MD


def _cuda(*inputs: Any) -> Tensor:
    out_MD = _fake(*inputs)
    noise = (part.contiguous() for part in inputs[:3])
    _dispatch.cuda().philox_normal(*noise, out_MD, *_dispatch.stream(out_MD))
    return out_MD


def _triton(*inputs: Any) -> Tensor:
    out_MD = _fake(*inputs)
    noise = (part.contiguous() for part in inputs[:3])
    _dispatch.triton_kernels("philox_normal").philox_normal_fwd(*noise, out_MD)
    return out_MD


def _reference(
    key: Tensor, counter_M3: Tensor, mix_M2: Tensor, num_elements: int, dtype: torch.dtype
) -> Tensor:
    return reference.philox_normal(Noise(key, counter_M3, mix_M2), num_elements, dtype)


def _fake(*inputs: Any) -> Tensor:
    key, counter_M3, _, num_elements, dtype = inputs
    return key.new_empty(len(counter_M3), num_elements, dtype=dtype)


_forward = _dispatch.define(
    "philox_normal(Tensor key, Tensor counter, Tensor mix, SymInt num_elements, ScalarType dtype)"
    " -> Tensor",
    {"cuda": _cuda, "triton": _triton, "cpp": _cpp, "reference": _reference},
    _fake,
    lead=lambda *args: (args[0].device, args[4]),
)


def _build(
    num_draws: int, num_elements: int, dtype: torch.dtype, kinds: tuple[str, ...] = testing.KINDS
) -> testing.Inputs:
    noise = testing.draws([1] * num_draws, kinds)
    return {"noise": noise, "num_elements": num_elements, "dtype": dtype}


_OPTIONS = {"num_draws": 7, "num_elements": 2053, "dtype": torch.float32}

SPEC = testing.OpSpec(
    name="philox_normal",
    op=philox_normal,
    reference=reference.philox_normal,
    build=_build,
    cases=(
        testing.Case("every kind of draw, odd size over two tiles", _OPTIONS),
        testing.Case("bfloat16 is rounded from float32", _OPTIONS | {"dtype": torch.bfloat16}),
        testing.Case("one element", _OPTIONS | {"num_elements": 1}),
        testing.Case("less than a vector", _OPTIONS | {"num_elements": 66}),
        testing.Case("no draws", _OPTIONS | {"num_draws": 0}),
        testing.Case("no elements", _OPTIONS | {"num_elements": 0}),
    ),
    num_bytes=lambda inputs: (
        len(inputs["noise"].counter) * inputs["num_elements"] * inputs["dtype"].itemsize
    ),
    results=("out_MD",),
    # sine and cosine to 2^-21: at most 3.3 with errors of that size and the worst signs
    gpu_factor=4.0,
    large={"num_draws": 16, "num_elements": 9001, "dtype": torch.float32},
)
