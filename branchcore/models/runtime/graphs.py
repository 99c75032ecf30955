"""CUDA graphs for rollouts: one per bucket of rows, replayed without any work on the host.

Letters: N rows of a call, B rows of its bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from branchcore.models.adapters import has_lora
from branchcore.models.family import Text
from branchcore.models.flow_model import FlowModel
from branchcore.models.runtime.change import Change
from branchcore.packing import balanced_chunks

Call = Callable[[], Tensor]
WARM_UP = 3
"""Calls before a capture: libraries choose kernels and allocate workspaces in the first ones."""
KEPT = 16
"""Graphs of a transformer; the one unused for longest goes first. Buckets with and without adapters
are fewer, but texts of another length are other graphs."""


class Inputs(NamedTuple):
    """Arguments of a family's `predict` that have a row per state."""

    x: Tensor
    sigma: Tensor
    text: Text

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Returns the inputs with every tensor changed."""
        text = {name: change(value) for name, value in self.text.items()}
        return Inputs(change(self.x), change(self.sigma), text)

    def tensors(self) -> list[Tensor]:
        """Returns all tensors in a fixed order."""
        return [self.x, self.sigma, *(self.text[name] for name in sorted(self.text))]


class _Graph(NamedTuple):
    inputs: Inputs
    """What the next replay reads, B rows each."""
    replay: Call


class BucketedCalls:
    """Answers calls without gradient by graphs of a few fixed batch sizes.

    Rows are padded up to the next bucket with copies of row 0, and calls of more rows than the
    largest bucket are split. Inside of a graph nothing is shared between rows: shapes are fixed
    there, the number of distinct prompts and sigmas is not. Per-row text work is at most 0.2 % of
    a FLUX, SD3 or Qwen-Image forward, 1.3 % of Wan's and 4 % of SANA's.

    Args:
        model: whose transformers are called.
        buckets: batch sizes, increasing.
        capture: turns a call that reads fixed memory into one that repeats it.
    """

    def __init__(
        self, model: FlowModel, buckets: Sequence[int], capture: Callable[[Call], Call]
    ) -> None:
        self.model, self.buckets, self.capture = model, tuple(buckets), capture
        self._graphs: dict[nn.Module, dict[tuple[Any, ...], _Graph]] = {}
        self._weights: dict[nn.Module, tuple[int, ...]] = {}

    def predict(self, module: nn.Module, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """Returns what the family's `predict` would, for packed states of N rows."""
        weights, off = fingerprint(module)
        if self._weights.get(module) != weights:
            self._weights[module] = weights
            self._graphs.pop(module, None)
        inputs = Inputs(x, sigma, text)
        parts = [
            self._run(module, off, inputs.each(lambda value, rows=slice(lo, hi): value[rows]))
            for lo, hi in balanced_chunks(len(x), self.buckets[-1])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, module: nn.Module, off: tuple[bool, ...], inputs: Inputs) -> Tensor:
        count = len(inputs.x)
        bucket = next(size for size in self.buckets if size >= count)
        inputs = inputs.each(partial(padded, bucket=bucket))
        kinds = [(tuple(value.shape), value.dtype) for value in inputs.tensors()]
        key = (tuple(sorted(inputs.text)), *kinds, off)
        graphs = self._graphs.setdefault(module, {})
        graph = graphs.pop(key, None)
        if graph is None:
            if len(graphs) == KEPT:
                del graphs[next(iter(graphs))]
            graph = _Graph(inputs, self.capture(self._call(module, inputs)))
        else:
            for static, value in zip(graph.inputs.tensors(), inputs.tensors(), strict=True):
                static.copy_(value)
        graphs[key] = graph
        # the next replay overwrites the graph's own result
        return graph.replay()[:count].clone()

    def _call(self, module: nn.Module, inputs: Inputs) -> Call:
        family, shape = self.model.family, self.model.latent_shape
        return lambda: family.predict(module, inputs.x, inputs.sigma, inputs.text, shape)


