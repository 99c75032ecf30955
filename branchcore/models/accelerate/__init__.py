"""Binds the fused ops to the blocks of a diffusers transformer: `accelerate`, and its undoing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from branchcore import _dispatch
from branchcore.models.accelerate import flux, qwen_image, sana, sd3, wan
from branchcore.models.accelerate.binding import BlockBinding, Conditioning, as_text
from branchcore.models.accelerate.verify import Trial, first_weight, structure
from branchcore.models.sharing import matches

FAMILIES: dict[str, Mapping[str, BlockBinding]] = {
    "SD3Transformer2DModel": sd3.BLOCKS,
    "FluxTransformer2DModel": flux.BLOCKS,
    "QwenImageTransformer2DModel": qwen_image.BLOCKS,
    "WanTransformer3DModel": wan.BLOCKS,
    "SanaTransformer2DModel": sana.BLOCKS,
}
"""Class of a transformer -> names of its blocks -> their binding."""
DTYPES = torch.float32, torch.bfloat16, torch.float64


class _Bound(NamedTuple):
    name: str
    block: Any
    binding: BlockBinding


class Acceleration:
    """What `accelerate` bound; print it.

    Args:
        transformer: whose blocks are accelerated.
        found: the blocks.
        calls: of every op in one forward of each.
        kinds: number of structures that were verified.
        undo: gives back what was replaced.
    """

    def __init__(
        self,
        transformer: nn.Module,
        found: list[_Bound],
        calls: list[Mapping[str, int]],
        kinds: int,
        undo: ExitStack,
    ) -> None:
        self.transformer, self._kinds, self._undo = transformer, kinds, undo
        self.calls: Counter[str] = Counter()
        """Op -> calls in one forward of the transformer."""
        for each in calls:
            self.calls.update(each)
        self.bound: dict[str, list[str]] = {
            "gate_norm_modulate": [name for name, _, _ in found],
            "qk_norm_rope": [
                f"{name}.{path}" for name, block, how in found for path in how.attentions(block)
            ],
        }
        """Op -> names of the blocks or attentions that call it."""
        self._found = found

    def __str__(self) -> str:
        """Says what was bound, and which implementation runs on the transformer's device."""
        name = type(self.transformer).__name__
        if not self.bound:
            return f"accelerate: {name} is as diffusers made it (undone)"
        lines = [
            f"accelerate: {len(self._found)} blocks of {name}, in {self._kinds} kinds that were "
            "compared with diffusers' own, outputs and gradients"
        ]
        weight = first_weight(self._found[0].block, self._found[0].binding)
        dtype = str(weight.dtype).removeprefix("torch.")
        for op, names in self.bound.items():
            if not names:
                lines.append(f"  {op}: nowhere, as queries and keys have no norm")
                continue
            runs = _dispatch.choose(op, weight.device, weight.dtype)
            lines.append(
                f"  {op}: {self.calls[op]} calls per forward in {len(names)} modules, {names[0]} "
                f"to {names[-1]}; runs with {runs} ({weight.device}, {dtype})"
            )
        return "\n".join(lines)

    def undo(self) -> None:
        """Gives every block its forward and every attention its processor back.

        Raises:
            ValueError: a processor or its backend was changed meanwhile, by `set_attention` say.
        """
        for name, block, binding in self._found if self.bound else ():
            for path in binding.attentions(block):
                processor, kind = block.get_submodule(path).processor, binding.processors[path][1]
                _check_unchanged(f"{name}.{path}", processor, kind)
        self._undo.close()
        self.bound, self.calls = {}, Counter()


def accelerate(transformer: nn.Module) -> Acceleration:
    """Replaces norms, modulation, gates, and norms and rotation of queries and keys by fused ops.

    Names of modules and parameters stay as they are; adapters, checkpointing and a `Sharing` may
    come before or after, `set_attention` and `torch.compile` after. With a `Sharing`, modulation
    is computed and read once per prompt and noise level. Every kind of block is compared with
    diffusers' own on random weights and inputs, its gradients too, before it is kept. The residual
    behind a block's last layer, cross-attention and the feed-forwards stay with torch.

    Args:
        transformer: of SD3, FLUX.1, Qwen-Image, Wan2.1 or SANA, in fp32, bf16 or fp64.

    Returns:
        What was bound; `undo()` takes it back.

    Raises:
        NotImplementedError: the transformer, a block, a norm or an attention processor has another
            class than those this was written for, or another signature.
        TypeError: weights of another dtype.
        ValueError: weights on the meta device, or blocks that are accelerated or compiled already.
        RuntimeError: a fused block does not compute what diffusers' does.
    """
    found = _find(transformer)
    conditioning = Conditioning(transformer)
    known: dict[Hashable, Mapping[str, int]] = {}
    calls: list[Mapping[str, int]] = []
    with ExitStack() as undo:
        for name, block, binding in found:
            kind = structure(block)
            trial = None if kind in known else Trial(name, block, binding)
            _install(block, binding, conditioning, undo)
            if trial is not None:
                known[kind] = trial.compare()
            calls.append(known[kind])
        return Acceleration(transformer, found, calls, len(known), undo.pop_all())


def _find(transformer: nn.Module) -> list[_Bound]:
    family = FAMILIES.get(type(transformer).__name__)
    if family is None:
        raise NotImplementedError(
            f"accelerate: transformer must be one of {', '.join(FAMILIES)}, got "
            f"{type(transformer).__name__}"
        )
    for name, parameter in transformer.named_parameters():
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"accelerate: {name} must be float32, bfloat16 or float64, got "
                f"{str(parameter.dtype).removeprefix('torch.')}; try transformer.to(torch.bfloat16)"
            )
        if parameter.is_meta:
            raise ValueError(f"accelerate: {name} must have a value, got one on the meta device")
    found = [
        _Bound(name, block, binding)
        for pattern, binding in family.items()
        for name, block in transformer.named_modules()
        if matches(pattern, name)
    ]
    for name, block, binding in found:
        _check(name, block, binding)
    return found


def _check(name: str, block: Any, binding: BlockBinding) -> None:
    if type(block).__name__ != binding.block:
        known = ", ".join(each.block for family in FAMILIES.values() for each in family.values())
        raise NotImplementedError(
            f"accelerate: {name} must be a {binding.block}, got {type(block).__name__}; "
            f"known blocks are {known}"
        )
    if "forward" in vars(block):
        raise ValueError(f"accelerate: {name}.forward must be diffusers' own, got a replaced one")
    if block._compiled_call_impl is not None:
        raise ValueError(f"accelerate: {name} must not be compiled yet, got a compiled one")
    binding.check(name, block)


def _install(
    block: Any, binding: BlockBinding, conditioning: Conditioning, undo: ExitStack
) -> None:
    block.forward = partial(binding.forward, block, conditioning)
    undo.callback(delattr, block, "forward")
    for path in binding.attentions(block):
        attention = block.get_submodule(path)
        undo.callback(attention.set_processor, attention.processor)
        attention.set_processor(binding.processors[path][1](attention.processor))


def _check_unchanged(name: str, processor: Any, kind: Any) -> None:
    backend = getattr(processor, "_attention_backend", None)
    if type(processor) is not kind or backend is not None:
        raise ValueError(
            f"accelerate: {name} must have the processor that was bound, without a backend, got "
            f"{type(processor).__name__} with {as_text(backend)}; try undo() of set_attention first"
        )
