"""Counts the bytes that tensors hold while code runs, and runs a model's code on tensors of none.

A dispatch mode adds up the storages that are alive. Under fake tensors the very code of the model
can be measured before its weights, or the device, have room for it. Letters: N rows of a call, D
latent elements.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from branchcore.model import Model, VelocityModel, call_velocity


class LiveBytes(TorchDispatchMode):
    """Within the block, the bytes of the storages that operations return and nobody freed yet.

    What an operation allocates and frees by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are older than the block."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                self._sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def restart(self) -> int:
        """Forgets the peak so far; returns what is alive."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it returns."""
        out = func(*args, **(kwargs or {}))
        self.watch(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@contextmanager
def faked(modules: Sequence[nn.Module], device: torch.device) -> Generator[None]:
    """Gives modules weights without memory, and gradients where they are trained, in the block."""
    own: list[tuple[nn.Module, str, Tensor | nn.Parameter]] = []
    fakes: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            for part in (part for module in modules for part in module.modules()):
                tensors = [
                    *part.named_parameters(recurse=False),
                    *part.named_buffers(recurse=False),
                ]
                for name, tensor in tensors:
                    own.append((part, name, tensor))
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _fake(tensor, device)
                    setattr(part, name, fakes[id(tensor)])
            yield
        finally:
            for part, name, tensor in own:
                setattr(part, name, tensor)
            _forget_cached(part for module in modules for part in module.modules())


def _forget_cached(parts: Iterable[nn.Module]) -> None:
    """Empties the caches of methods, as Qwen-Image's positions have: they hold fake tensors now."""
    for kind in {type(part) for part in parts}:
        for method in vars(kind).values():
            for cell in getattr(method, "__closure__", None) or ():
                getattr(cell.cell_contents, "cache_clear", lambda: None)()


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not isinstance(tensor, nn.Parameter):
        return fake
    parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    if tensor.requires_grad:
        parameter.grad = torch.empty_like(fake)
    return parameter


class Affine(NamedTuple):
    """Bytes over rows: a line through two measurements."""

    base: float
    per_row: float

    def at(self, rows: int) -> int:
        """Returns the bytes at this many rows; 0 rows need none."""
        return max(0, round(self.base + self.per_row * rows)) if rows else 0


class CallBytes(NamedTuple):
    """What model calls need beside weights and gradients, by number of rows or images."""

    call: Affine
    """Peak of a call without a graph, result included."""
    tape_call: Affine
    """Peak of a call with a graph."""
    tape: Affine
    """What its graph keeps, result included."""
    backward: Affine
    """Peak of its backward, in excess of what the graph keeps; can be below 0."""
    decode: Affine
    """Peak of decoding, result included."""
    image: int
    """Bytes of a decoded image or video."""
    prompt: int
    """Bytes of one prompt's conditioning."""
    velocity: int
    """Bytes of one velocity."""


def measure(model: Model, prompt: str, *, rows: tuple[int, int] = (2, 6)) -> CallBytes:
    """Measures calls, backward and decoding by running them on tensors without memory.

    Takes a few seconds for a model of any size. On a GPU the kernels' workspaces and the gaps of
    the allocator come on top.

    Args:
        model: as it will run: adapters, checkpointing and fused operations in place. One on the
            meta device is measured as if it were on the CPU.
        prompt: one that the model can encode or knows.
        rows: two numbers of rows; the lines go through these.
    """
    modules = [m for m in (model.module, getattr(model, "vae", None)) if isinstance(m, nn.Module)]
    device = next(model.module.parameters()).device
    with _off_meta(model, device) as device:
        model.with_prompts([prompt])  # what encoding leaves is on the host
        with LiveBytes() as live:
            view = model.with_prompts([prompt])
            text = live.now
        with faked(modules, device):
            weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
            weights += [w.grad for w in weights if w.grad is not None]
            calls = [_calls(view, n, weights) for n in rows]
            images = [_decode(model, n, weights) for n in (1, 2)]
    call, tape_call, tape, backward = (_line(rows, (calls[0][i], calls[1][i])) for i in range(4))
    return CallBytes(
        call=call,
        tape_call=tape_call,
        tape=tape,
        backward=backward,
        decode=_line((1, 2), (images[0][0], images[1][0])),
        image=images[0][1],
        prompt=text,
        velocity=calls[0][4] // rows[0],
    )


@contextmanager
def _off_meta(model: Any, device: torch.device) -> Generator[torch.device]:
    """Lets a model on the meta device put its inputs on the CPU."""
    if device.type != "meta":
        yield device
        return
    model.device = torch.device("cpu")
    try:
        yield torch.device("cpu")
    finally:
        model.device = device


def _line(at: tuple[int, int], values: tuple[int, int]) -> Affine:
    slope = (values[1] - values[0]) / (at[1] - at[0])
    return Affine(values[0] - slope * at[0], slope)


def _calls(
    view: VelocityModel, rows: int, weights: Sequence[Tensor]
) -> tuple[int, int, int, int, int]:
    """Returns the peaks of a call, of one with a graph, what this keeps, its backward, result."""
    device = weights[0].device

    def call() -> Tensor:
        x = torch.empty(rows, int(np.prod(view.latent_shape)), device=device)
        sigma, prompt = torch.empty(rows, device=device), torch.zeros_like(x[:, 0]).long()
        host = (np.full(rows, 0.5), np.zeros(rows, np.int64))
        return call_velocity(view, x, sigma, prompt, host=host)

    with LiveBytes() as live:
        live.watch(weights)
        start = live.restart()
        with torch.no_grad():
            size = call().nbytes
        plain = live.peak - start
        live.restart()
        v = call()
        peak, kept = live.peak - start, live.now - start
        live.restart()
        if v.requires_grad:
            v.backward(torch.empty_like(v))
        return plain, peak, kept, live.peak - start - kept, size


def _decode(model: Model, images: int, weights: Sequence[Tensor]) -> tuple[int, int]:
    with LiveBytes() as live, torch.no_grad():
        live.watch(weights)
        start = live.restart()
        latents = torch.empty(images, *model.latent_shape, device=weights[0].device)
        out = model.decode(latents)
        return live.peak - start, out.nbytes // images
