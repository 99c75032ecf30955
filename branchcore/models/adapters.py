"""LoRA layers of a diffusers transformer: weights in fp32 over a 16-bit base, and off for a while.

W x becomes W x + (alpha / rank) B A x. A and B are their own fp32 masters; the products run in the
dtype of x, which costs a cast of small matrices instead of a copy of every activation.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "default"
"""Of the adapter; there is at most one."""


class RoundedLinear(nn.Linear):
    """A linear layer without bias that rounds its weight to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns input @ weight^T in the input's dtype."""
        return F.linear(input, self.weight.to(input.dtype))


def has_lora(module: nn.Module) -> bool:
    """Tells whether a transformer has an adapter."""
    return bool(getattr(module, "peft_config", None))


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """Returns the adapted layers by the names of what they replace."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}


def attach(module: Any, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Adds an adapter to linear layers whose names end like a target; B is 0, A uniform.

    Raises:
        ValueError: a target that no linear layer has, or something else too.
    """
    from peft import LoraConfig

    _check_targets(module, targets)
    # peft draws weights from the global generator, which are replaced below
    with torch.random.fork_rng(devices=[]):
        options: Any = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
        module.add_adapter(LoraConfig(**options), NAME)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, layer in lora_layers(module).items():
        first = torch.empty(layer.lora_A[NAME].weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        weights[f"{name}.lora_A.weight"] = first
        weights[f"{name}.lora_B.weight"] = torch.zeros(layer.lora_B[NAME].weight.shape)
    set_weights(module, weights)


def _check_targets(module: nn.Module, targets: Sequence[str]) -> None:
    parts = dict(module.named_modules())
    linear = [name for name, part in parts.items() if isinstance(part, nn.Linear)]
    for target in targets:
        hits = [name for name in parts if f".{name}".endswith(f".{target}")]
        other = [name for name in hits if name not in linear]
        if other or not hits:
            none = len(other) == len(hits)
            got = "ends none" if none else f"also ends {other[0]}"
            raise ValueError(
                f"add_lora: targets must end the names of linear layers of {type(module).__name__},"
                f" got {target!r} that {got}; try names such as {linear[len(linear) // 2]!r}"
            )


def set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives every adapted layer these matrices, in fp32 (fp64 where the base is), trainable."""
    for name, layer in lora_layers(module).items():
        base = layer.get_base_layer().weight
        dtype = torch.promote_types(base.dtype, torch.float32)
        for side in ("lora_A", "lora_B"):
            weight = weights[f"{name}.{side}.weight"].to(base.device, dtype, copy=True)
            rounded = RoundedLinear(*reversed(weight.shape), bias=False, device="meta")
            rounded.weight = nn.Parameter(weight)
            getattr(layer, side)[NAME] = rounded
        layer.cast_input_dtype_enabled = False
    module.eval()


@contextmanager
def without_lora(module: nn.Module) -> Generator[None]:
    """Computes the base alone within the block; what is trainable stays as it was.

    peft freezes an adapter that it switches off and makes it trainable when it comes back.
    """
    layers = [layer for layer in lora_layers(module).values() if not layer.disable_adapters]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
