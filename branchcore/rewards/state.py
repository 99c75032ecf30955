"""The random state of a reward, as JSON, so that a run that goes on draws what it would have drawn.

A reward has a state if it has `state_dict()` and `load_state_dict(state)`; the state is made of
dicts with text keys, lists, tensors and JSON values (a tuple comes back as a list). The weights of
a torch module are no such state: of a module only a `state_dict` that its class wrote itself
counts.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

_TENSOR = "torch.Tensor"
"""Key that no state of one's own will have."""


@runtime_checkable
class Stateful(Protocol):
    """What a reward offers if it has a state."""

    def state_dict(self) -> Any:
        """Returns the state."""

    def load_state_dict(self, state: Any) -> Any:
        """Takes a state back."""


def stateful(reward: object) -> Stateful | None:
    """Returns the reward if it has a state, else None."""
    if not isinstance(reward, Stateful):
        return None
    inherited = getattr(type(reward), "state_dict", None) is nn.Module.state_dict
    return None if inherited else reward


def state_of(reward: object) -> Any:
    """Returns the state of a reward, ready for JSON; None if it has none.

    Raises:
        TypeError: something in it is neither JSON nor a tensor.
    """
    holder = stateful(reward)
    return None if holder is None else _encoded(holder.state_dict(), "state_dict()")


def check_state(reward: object, states: Sequence[Any], rank: int, where: object) -> Any:
    """Returns what of all ranks' states belongs to this one's reward; None if it has none.

    A rank beyond those that saved takes the state of one of them.

    Args:
        reward: the one that goes on.
        states: what `state_of` returned on every rank that saved.
        rank: of this process.
        where: file of the states, for the message.

    Raises:
        ValueError: a state for a reward that has none, or none for one that has.
    """
    state = states[rank % len(states)] if states else None
    if (state is None) != (stateful(reward) is None):
        wanted, got = ("no state", "one") if state is not None else ("a state", "none")
        raise ValueError(
            f"reward: {where} must hold {wanted} of {type(reward).__name__}, got {got}; "
            "try the reward that the run began with"
        )
    return _decoded(state, where)


def load_state(reward: object, state: Any) -> None:
    """Gives a reward that has a state what `check_state` returned."""
    holder = stateful(reward)
    if holder is not None:
        holder.load_state_dict(state)


def _encoded(value: Any, path: str) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return {
            _TENSOR: str(value.dtype).removeprefix("torch."),
            "shape": [*value.shape],
            "base64": base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode(),
        }
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        if not all(isinstance(key, str) for key, _ in items):
            raise TypeError(f"reward: {path} must have text keys, got {[k for k, _ in items]}")
        return {key: _encoded(inner, f"{path}[{key!r}]") for key, inner in items}
    if isinstance(value, (list, tuple)):
        inner = cast("Sequence[Any]", value)
        return [_encoded(item, f"{path}[{i}]") for i, item in enumerate(inner)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(
        f"reward: {path} must be a JSON value or a tensor, got {type(value).__name__}; "
        "try torch.as_tensor"
    )


def _decoded(value: Any, where: object) -> Any:
    if isinstance(value, list):
        return [_decoded(item, where) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    known = cast("dict[str, Any]", value)
    if _TENSOR not in known:
        return {key: _decoded(inner, where) for key, inner in known.items()}
    try:
        dtype, shape = getattr(torch, known[_TENSOR]), [int(n) for n in known["shape"]]
        raw = torch.tensor([*base64.b64decode(known["base64"], validate=True)], dtype=torch.uint8)
        if not isinstance(dtype, torch.dtype) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(raw)} bytes for {shape} of {known[_TENSOR]}")
        return raw.view(dtype).reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"reward: {where} must hold whole tensors, got {error!r}") from error
