"""What of a model is trained, and how it is saved: a LoRA or all weights, as diffusers does.

Everything here comes before `accelerate`, compilation and the trainer, which look at the weights
that are there.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from branchcore.models.adapters import NAME, attach, has_lora, lora_layers, set_weights
from branchcore.models.flow_model import FlowModel

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(
    model: FlowModel,
    *,
    rank: int = 32,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Adds a LoRA to the transformer, which is all that is trained then.

    The model is unchanged until the first step, and the policy without it is the reference.
    Weights are fp32 (fp64 in an fp64 model) whatever the base's dtype.

    Args:
        model: with frozen weights.
        rank: of the update of each layer.
        alpha: the update is scaled by alpha / rank; None = 2 rank, as Flow-GRPO has it.
        targets: ends of names of linear layers; None = the family's attention projections.
        seed: of the initial weights; the global random state is neither read nor changed.

    Raises:
        ValueError: rank or alpha is not positive, a target names no layer, or the model is
            trained already.
    """
    alpha = 2 * rank if alpha is None else alpha
    if rank < 1 or alpha <= 0.0:
        raise ValueError(
            f"add_lora: rank must be at least 1 and alpha positive, got {rank} and {alpha}"
        )
    _check_untrained("add_lora", model)
    chosen = model.family.lora_targets if targets is None else tuple(targets)
    if not chosen:
        raise ValueError("add_lora: targets must name at least one layer, got none")
    with _Unshared(model):
        attach(model.module, chosen, rank, alpha, seed)


def train_all(model: FlowModel, *, reference: bool = False) -> None:
    """Makes every weight of the transformer trainable.

    The trainer keeps fp32 masters of 16-bit weights; see `branchcore.masters`.

    Args:
        model: with frozen weights.
        reference: keep a frozen copy of the weights as they are, for a KL to the base policy.

    Raises:
        ValueError: the model is trained already.
        RuntimeError: the blocks are patched by something that a copy would share.
    """
    _check_untrained("train_all", model)
    if reference:
        with _Unshared(model):
            model.frozen = _frozen_copy(model.module)
    model.module.requires_grad_(True)


def _check_untrained(name: str, model: FlowModel) -> None:
    trained = any(p.requires_grad for p in model.module.parameters())
    if trained or has_lora(model.module):
        kind = "a LoRA" if has_lora(model.module) else "trainable weights"
        raise ValueError(f"{name}: model must have frozen weights without a LoRA, got {kind}")


class _Unshared:
    """Undoes sharing for the time of the block, so that modules are replaced or copied whole."""

    def __init__(self, model: FlowModel) -> None:
        self.model, self.was_shared = model, model.sharing is not None

    def __enter__(self) -> None:
        self.model.unshare()

    def __exit__(self, *_: object) -> None:
        if self.was_shared:
            self.model.share()


def _frozen_copy(module: nn.Module) -> nn.Module:
    for name, part in module.named_modules():
        if "forward" in vars(part):
            raise RuntimeError(
                f"train_all: {name or 'transformer'} must have its own forward to be copied, got "
                "a patched one; try train_all() before accelerate()"
            )
    return copy.deepcopy(module).requires_grad_(False)


def save_lora(model: FlowModel, folder: str | Path) -> Path:
    """Writes the LoRA as `load_lora_weights` of the plain pipeline reads it; returns the file.

    Args:
        model: with a LoRA; under `Trainer.averaged()` it is the average that is written.
        folder: where `pytorch_lora_weights.safetensors` goes, written whole or not at all.

    Raises:
        ValueError: the model has no LoRA.
    """
    if not has_lora(model.module):
        raise ValueError("save_lora: model must have a LoRA, got none; try save_transformer()")
    from peft.utils import get_peft_model_state_dict

    target, partial = Path(folder) / LORA_FILE, f".partial-{LORA_FILE}"
    module: Any = model.module
    weights = get_peft_model_state_dict(module, adapter_name=NAME)
    type(model.pipe).save_lora_weights(
        folder,
        transformer_lora_layers={name: w.detach().clone() for name, w in weights.items()},
        transformer_lora_adapter_metadata=_metadata(module.peft_config[NAME]),
        weight_name=partial,
    )
    os.replace(target.with_name(partial), target)
    return target


