"""Tries an attention backend on tiny tensors against torch's own, before a model relies on it.

Letters: B rows, S queries, L keys, H heads, C channels of one.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Mask = Literal["none", "keep", "add"]
"""A transformer's text mask: none, (B, 1, 1, L) bool, or (B, 1, 1, L) added to the scores."""

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""Of the largest value, outputs and gradients."""
_FAILURES = (
    *(RuntimeError, ValueError, TypeError, AttributeError, AssertionError),
    *(ImportError, OSError),
)
"""What packages of kernels raise where they cannot serve a call."""


class Case(NamedTuple):
    """What a model will ask of its attention."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    mask: Mask
    training: bool


def probe(backend: str, case: Case) -> None:
    """Raises unless a backend of diffusers serves a case with the numbers of "native".

    Raises:
        RuntimeError: its package is absent, or its numbers are wrong.
        NotImplementedError: not for this device, dtype or head size; no masks; no backward.
    """
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend(backend):
            pass
    except _FAILURES as error:
        raise RuntimeError(
            _refusal(f"one whose package is installed, got {backend!r} ({_first(error)})")
        ) from error
    plain = case._replace(mask="none")
    served = f"one that serves {case.dtype} in heads of {case.head_dim} on {case.device}"
    _compare(backend, plain, False, served)
    if case.mask != "none":
        _compare(backend, case, False, "one that heeds the model's text masks")
    if case.training:
        fix = "training=False, which serves calls without gradient only"
        _compare(backend, case, True, "one with a backward, to train through", fix)


def _compare(backend: str, case: Case, backward: bool, wanted: str, fix: str = "'native'") -> None:
    exact = _attend("native", case, backward)
    try:
        found = _attend(backend, case, backward)
    except _FAILURES as error:
        raise NotImplementedError(
            _refusal(f"{wanted}, got {backend!r} ({_first(error)})", fix)
        ) from error
    limit = TOLERANCE[case.dtype]
    for ours, theirs in zip(found, exact, strict=True):
        error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        if not error <= limit:
            what = f"{wanted}, within {limit:.0e} of 'native'"
            raise RuntimeError(_refusal(f"{what}, got {backend!r} with an error of {error:.1e}"))


def _attend(backend: str, case: Case, backward: bool) -> list[Tensor]:
    """Returns the output, and the gradients of query, key and value if asked for."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    drawn = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn).to(case.device, case.dtype)

    shapes = ((2, 32, 2, case.head_dim), (2, 48, 2, case.head_dim), (2, 48, 2, case.head_dim))
    inputs = [draw(*shape).requires_grad_(backward) for shape in shapes]
    # a hole in the middle: text, its padding, image
    keep = torch.ones(2, 1, 1, 48, dtype=torch.bool, device=case.device)
    keep[0, ..., 10:24] = False
    masks: dict[Mask, Any] = {
        "none": None,
        "keep": keep,
        "add": (~keep).to(case.dtype) * -10000.0,
    }
    with torch.set_grad_enabled(backward):
        out = dispatch_attention_fn(
            *inputs, attn_mask=masks[case.mask], backend=AttentionBackendName(backend)
        )
        if not backward:
            return [out]
        gradients = torch.autograd.grad(out, inputs, draw(*shapes[0]))
    return [out.detach(), *gradients]


def _refusal(text: str, fix: str = "'native'") -> str:
    return f"set_attention: backend must be {text}; try {fix}"


def _first(error: BaseException) -> str:
    """Returns the first line of an error."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]
