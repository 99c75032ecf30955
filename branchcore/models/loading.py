"""Loads pipelines: everything that can be refused is, before weights are read."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from branchcore.models.family import Family, Size
from branchcore.models.flow_model import FlowModel


def load(
    family: Family,
    path: str | Path,
    size: Size,
    *,
    guidance: float,
    negative_prompt: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> FlowModel:
    """Loads a pipeline of a family.

    Args:
        family: which.
        path: folder of a diffusers pipeline, or its name on the Hugging Face hub.
        size: what is generated.
        guidance: scale of classifier-free guidance.
        negative_prompt: of its unconditional half.
        dtype: of the weights.
        device: where they go.

    Raises:
        OSError: no such folder or pipeline, missing or damaged files, no network.
        ValueError: a pipeline of another class, weights that do not fit, a size or a guidance that
            the model cannot take.
        NotImplementedError: a variant of the architecture that the family does not support.
        RuntimeError: diffusers is not installed, or torch cannot use the device.
    """
    family.check_size(size)
    check_class(family, path)
    _check_device(family, device)
    diffusers = _diffusers()
    transformer_class = getattr(diffusers, family.transformer)
    index = _config(family, path, getattr(diffusers, family.pipeline))
    _check_name(family, path, index)
    config = _config(family, path, transformer_class, subfolder="transformer")
    family.check_config(index, config)
    family.check_guidance(guidance, config)
    _check_folders(family, path, index)
    parts = {"transformer": _weights(family, path, transformer_class, "transformer", dtype)}
    for name, cls in _weighted(index).items():
        parts[name] = _weights(family, path, cls, name, dtype)
    try:
        pipe = getattr(diffusers, family.pipeline).from_pretrained(path, **parts, dtype=dtype)
    except (OSError, ValueError) as error:
        raise OSError(f"{family.name}: {path} must be a whole pipeline, got {error}") from error
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae):
        part.eval().requires_grad_(False)
    return FlowModel(
        family,
        pipe.to(device),
        size,
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=dtype,
        device=device,
    )


def _check_device(family: Family, device: torch.device | str) -> None:
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"{family.name}: device must be one that torch can use, got {device} ({error})"
        ) from error


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise RuntimeError(
            "from_pretrained: diffusers must be installed, got none; "
            "try pip install 'branchcore[models]'"
        ) from error
    return diffusers


def check_class(family: Family | type[Family], path: str | Path) -> None:
    """Raises unless a path is a local pipeline of the family's class, or may be one of the hub."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
            raise OSError(
                f"{family.name}: path must be a folder or a name 'owner/model' of the hub, "
                f"got {path}"
            )
        return
    index = folder / "model_index.json"
    try:
        found: Mapping[str, Any] = json.loads(index.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise OSError(
            f"{family.name}: {folder} must be a diffusers pipeline with model_index.json, "
            f"got {error}"
        ) from error
    _check_name(family, path, found)


def _check_name(family: Family | type[Family], path: str | Path, index: Mapping[str, Any]) -> None:
    if index.get("_class_name") != family.pipeline:
        raise ValueError(
            f"{family.name}: {path} must be a {family.pipeline}, got {index.get('_class_name')}"
        )


def _weighted(index: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the classes of VAE and text encoders: the pipeline would fill gaps at random."""
    names = [name for name in index if name == "vae" or name.startswith("text_encoder")]
    found = {name: index[name] for name in names if index[name][1] is not None}
    return {
        name: getattr(importlib.import_module(library), cls)
        for name, (library, cls) in found.items()
    }


def _check_folders(family: Family, path: str | Path, index: Mapping[str, Any]) -> None:
    """Raises OSError if a local pipeline lacks a part: a tokenizer would be an empty one."""
    parts = [k for k, v in index.items() if isinstance(v, (list, tuple)) and v[0] is not None]
    gone = [name for name in parts if not (Path(path) / name).is_dir()]
    if Path(path).is_dir() and gone:
        raise OSError(f"{family.name}: {path} must be a whole pipeline, got no folder {gone[0]}")


def _config(family: Family, path: str | Path, cls: Any, **where: str) -> Mapping[str, Any]:
    try:
        return cls.load_config(path, **where)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{family.name}: {path} must be a pipeline on this machine or, with a network, on "
            f"the hub; got {error}"
        ) from error


def _weights(
    family: Family, path: str | Path, cls: Any, folder: str, dtype: torch.dtype
) -> torch.nn.Module:
    """Loads safetensors and refuses weights that are missing, foreign or of another shape."""
    try:
        module, report = cls.from_pretrained(
            path, subfolder=folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{family.name}: {path}/{folder} must hold weights, got {error}") from error
    # a text encoder may come with the rest of its model: an image encoder, a decoder
    fine = ("unexpected_keys",) if folder.startswith("text_encoder") else ()
    wrong = {name: list(keys) for name, keys in report.items() if keys and name not in fine}
    if wrong:
        name, keys = next(iter(wrong.items()))
        raise ValueError(
            f"{family.name}: {path}/{folder} must hold the weights of {cls.__name__}, got "
            f"{len(keys)} {name.replace('_', ' ')}, such as {keys[0]}"
        )
    return module
