"""What a checkpoint holds of a module and an optimizer, as mappings of names to tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def trained(module: nn.Module) -> Tensors:
    """Returns what is kept of a module: all its state, or the trainable part if some is frozen."""
    state: Tensors = dict(module.state_dict(keep_vars=True))
    if all(p.requires_grad for p in module.parameters()):
        return state
    return {name: value for name, value in state.items() if value.requires_grad}


def check_like(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless both have the same names and shapes."""
    check_shapes(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, like)


def check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], like: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless these are the names and shapes of the tensors."""
    missing, extra = sorted(set(like) - set(shapes)), sorted(set(shapes) - set(like))
    if missing or extra:
        raise ValueError(
            f"checkpoint: {path} must hold this model's {len(like)} tensors, "
            f"got {len(missing)} missing {missing[:3]} and {len(extra)} foreign {extra[:3]}"
        )
    for name, tensor in like.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"checkpoint: {path}: {name} must be {tuple(tensor.shape)}, got {shapes[name]}"
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Returns the optimizer's per-parameter tensors as `index.name`."""
    state = cast("dict[int, dict[str, Tensor]]", optimizer.state_dict()["state"])
    return {f"{i}.{name}": t for i, values in state.items() for name, t in values.items()}


def moments(parameters: Sequence[Tensor], held: Collection[str]) -> Tensors:
    """Returns what AdamW keeps of these parameters, to be filled.

    Args:
        parameters: of the optimizer.
        held: names in the checkpoint; a parameter that never had a gradient has no moments there.
    """
    found = {i for i in range(len(parameters)) if f"{i}.exp_avg" in held}
    return {
        f"{i}.{name}": torch.zeros(()) if name == "step" else torch.empty_like(parameters[i])
        for i in found or range(len(parameters))
        for name in ("step", "exp_avg", "exp_avg_sq")
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimizer of the same parameters what `optimizer_tensors` returned of another."""
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
