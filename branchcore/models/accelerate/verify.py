"""Compares a fused block with diffusers' own, on random weights and inputs, before it is kept.

A block's arithmetic is judged by what it was built of, not by its weights: these are replaced for
the comparison by random ones without zeros, so that no gate hides a branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Hashable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from branchcore.models.accelerate.binding import BlockBinding

FP32 = 2e-6
"""Rounding that architectures do in fp32 whatever the dtype, through a block."""
PLAIN = bool, int, float, str, type(None)


def structure(block: nn.Module) -> Hashable:
    """Returns what a block is built of: equal for blocks that compute the same from weights."""
    parts = tuple(
        (
            *(name, type(part), type(getattr(part, "processor", None))),
            tuple(
                sorted(
                    (key, value)
                    for key, value in vars(part).items()
                    if isinstance(value, PLAIN) and key != "training"
                )
            ),
        )
        for name, part in block.named_modules()
    )
    return parts, tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())


def first_weight(block: nn.Module, binding: BlockBinding) -> Tensor:
    """Returns a weight of the dtype and on the device of the block's states."""
    attention = block.get_submodule(next(iter(binding.processors)))
    return next(weight for weight in attention.parameters() if weight.ndim > 1)


class Trial:
    """What a block computes before it is accelerated.

    Args:
        name: of the block.
        block: as diffusers made it; weights of a dtype that the ops take, on their device.
        binding: of its class.
    """

    def __init__(self, name: str, block: nn.Module, binding: BlockBinding) -> None:
        self.name, self.block, self.binding = name, block, binding
        weight = first_weight(block, binding)
        self.dtype, self._generator = weight.dtype, torch.Generator(weight.device)
        self._exact = self._run(torch.float64)
        self._eager = self._exact if self.dtype == torch.float64 else self._run(self.dtype)

    def compare(self) -> Mapping[str, int]:
        """Returns the calls of every op in the fused forward.

        In fp64 only the order of operations may differ from diffusers, and what it rounds to fp32
        inside: 2e-6 of the largest value, where at most 2e-7 was found. In the block's dtype the
        error against fp64 is at most twice diffusers' own, as in the ops' conformance, plus that
        or two units of the last place.

        Raises:
            RuntimeError: outputs or gradients differ by more, or an op ran more or less often than
                the binding says.
        """
        with _Calls() as counted:
            found = self._run(torch.float64)
        forward = {op: counted.calls[op] for op in self.binding.calls(self.block)}
        if forward != self.binding.calls(self.block):
            raise RuntimeError(
                f"accelerate: {self.name} must call {self.binding.calls(self.block)}, got {forward}"
            )
        self._check(found, self._exact, torch.float64)
        if self.dtype != torch.float64:
            self._check(self._run(self.dtype), self._eager, self.dtype)
        return forward

    def _check(self, found: _Results, eager: _Results, dtype: torch.dtype) -> None:
        floor = max(2 * torch.finfo(dtype).eps, FP32)
        for kind in _Results._fields:
            mine, theirs, exact = (getattr(each, kind) for each in (found, eager, self._exact))
            scale = max((float(value.abs().max()) for value in exact.values()), default=0.0)
            for key in exact:
                error, own = (_distance(each[key], exact[key]) for each in (mine, theirs))
                if not error <= 2 * own + floor * scale:
                    raise RuntimeError(
                        f"accelerate: {self.name} ({self.binding.block}) must equal diffusers' "
                        f"own forward within {2 * own + floor * scale:.2g}, got {error:.2g} in "
                        f"{kind} {key}, {dtype}; try the version of diffusers that README names"
                    )

    def _run(self, dtype: torch.dtype) -> _Results:
        with _alone(self.block), torch.inference_mode(False), torch.enable_grad():
            self._generator.manual_seed(0)
            weights = self._weights(dtype)
            inputs = {name: _state(value, dtype) for name, value in self._example().items()}
            out = functional_call(self.block, weights, (), inputs)
            outputs = [
                each for each in (out if isinstance(out, tuple) else (out,)) if each is not None
            ]
            # a cotangent for each output, the same for every dtype
            total = torch.stack(
                [(each.double() * self._draw(*each.shape)).sum() for each in outputs]
            ).sum()
            leaves = {
                name: value
                for name, value in (weights | inputs).items()
                if isinstance(value, Tensor) and value.requires_grad
            }
            grads: list[Any] = [*torch.autograd.grad(total, [*leaves.values()], allow_unused=True)]
        return _Results(
            {str(i): each.detach().double() for i, each in enumerate(outputs)},
            {
                name: torch.zeros_like(leaf).double() if grad is None else grad.double()
                for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
            },
        )

    def _draw(self, *sizes: int) -> Tensor:
        generator = self._generator
        return torch.randn(sizes, dtype=torch.float64, device=generator.device, generator=generator)

    def _example(self) -> dict[str, Any]:
        return self.binding.example(self.block, self._draw)

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Draws weights; those kept in fp32 stay so unless all is fp64. Vectors are leaves.

        Matrices of half the gain that keeps a variance: attention that saturates would multiply
        rounding errors, and both sides' would differ more than twofold.
        """
        weights: dict[str, Tensor] = {}
        for name, parameter in self.block.named_parameters():
            if parameter.ndim > 1:
                value = 0.5 * self._draw(*parameter.shape) / parameter[0].numel() ** 0.5
            else:
                value = 0.2 * self._draw(*parameter.shape) + float(name.endswith("weight"))
            value = value.to(parameter.dtype if dtype != torch.float64 else dtype)
            weights[name] = value.requires_grad_(parameter.ndim < 2)
        return weights


class _Results(NamedTuple):
    output: dict[str, Tensor]
    gradient: dict[str, Tensor]


class _Calls(TorchDispatchMode):
    """Counts the ops of branchcore that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "branchcore":
            self.calls[func._schema.name.removeprefix("branchcore::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _alone(block: nn.Module) -> Generator[None]:
    """Without dropout, and with attention that takes fp64."""
    modules = list(block.modules())
    training = [module.training for module in modules]
    found: list[Any] = [getattr(module, "processor", None) for module in modules]
    processors = {id(processor): processor for processor in found}
    # a class of branchcore's answers by a property: "native" wherever gradient is enabled
    backends = [
        (p, p._attention_backend)
        for p in processors.values()
        if hasattr(p, "_attention_backend")
        and not isinstance(getattr(type(p), "_attention_backend", None), property)
    ]
    block.eval()
    for processor, _ in backends:
        processor._attention_backend = "native"
    try:
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for processor, backend in backends:
            processor._attention_backend = backend


def _state(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        return value.to(dtype).requires_grad_()
    return value


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
