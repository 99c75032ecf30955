"""Published shapes with random weights: no download.

What a benchmark, the census and the memory planner need of a model is its shape. Letters: N rows of
a call, P prompts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from branchcore.models import family_module
from branchcore.models.family import Family, Text
from branchcore.models.flow_model import FlowModel
from branchcore.models.sizing.published import SHAPES, Shape

__all__ = ["SHAPES", "Shape", "build", "build_vae", "family_of", "flow_model", "inputs", "texts"]
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def family_of(shape: Shape) -> Family:
    """Returns the adapter of a shape's architecture, with the defaults of its `from_pretrained`."""
    module = family_module(shape.architecture.family)
    own = [c for c in vars(module).values() if isinstance(c, type)]
    (family,) = (c for c in own if issubclass(c, Family) and c.__module__ == module.__name__)
    arguments = inspect.signature(module.from_pretrained).parameters
    names = inspect.signature(family).parameters
    return family(**{name: arguments[name].default for name in names})


@contextmanager
def _made_on(device: torch.device | str, dtype: torch.dtype) -> Generator[None]:
    """Modules made in the block are on a device and, unless they say otherwise, of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(
    shape: Shape,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
) -> nn.Module:
    """Builds the transformer with random weights, modulation included; frozen.

    Args:
        shape: which.
        device: where; "meta" makes no weights at all.
        dtype: of the weights, but for modules that the release keeps in float32.
        seed: of the weights: the same on one device.
    """
    import diffusers

    made = getattr(diffusers, family_of(shape).transformer)
    with _made_on(device, dtype):
        module: nn.Module = made(**shape.architecture.transformer)
    kept: Sequence[str] = getattr(made, "_keep_in_fp32_modules", None) or ()
    half = dtype in (torch.bfloat16, torch.float16)
    for name, parameter in module.named_parameters():
        if half and not set(kept).isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    return _drawn(module, seed).eval().requires_grad_(False)


def build_vae(
    shape: Shape,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
) -> nn.Module:
    """Builds the decoder with random weights; arguments as in `build`."""
    import diffusers

    name, options = shape.architecture.vae
    with _made_on(device, dtype):
        module: nn.Module = getattr(diffusers, name)(**options)
    return _drawn(module, seed).eval().requires_grad_(False)


@torch.no_grad()
def _drawn(module: nn.Module, seed: int) -> nn.Module:
    """Draws weights that keep activations at their size; gains of norms stay 1."""
    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    if device.type == "meta":
        return module
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in parameters.items():
        if parameter.ndim > 1:
            parameter.normal_(std=0.7 / math.sqrt(parameter[0].numel()), generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.02, generator=generator)
    return module


def texts(
    shape: Shape,
    prompts: int,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
) -> list[Text]:
    """Returns random conditioning of P prompts as the family's `encode` returns it."""
    generator = None
    if torch.device(device).type != "meta":
        generator = torch.Generator(device).manual_seed(seed)

    def drawn(name: str, widths: tuple[int, ...]) -> Tensor:
        sizes = [width or shape.tokens for width in widths]
        if name == "mask":
            return torch.ones(sizes, dtype=torch.int64, device=device)
        empty = torch.empty(sizes, dtype=dtype, device=device)
        return empty if generator is None else empty.normal_(generator=generator)

    spec = shape.architecture.text
    return [{name: drawn(name, widths) for name, widths in spec.items()} for _ in range(prompts)]


def inputs(
    shape: Shape,
    prompts: int,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> Text:
    """Returns the (P, ...) conditioning as the family's `stack` returns it."""
    return family_of(shape).stack(texts(shape, prompts, device, dtype))


class _RandomFlow(FlowModel):
    """A model whose prompts mean random numbers."""

    shape: Shape

    def encode(self, prompts: Sequence[str], *, release: bool = False) -> None:
        """Gives every new prompt, and the negative one, its own random conditioning."""
        for prompt in prompts:
            if prompt not in self._texts:
                self._texts[prompt] = self._drawn(1 + len(self._texts))
        if self._negative is None:
            self._negative = self._drawn(0)

    def _drawn(self, seed: int) -> Text:
        return texts(self.shape, 1, "cpu", torch.float32, seed=seed)[0]


def flow_model(
    shape: Shape,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    guidance: float = 1.0,
    seed: int = 0,
) -> FlowModel:
    """Builds a whole model: transformer, decoder and scheduler, without text encoders.

    Args:
        shape: which.
        device: where; "meta" for planning.
        dtype: of the weights.
        guidance: scale of classifier-free guidance, 1 = off.
        seed: of the weights.
    """
    import diffusers

    family = family_of(shape)
    made = getattr(diffusers, family.pipeline)
    parts: dict[str, Any] = dict.fromkeys(
        name
        for name, parameter in inspect.signature(made.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    )
    scheduler = getattr(diffusers, SCHEDULER)(**shape.architecture.scheduler)
    parts |= {"transformer": build(shape, device, dtype, seed=seed), "scheduler": scheduler}
    parts["vae"] = build_vae(shape, device, dtype, seed=seed)
    model = _RandomFlow(
        family,
        made(**parts),
        shape.size,
        guidance=guidance,
        negative_prompt="",
        dtype=dtype,
        device=device,
    )
    model.shape = shape
    return model
