"""The timed cases of the noise ops on a GPU: ours, eager torch's, and the bytes nobody can avoid.

Sizes are latents of SD3.5 at 512 px, FLUX at 1024 px and Wan at 480p with 81 frames.
Letters: N parents, K children of each, M = N K, D latent elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import eager
import torch
from eager import CLIP
from gpu_timing import Call, Make
from torch import Tensor
from waves import Wave

from branchcore import ops

NUM_ELEMENTS = {"sd35-512": 65_536, "flux-1024": 262_144, "wan-480p": 2_096_640}
TINY = {"sd35-512": 96, "wan-480p": 257}
PARENTS, CHILDREN = 8, 3
BF16, F32 = torch.bfloat16, torch.float32

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Nothing, or torch.compile."""


class Case(NamedTuple):
    """One row per implementation of the result, and what it is compared with."""

    op: str
    size: str
    label: str
    direction: str
    num_bytes: int
    """Read and written once, as far as no implementation avoids it."""
    num_normals: int
    footprint: int
    """Bytes of the inputs and outputs of a call."""
    dtype: torch.dtype
    ours: Make
    baseline: Callable[[Wrap], Make]
    checked: tuple[tuple[str, dict[str, Any]], ...]
    """Ops and options of their SPEC.build: the case, cut to a few rows, against float64."""


def wave_sizes(device: torch.device) -> dict[str, int]:
    """Returns latent elements by name of the size; tiny on a CPU."""
    return NUM_ELEMENTS if device.type == "cuda" else TINY


def noise_cases(device: torch.device, parents: int = PARENTS) -> Iterator[Case]:
    """Yields the cases of all noise ops, the largest size first, as targets are set there."""
    for size, num_elements in reversed(wave_sizes(device).items()):
        sizes = (parents if device.type == "cuda" else 2, CHILDREN, num_elements)
        for build in (_branch_step, _loss_off, _loss_on, _log_prob):
            yield build(size, sizes, device)
        for dtype in (F32, BF16):
            yield _normals(size, sizes, dtype, device)


def _sets(sizes: tuple[int, int, int], device: torch.device) -> Callable[[int], Wave]:
    return cache(lambda seed: Wave(sizes, BF16, device, seed))


def _label(sizes: tuple[int, int, int], dtype: torch.dtype) -> str:
    num_parents, num_children, num_elements = sizes
    return f"{num_parents}x{num_children} D={num_elements} {str(dtype).removeprefix('torch.')}"