def padded(value: Tensor, bucket: int) -> Tensor:
    """Returns a new tensor of `bucket` rows: those of (N, ...), then copies of row 0."""
    return torch.cat([value, value[:1].expand(bucket - len(value), *value.shape[1:])])


def fingerprint(module: nn.Module) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Returns where the weights lie and which adapted layers are off; 2 ms for SD3.5-medium.

    A graph reads addresses, and the reference policy (adapters off) is a graph of its own.
    """
    adapted: tuple[type, ...] = ()
    if has_lora(module):
        from peft.tuners.lora import LoraLayer

        adapted = (LoraLayer,)
    addresses: list[int] = []
    off: list[bool] = []
    todo: list[Any] = [module]
    while todo:
        part = todo.pop()
        # quicker than parameters() and a search for adapters, and needed at every call
        addresses += [p.data_ptr() for p in vars(part)["_parameters"].values() if p is not None]
        todo += [child for child in vars(part)["_modules"].values() if child is not None]
        if isinstance(part, adapted):
            off.append(part.disable_adapters)
    return tuple(addresses), tuple(off)


def graph_rollout(model: FlowModel, buckets: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Change:
    """Serves the model's calls without gradient by CUDA graphs, one per bucket of rows.

    Small batches of an eager transformer wait for the host: thousands of launches a forward. A
    graph is captured at the first call of its bucket, and again for the reference policy. Weights
    are read where they lie: optimizers that update them in place need nothing; a model whose
    weights were moved or replaced is captured again. Calls with gradient (the tape, updates) go
    the normal way. Guidance doubles the rows of a call: choose buckets for 2 N.

    Args:
        model: on a CUDA device; switch its other accelerations on first.
        buckets: batch sizes; a call has its rows padded to the next one.

    Raises:
        NotImplementedError: the model is not on a CUDA device.
        ValueError: buckets that are not increasing positive numbers, or graphs already there.
        RuntimeError: later, at a call that cannot be captured because it copies between host and
            device: Qwen-Image's does where prompts of different length need a mask.
    """
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(
            f"graph_rollout: buckets must be increasing positive numbers, got {tuple(buckets)}"
        )
    if model.device.type != "cuda":
        raise NotImplementedError(
            f"graph_rollout: model must be on a CUDA device, got {model.device}; try compile_blocks"
        )
    if model.rollout_predict is not None:
        raise ValueError("graph_rollout: model must have no graphs yet, got some; try undo()")
    calls = BucketedCalls(model, buckets, CudaCapture(model.device))
    model.rollout_predict = calls.predict

    def undo() -> None:
        model.rollout_predict = None

    sizes = ", ".join(map(str, buckets))
    return Change(
        f"CUDA graphs for calls without gradient in batches of {sizes}: no launch from the host, "
        "rows padded to the next size, nothing shared between rows inside",
        undo,
    )


class CudaCapture:
    """Captures calls on one device; graphs that are alive together share one pool of memory.

    The next replay overwrites a result.

    Args:
        device: of the call's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch's own capture stream is on the device of the process's first capture
        self._beside = torch.cuda.Stream(device)
        self._pool: Any = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, call: Call) -> Call:
        """Returns a function that repeats a call on the same memory."""
        with torch.cuda.device(self.device), torch.no_grad():
            self._beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._beside):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(self._beside)
            graph, out = self._capture(call)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _capture(self, call: Call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if not self._alive:
            # torch gives a pool up with its last graph, and refuses to use it again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # threads that score rewards may allocate meanwhile
        recording = torch.cuda.graph(graph, self._pool, self._beside, "thread_local")
        try:
            # a capture that fails leaves its own stream current
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                out = call()
        except RuntimeError as error:
            raise RuntimeError(
                "graph_rollout: model must neither read nor copy between host and device inside"
                f" of a call, got {error.__context__ or error}; try undo()"
            ) from error
        self._alive.add(graph)
        return graph, out