def _metadata(config: Any) -> dict[str, Any]:
    """Returns what makes the adapter; entries at their defaults differ between versions of peft."""
    known = type(config)().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    return {
        name: sorted(value) if isinstance(value, set) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        for name, value in config.to_dict().items()
        if name in always or value != known[name]
    }


def load_lora(model: FlowModel, path: str | Path) -> None:
    """Adds a saved LoRA to the transformer, to sample with it or to train on.

    Args:
        model: with frozen weights.
        path: of `save_lora`, or another safetensors file or folder that the pipeline's
            `load_lora_weights` reads and that changes linear layers of the transformer only.

    Raises:
        OSError: no such file, or none of safetensors: pickled weights are not read.
        ValueError: the model is trained already, or the file does not fit the transformer.
        NotImplementedError: the file holds something else than LoRA matrices of the transformer.
    """
    _check_untrained("load_lora", model)
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise OSError(
            f"load_lora: path must be a LoRA file or a folder with {LORA_FILE}, got {path}"
        )
    found = _read_lora(type(model.pipe), file)
    weights, alphas = found[0], found[1] if len(found) == 3 else None
    _check_lora(file, weights, model.module)
    module: Any = model.module
    with _Unshared(model):
        module.load_lora_adapter(
            weights,
            prefix="transformer",
            network_alphas=alphas or None,
            metadata=found[-1],
            adapter_name=NAME,
        )
        set_weights(module, {n.removeprefix("transformer."): w for n, w in weights.items()})


def _read_lora(pipeline: Any, file: Path) -> tuple[Any, ...]:
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise OSError(f"load_lora: {file} must be safetensors, got {error}") from error
    return pipeline.lora_state_dict(
        str(file), return_lora_metadata=True, return_alphas=True, use_safetensors=True
    )


def _check_lora(file: Path, weights: Mapping[str, Tensor], module: nn.Module) -> None:
    if not weights:
        raise ValueError(f"load_lora: {file} must hold LoRA matrices, got none")
    linear = {n: p.weight for n, p in module.named_modules() if isinstance(p, nn.Linear)}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, weight in weights.items():
        found = re.fullmatch(r"transformer\.(.+)\.lora_(A|B)\.weight", name)
        if found is None or weight.ndim != 2:
            raise NotImplementedError(
                f"load_lora: {file} must hold LoRA matrices of the transformer, got {name} "
                f"{tuple(weight.shape)}"
            )
        shapes.setdefault(found[1], {})[found[2]] = tuple(weight.shape)
    for name, got in shapes.items():
        rank = got.get("A", (0,))[0]
        wanted = (
            {"A": (rank, linear[name].shape[1]), "B": (linear[name].shape[0], rank)}
            if name in linear
            else {}
        )
        if got != wanted:
            raise ValueError(
                f"load_lora: {file} must fit {type(module).__name__}, got {got} for {name}, which "
                f"takes {wanted or 'none'}"
            )


def save_transformer(model: FlowModel, folder: str | Path) -> Path:
    """Writes all weights as the subfolder `transformer` of a diffusers folder; returns it.

    Args:
        model: without a LoRA.
        folder: gets or replaces the subfolder, whole or not at all; in a copy of the pipeline's
            folder, the pipeline then loads the trained weights.

    Raises:
        ValueError: the model has a LoRA.
    """
    if has_lora(model.module):
        raise ValueError("save_transformer: model must have no LoRA, got one; try save_lora()")
    target = Path(folder) / "transformer"
    partial, old = target.with_name(".partial-transformer"), target.with_name(".old-transformer")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    module: Any = model.module
    module.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def facts(model: FlowModel) -> dict[str, Any]:
    """Returns what is trained, for `Trainer(facts=...)`: a run resumes with the same only."""
    if not has_lora(model.module):
        return {"trained": "all" if any(p.requires_grad for p in model.module.parameters()) else ""}
    module: Any = model.module
    return {"trained": _metadata(module.peft_config[NAME]), "layers": len(lora_layers(module))}