def _bytes(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns bytes of all x (fp32), all v (bf16) and all y (fp32)."""
    num_parents, num_children, num_elements = sizes
    x = 4 * num_parents * num_elements
    return x, x // 2, x * num_children


def _checked(sizes: tuple[int, int, int], dtypes: tuple[Any, ...]) -> dict[str, Any]:
    return {"counts": (sizes[1],) * 2, "num_elements": sizes[2], "dtypes": dtypes}


def _no_grad(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _branch_step(size: str, sizes: tuple[int, int, int], device: torch.device) -> Case:
    at, (x, v, y) = _sets(sizes, device), _bytes(sizes)

    def ours(i: int) -> Call:
        w = at(i)
        return _no_grad(lambda: ops.branch_step(w.x, w.v, w.rows, w.child_start, w.noise))

    def baseline(wrap: Wrap) -> Make:
        step = wrap(eager.step)
        return lambda i: _no_grad(lambda: step(at(i).x, at(i).v, sizes[1]))

    return Case(
        op="branch_step",
        size=size,
        label=_label(sizes, BF16),
        direction="forward",
        num_bytes=x + v + y,
        num_normals=y // 4,
        footprint=x + v + y,
        dtype=F32,
        ours=ours,
        baseline=baseline,
        checked=(("branch_step", _checked(sizes, (F32, BF16, F32))),),
    )


def _stored_loss(
    v: Tensor, x: Tensor, y: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, k: int
) -> Tensor:
    """Score stored children under a new velocity and clip the ratio, as every release does."""
    return eager.ratio_loss(eager.log_prob(y, eager.means(x, v, k)), old, advantage, weight)


def _loss_off(size: str, sizes: tuple[int, int, int], device: torch.device) -> Case:
    return _loss(size, sizes, device, on_policy=False)


def _loss_on(size: str, sizes: tuple[int, int, int], device: torch.device) -> Case:
    return _loss(size, sizes, device, on_policy=True)


def _loss(size: str, sizes: tuple[int, int, int], device: torch.device, *, on_policy: bool) -> Case:
    at, (_, v, y) = _sets(sizes, device), _bytes(sizes)

    def ours(i: int) -> Call:
        w = at(i)
        v_old = None if on_policy else w.v_old

        def run() -> Any:
            p, q = ops.edge_dots(w.v, v_old, w.child_start, w.noise)
            terms = (w.child_start, w.exponent, w.advantage, w.weight, CLIP)
            return torch.autograd.grad(ops.ratio_loss(p, q, *terms).loss, w.v)

        return run

    def baseline(wrap: Wrap) -> Make:
        loss = wrap(_stored_loss)

        def make(i: int) -> Call:
            w = at(i)
            rest = (w.x, w.y, w.log_prob_old, w.advantage, w.weight, sizes[1])
            return lambda: torch.autograd.grad(loss(w.v, *rest), w.v)

        return make

    return Case(
        op="edge_dots+ratio_loss",
        size=size,
        label=f"{_label(sizes, BF16)} {'on' if on_policy else 'off'} policy",
        direction="forward and backward",
        # on policy the forward is known: the gradient is all that is written
        num_bytes=v if on_policy else 5 * v,
        num_normals=y // 4 if on_policy else y // 2,
        footprint=3 * v,
        dtype=BF16,
        ours=ours,
        baseline=baseline,
        checked=(
            ("edge_dots", _checked(sizes, (BF16, None if on_policy else BF16))),
            ("ratio_loss", {"counts": (sizes[1],) * sizes[0]}),
        ),
    )


def _log_prob(size: str, sizes: tuple[int, int, int], device: torch.device) -> Case:
    at, (x, v, y) = _sets(sizes, device), _bytes(sizes)

    def ours(i: int) -> Call:
        w = at(i)
        args = (w.x, w.v, w.y, w.rows, w.child_start)
        return lambda: torch.autograd.grad(ops.sde_log_prob(*args).sum(), w.v)

    def baseline(wrap: Wrap) -> Make:
        score = wrap(lambda v, x, y: eager.log_prob(y, eager.means(x, v, sizes[1])).sum())

        def make(i: int) -> Call:
            w = at(i)
            x, y = w.x, w.y
            return lambda: torch.autograd.grad(score(w.v, x, y), w.v)

        return make

    return Case(
        op="sde_log_prob",
        size=size,
        label=_label(sizes, BF16),
        direction="forward and backward",
        num_bytes=2 * (x + v + y) + v,
        num_normals=0,
        footprint=x + v + y + v,
        dtype=F32,
        ours=ours,
        baseline=baseline,
        checked=(("sde_log_prob", _checked(sizes, (F32, BF16))),),
    )


def _normals(
    size: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Case:
    at, num_draws, num_elements = _sets(sizes, device), sizes[0] * sizes[1], sizes[2]
    num_bytes = num_draws * num_elements * dtype.itemsize

    def baseline(wrap: Wrap) -> Make:
        shape = (num_draws, num_elements)
        draw = wrap(lambda: torch.randn(shape, device=device, dtype=dtype))
        return lambda _: draw

    return Case(
        op="philox_normal",
        size=size,
        label=_label(sizes, dtype),
        direction="forward",
        num_bytes=num_bytes,
        num_normals=num_draws * num_elements,
        footprint=num_bytes,
        dtype=dtype,
        ours=lambda i: lambda: ops.philox_normal(at(i).noise, num_elements, dtype),
        baseline=baseline,
        checked=(
            (
                "philox_normal",
                {"num_draws": sizes[1], "num_elements": num_elements, "dtype": dtype},
            ),
        ),
    )
