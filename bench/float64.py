"""Keeps float64 throughout: diffusers computes norms and embeddings in fp32 whatever it is given.

There a last bit of float64 can become one of fp32, which would hide every error below 1e-8 of what
is checked: the engine, not the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Casts of float64 tensors to fp32 do nothing within the block."""
    to, single = Tensor.to, Tensor.float

    def cast(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if x.dtype == torch.float64 and torch.float32 in (*args, *options.values()):
            return x
        return to(x, *args, **options)

    Tensor.to = cast  # type: ignore[method-assign]
    Tensor.float = lambda x: x if x.dtype == torch.float64 else single(x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.to, Tensor.float = to, single  # type: ignore[method-assign]
