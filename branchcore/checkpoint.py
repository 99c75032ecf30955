"""Checkpoints: safetensors and JSON, written whole or not at all; nothing pickled is ever read.

A checkpoint is a folder `checkpoint-000040` with model.safetensors, optimizer.safetensors,
ema.safetensors, masters.safetensors (where weights are 16-bit) and state.json. The base of a LoRA
is in none of them. It is written under another name and renamed when complete, so a
crash at any moment leaves the last whole one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = "branchcore-checkpoint-1"
_NAME = re.compile(r"checkpoint-(\d{6,})$")
Tensors = dict[str, Tensor]


def trained(module: nn.Module) -> Tensors:
    """Returns what is kept of a module: all its state, or the trainable part if some is frozen."""
    state: Tensors = dict(module.state_dict(keep_vars=True))
    if all(p.requires_grad for p in module.parameters()):
        return state
    return {name: value for name, value in state.items() if value.requires_grad}


def folder_of(out: Path, iteration: int) -> Path:
    """Returns the folder of an iteration's checkpoint."""
    return out / f"checkpoint-{iteration:06d}"


def latest(out: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run, None if there is none."""
    found = [p for p in out.glob("checkpoint-*") if _NAME.match(p.name) and p.is_dir()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def save(
    out: Path, iteration: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes a checkpoint atomically and removes all but the newest `keep`.

    Args:
        out: folder of the run.
        iteration: completed iterations.
        tensors: one safetensors file per entry.
        state: JSON-serialisable facts that a resumed run must agree on.
        keep: checkpoints to keep, at least 1.
    """
    folder = folder_of(out, iteration)
    partial = out / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, group in tensors.items():
        # a copy each: safetensors refuses tensors that share memory, such as tied weights
        whole = {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}
        save_file(whole, _file(partial, name))
    text = json.dumps({"format": FORMAT, "iteration": iteration, **state}, indent=1)
    (partial / "state.json").write_text(text)
    for path in partial.iterdir():
        _sync(path)
    old = out / f".old-{folder.name}"
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
    _sync(out)
    found = sorted(p for p in out.glob("checkpoint-*") if _NAME.match(p.name))
    for old in found[:-keep]:
        shutil.rmtree(old)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def load_state(folder: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint's state.json.

    Raises:
        ValueError: not a checkpoint of this format, or damaged.
    """
    path = folder / "state.json"
    state = read_json(path)
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {path} must have format {FORMAT!r}, got {state.get('format')!r}"
        )
    require(path, state, iteration=int)
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: missing, damaged, or something else than an object.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: {path.parent} must hold {path.name}, got no such file")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path} must be JSON, got damaged text ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: {path} must hold an object, got {type(value).__name__}")
    return cast("dict[str, Any]", value)


def require(path: Path, state: Mapping[str, Any], **kinds: Any) -> None:
    """Raises ValueError unless the state has these entries; a kind is a type, or (type, None)."""
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        value = state.get(name, ...)
        if not any(value is None if k is None else isinstance(value, k) for k in allowed):
            got = "nothing" if value is ... else repr(value)
            raise ValueError(f"checkpoint: {path} must have a {name}, got {got}")


def load_tensors(folder: Path, name: str, like: Mapping[str, Tensor] | None = None) -> Tensors:
    """Reads one safetensors file of a checkpoint.

    Args:
        folder: the checkpoint.
        name: file without suffix.
        like: tensors whose names and shapes the file must have; None = any.

    Raises:
        ValueError: missing, damaged, or of another model.
    """
    path = _file(folder, name)
    if not path.is_file():
        raise ValueError(f"checkpoint: {folder} must hold {path.name}, got no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} must be whole safetensors, got {error}") from error
    if like is not None:
        check_like(path, tensors, like)
    return tensors


def check_like(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless both have the same names and shapes."""
    missing, extra = sorted(set(like) - set(tensors)), sorted(set(tensors) - set(like))
    if missing or extra:
        raise ValueError(
            f"checkpoint: {path} must hold this model's {len(like)} tensors, "
            f"got {len(missing)} missing {missing[:3]} and {len(extra)} foreign {extra[:3]}"
        )
    for name, tensor in like.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"checkpoint: {path}: {name} must be {tuple(tensor.shape)}, "
                f"got {tuple(tensors[name].shape)}"
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Returns the optimizer's per-parameter tensors as `index.name`."""
    state = cast("dict[int, dict[str, Tensor]]", optimizer.state_dict()["state"])
    return {f"{i}.{name}": t for i, values in state.items() for name, t in values.items()}


def load_moments(folder: Path, parameters: Sequence[Tensor]) -> Tensors:
    """Reads the optimizer's tensors and checks that they belong to these parameters.

    Raises:
        ValueError: missing, damaged, or of other parameters.
    """
    tensors = load_tensors(folder, "optimizer")
    # a parameter that never had a gradient has no moments
    found = {i for i in range(len(parameters)) if f"{i}.exp_avg" in tensors}
    like = {
        f"{i}.{name}": torch.zeros(()) if name == "step" else parameters[i]
        for i in found or range(len(parameters))
        for name in ("step", "exp_avg", "exp_avg_sq")
    }
    check_like(_file(folder, "optimizer"), tensors, like)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` returned into an optimizer of the same parameters."""
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
