"""What a family of blocks tells `accelerate`, and what its fused forwards have in common.

Letters: B samples, S tokens, H heads, D channels of one, C channels, R modulation rows.
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from branchcore import ops
from branchcore.models.sharing import Distinct, Kind, Sharing
from branchcore.reference.edges import wide

Draw = Callable[..., Tensor]
"""Sizes -> standard normals in fp64."""


class Conditioning:
    """Finds which samples of a transformer's call have the same modulation.

    Args:
        transformer: which a `Sharing` may patch, before or later.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = weakref.ref(transformer)

    def distinct(self, temb: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """Returns the distinct rows of what modulates, (R, ...), and (B,) the row of each sample.

        Args:
            temb: (B, ...), a function of what `kind` names.
            kind: what equal rows have in common.
        """
        found = self._found(kind, len(temb))
        if found is None:
            return temb, torch.arange(len(temb), device=temb.device)
        return temb[found.first], found.which

    def _found(self, kind: Kind, num_samples: int) -> Distinct | None:
        # a compiled block would be compiled anew for every number of rows
        if torch.compiler.is_compiling():
            return None
        sharing: Sharing | None = getattr(self._transformer(), "row_sharing", None)
        rows = None if sharing is None else sharing.rows
        return None if rows is None or rows.count != num_samples else rows.distinct(kind)


class BlockBinding(ABC):
    """One class of blocks: what it must look like, and its forward by fused ops."""

    block: ClassVar[str]
    """Its name in diffusers."""
    arguments: ClassVar[tuple[str, ...]]
    """Of its forward, after self."""
    processors: ClassVar[Mapping[str, tuple[str, Callable[[object], object]]]]
    """Attention -> class of its processor in diffusers, and ours, made of what it replaces."""

    @abstractmethod
    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the class names of the modules that the fused forward computes itself."""

    @abstractmethod
    def forward(self, block: Any, conditioning: Conditioning, *args: Any, **kwargs: Any) -> Any:
        """Computes what the block computes, from `arguments`."""

    @abstractmethod
    def example(self, block: Any, draw: Draw) -> dict[str, Any]:
        """Returns small inputs; fp64 tensors are states, taken in any dtype and differentiable."""

    @abstractmethod
    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns how often each op runs in one forward of the block."""

    def check(self, name: str, block: Any) -> None:
        """Raises NotImplementedError unless a block is what this was written for."""
        found = tuple(inspect.signature(type(block).forward).parameters)[1:]
        if found != self.arguments:
            raise unsupported(name, f"{self.block}.forward{self.arguments}", found)
        try:
            parts = self.parts(block)
        except AttributeError as missing:
            raise unsupported(name, f"{self.block} with its attributes", str(missing)) from missing
        for path, wanted in parts.items():
            part = _part(block, path)
            if type(part).__name__ != wanted:
                raise unsupported(f"{name}.{path}", f"of class {wanted}", type(part).__name__)
            if wanted == "RMSNorm" and getattr(part, "weight", None) is None:
                raise unsupported(f"{name}.{path}", "an RMSNorm with a weight", "one without")
        for path in self.attentions(block):
            wanted, processor = self.processors[path][0], _part(block, path).processor
            kind, backend = type(processor), getattr(processor, "_attention_backend", None)
            own = kind.__module__.startswith("diffusers.") and kind.__name__ == wanted
            if not own or backend is not None:
                chosen = "" if backend is None else f" with a backend, {as_text(backend)}"
                raise NotImplementedError(
                    f"accelerate: {name}.{path}.processor must be diffusers' {wanted}, got "
                    f"{kind.__module__}.{kind.__name__}{chosen}; try accelerate() first, and "
                    "other changes of attention after it"
                )

    def attentions(self, block: Any) -> list[str]:
        """Lists the attentions that get our processor: those that norm queries and keys."""
        found = {path: _part(block, path) for path in self.processors}
        return [p for p, part in found.items() if getattr(part, "norm_q", None) is not None]


def _part(block: Any, path: str) -> Any:
    try:
        return attrgetter(path)(block)
    except AttributeError:
        return None


def as_text(backend: object) -> str:
    """Returns the name of a backend of diffusers."""
    return str(getattr(backend, "value", backend))


def unsupported(where: str, wanted: str, actual: object) -> NotImplementedError:
    """Returns the error of a transformer that no binding was written for."""
    return NotImplementedError(
        f"accelerate: {where} must be {wanted}, got {actual}; "
        "try the version of diffusers that README names"
    )


def refuse(where: object, **extras: object) -> None:
    """Raises NotImplementedError for any argument that is neither None nor empty."""
    for name, value in extras.items():
        if value is not None and (isinstance(value, Tensor) or value):
            given = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise NotImplementedError(
                f"{type(where).__name__}: {name} must be unset once accelerated, got {given}; "
                "try undo() of what accelerate() returned"
            )


class Tables(NamedTuple):
    """Modulation of one stream in one block, (R, C) each: of attention, of the feed-forward."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    shift_ff: Tensor
    scale_ff: Tensor
    gate_ff: Tensor


def modulate(
    norm: Any,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    row: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
) -> ops.GateNormModulate:
    """Returns x + gate y, and that through a LayerNorm and modulated."""
    return ops.gate_norm_modulate(
        *(x, scale, shift, row),
        y_BSC=y,
        gate_RC=gate,
        weight_C=norm.weight,
        bias_C=norm.bias,
        eps=norm.eps,
    )


def enter(norm: Any, x: Tensor, temb: Tensor, row: Tensor) -> tuple[Tensor, Tables]:
    """Returns what an AdaLayerNormZero gives attention, and a stream's tables."""
    own = Tables(*norm.linear(norm.silu(temb)).chunk(6, 1))
    return modulate(norm.norm, x, own.scale, own.shift, row).out_BSC, own


def gated(x: Tensor, y: Tensor, gate: Tensor, row: Tensor) -> Tensor:
    """Returns x + gate y where no norm follows in the block."""
    gate = gate[row, None]
    if x.dtype == y.dtype == gate.dtype:
        return torch.addcmul(x, gate, y)
    dtype = wide(x.dtype)
    return torch.addcmul(x.to(dtype), gate.to(dtype), y.to(dtype)).to(x.dtype)


def finish(norm: Any, feed: nn.Module, x: Tensor, y: Tensor, own: Tables, row: Tensor) -> Tensor:
    """Adds what attention gave a stream, and its feed-forward."""
    residual, normed = modulate(norm, x, own.scale_ff, own.shift_ff, row, y, own.gate)
    return gated(residual, feed(normed), own.gate_ff, row)


def normalise(
    q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, tables: Sequence[Tensor] | None = None
) -> ops.QKNormRope:
    """Normalises queries and keys and rotates interleaved pairs by (cos, sin), (S, D) each."""
    cos, sin = (None, None) if tables is None else (t.to(wide(q.dtype)) for t in tables)
    return ops.qk_norm_rope(q, k, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps)


def angles(draw: Draw, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Returns example (cos, sin), (S, D) fp32, the same for both channels of a pair."""
    angle = draw(tokens, channels // 2).float().repeat_interleave(2, 1)
    return angle.cos(), angle.sin()
