"""A pipeline that another trainer owns, behind the engine's `Model` protocol."""

from __future__ import annotations

from typing import Any

from torch import nn

from branchcore.models import FAMILIES, family_module
from branchcore.models.adapters import lora_layers
from branchcore.models.family import Family, Size
from branchcore.models.flow_model import FlowModel, unwrapped


def from_pipeline(
    pipe: Any,
    height: int,
    width: int,
    num_frames: int = 1,
    *,
    guidance: float,
    negative_prompt: str = "",
    share: bool = False,
    **options: Any,
) -> FlowModel:
    """Lends a loaded pipeline to the engine; weights, devices and modes stay the caller's.

    What the caller trains (a LoRA of peft or diffusers, or all weights) is what is trained. Hooks
    on the wrappers of peft, accelerate and `DistributedDataParallel` are passed by: autocast is
    `with accelerator.autocast()` around the iteration, gradients have no loss scale (fp16).

    Args:
        pipe: a pipeline of one of the families.
        height: pixels.
        width: pixels.
        num_frames: of a video.
        guidance: scale of classifier-free guidance, 1 = off.
        negative_prompt: of the unconditional half, which is outside of the graph unless
            `model.train_uncond`.
        share: compute what rows of a call have in common once, by replacing the `forward` of some
            modules; `model.unshare()` gives them back.
        **options: of the family's class, such as max_text_tokens.

    Raises:
        ValueError: a pipeline of no family, dropout, a size or guidance that it cannot take.
        NotImplementedError: a variant of the architecture that the family does not support.
        TypeError: an option that the family does not have.
    """
    family = _family(type(pipe).__name__)(**options)
    size = Size(height, width, num_frames)
    family.check_size(size)
    module = unwrapped(pipe.transformer)
    family.check_config(dict(pipe.config), dict(pipe.transformer.config))
    family.check_guidance(guidance, pipe.transformer.config)
    _check_dropout(module)
    weight = _base_weight(module)
    model = FlowModel(
        family,
        pipe,
        size,
        guidance=guidance,
        negative_prompt=negative_prompt,
        dtype=weight.dtype,
        device=weight.device,
    )
    if not share:
        model.unshare()
    return model


def _family(pipeline: str) -> type[Family]:
    known: dict[str, type[Family]] = {}
    for name in FAMILIES:
        for found in vars(family_module(name)).values():
            if isinstance(found, type) and issubclass(found, Family) and hasattr(found, "pipeline"):
                known[found.pipeline] = found
    if pipeline not in known:
        raise ValueError(f"from_pipeline: pipe must be one of {sorted(known)}, got {pipeline}")
    return known[pipeline]


def _check_dropout(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout) and part.p > 0.0:
            raise ValueError(
                f"from_pipeline: pipe must have no dropout, got {part.p} at {name}; with it the "
                "ratio is not 1 on policy"
            )


def _base_weight(module: nn.Module) -> Any:
    """Returns a weight of the base model: adapters may have another dtype."""
    adapters = {id(p) for layer in lora_layers(module).values() for p in _adapter(layer)}
    return next(p for p in module.parameters() if id(p) not in adapters)


def _adapter(layer: nn.Module) -> list[Any]:
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]
