"""Argument checks of the public ops: shapes, dtypes and devices, never values (a value is a sync).

Every message reads `op: argument must be <wanted>, got <actual>[; try <fix>]`.
"""

from typing import Any

import torch
from torch import Tensor

from branchcore.noise import Noise

INDEX = (torch.int64,)
ROW = (torch.float64,)
SCALAR = (torch.float32, torch.float64)
STATE = (torch.float32, torch.bfloat16)
REFERENCE = (torch.float64,)


def tensor(
    op: str,
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Check one tensor; its axes are the letters after the last underscore of its name."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must be {_axes(name, shape)}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {names(dtypes)}, got {names((value.dtype,))}")
    if value.device != device:
        raise ValueError(
            f"{op}: {name} must be on {device} like the first argument, got {value.device}"
        )


def length(op: str, name: str, value: Any) -> int:
    """Check that an argument is a tensor with an axis to count, and return its length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must be ({', '.join(name.rpartition('_')[2])}), got ()")
    return len(value)


def matrix(op: str, name: str, value: Any) -> tuple[int, int]:
    """Check that the leading argument is a matrix and return its shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(
            f"{op}: {name} must be ({', '.join(name[-2:])}), got {tuple(value.shape)}; "
            "try flatten(1)"
        )
    return value.shape[0], value.shape[1]


def positive(op: str, name: str, value: float) -> None:
    """Check a number."""
    if not value > 0.0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")


def states(first: Tensor) -> tuple[torch.dtype, ...]:
    """Name the dtypes that go with the leading state: float64 is all or none."""
    return REFERENCE if first.dtype == torch.float64 else STATE


def noise(
    op: str, value: Any, num_draws: int | None = None, device: torch.device | None = None
) -> None:
    """Check the three tensors that name draws; without a number, any number of them."""
    if not isinstance(value, Noise):
        raise TypeError(f"{op}: noise must be a branchcore.Noise, got {type(value).__name__}")
    key, counter, mix = value
    length(op, "noise.key", key)
    device = key.device if device is None else device
    num_draws = length(op, "noise.counter", counter) if num_draws is None else num_draws
    tensor(op, "noise.key", key, (3,), INDEX, device)
    tensor(op, "noise.counter", counter, (num_draws, 3), (torch.int32,), device)
    tensor(op, "noise.mix", mix, (num_draws, 2), ROW, device)


def _axes(name: str, shape: tuple[int, ...]) -> str:
    letters = name.rpartition("_")[2]
    if "_" not in name or len(letters) != len(shape):
        return str(tuple(shape))
    named = ", ".join(letters) + ("," if len(letters) == 1 else "")
    sizes = ", ".join(f"{k}={n}" for k, n in zip(letters, shape, strict=True) if k.isalpha())
    return f"({named}) with {sizes}"


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Spell dtypes without their module."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
