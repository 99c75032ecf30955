"""The work of an iteration: rows of model passes, their tokens, floating point operations, MFU."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from branchcore.flops import forward_flop
from branchcore.gradient import live_edges
from branchcore.model import CountsTokens, VelocityModel
from branchcore.plan import Ints
from branchcore.recipes.recipe import Recipe
from branchcore.report import asks_reference
from branchcore.stages import Batch

# TFLOP/s of dense bf16 matrix products, by the name that torch gives the device. From the vendors'
# data sheets, which print NVIDIA's with sparsity, that is twice these: A100, H100 and H200 (SXM),
# L40S, HGX B200; Ada GPU architecture, appendix A (RTX 4090, fp32 sums); AMD Instinct MI300X.
_PEAKS = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB": 312.0,
    r"NVIDIA A100 80GB PCIe": 312.0,
    r"NVIDIA H100 80GB HBM3": 989.4,
    r"NVIDIA H200": 989.4,
    r"NVIDIA L40S": 362.1,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"AMD Instinct MI300X": 1307.4,
    r"NVIDIA B200": 2250.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Returns the dense bf16 TFLOP/s that a GPU is sold with, None for one that is not in the list.

    A part of a GPU (MIG), and the slower cards of a chip (PCIe, NVL, laptop), are not in the list.
    """
    found = [peak for name, peak in _PEAKS.items() if re.fullmatch(name, device_name)]
    return found[0] if found else None


def mfu(
    tflop: float, seconds: float, device: torch.device, *, peak: float | None = None
) -> float | None:
    """Returns the share of a device's peak that a work comes to, None if the peak is not known.

    Args:
        tflop: done on this device.
        seconds: it took, positive.
        device: where.
        peak: TFLOP/s; None = as in the list, which has GPUs only.
    """
    if peak is None and device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device))
    return None if peak is None else tflop / (seconds * peak)


class PassFlop(NamedTuple):
    """Floating point operations per row, a multiply-add being two."""

    forward: float
    backward: float
    """What checkpointing computes again is in it; weights that are frozen cost half as much."""


def pass_flop(
    batch: Batch, parameters: Sequence[Tensor], max_batch: int | None = None
) -> PassFlop | None:
    """Counts a forward and a backward per row, on up to 4 rows of the first wave.

    No gradient is left behind, and no random state changed. Compiled regions run as written. On
    many ranks all must call it together, at a time when a backward synchronises gradients.

    Args:
        batch: of the iteration.
        parameters: that are trained.
        max_batch: rows of a model call at most.

    Returns:
        None where the counter cannot know, see `forward_flop`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton: not before it is needed

    rows = _Rows(batch.model)
    forward = forward_flop(batch.forest, rows, max_batch=max_batch)
    if forward is None:
        return None
    device = batch.forest.x.device
    counter = FlopCounterMode(display=False, custom_mapping=_BACKWARDS)
    alone = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    with alone, torch.compiler.set_stance("force_eager"), torch.enable_grad():
        v = batch.model.velocity(*rows.last)
        # no torch.autograd.grad: parameters that FSDP shards are not what a graph is made of
        with counter:
            v.sum().backward()
    for p, gradient in zip(parameters, before, strict=True):
        p.grad = gradient
    return PassFlop(forward, counter.get_total_flops() / len(v))


class _Rows:
    """A model that remembers the rows of its last call."""

    def __init__(self, model: VelocityModel) -> None:
        self.model, self.latent_shape = model, model.latent_shape
        self.last: tuple[Tensor, Tensor, Tensor]

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        self.last = x, sigma, prompt
        return self.model.velocity(x, sigma, prompt)

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return self.model.reference_velocity(x, sigma, prompt)


def _attention_backward(
    _: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *__: Any,
    **___: Any,
) -> int:
    """Five products, the scores again among them: the counter has this formula for CUDA alone."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """One forward's product for each of the two gradients: the counter's forgets the groups."""
    transposed, needed = others[4], others[7]
    positions = math.prod((x if transposed else gradient)[2:])
    return 2 * x[0] * positions * math.prod(weight) * (int(needed[0]) + int(needed[1]))


_BACKWARDS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


class WorkMeter:
    """Counts the rows of an iteration's passes, which `pass_flop` turns into operations.

    A row is a node's velocity, guidance included. Counted are rows whose result is needed: forwards
    of the rollout, of the reference, of parents that are on no tape; backwards of parents with a
    gradient. Decoding, rewards, evaluation and the other rows of a pruned tape are not.

    Args:
        recipe: the method.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.forwards, self.backwards, self.tokens = 0, 0, 0

    def count(self, batch: Batch, *, update: int, inner: int) -> None:
        """Counts a pass, and with the first pass the rollout; must come before its gradient.

        Args:
            batch: with the edge weights of the pass.
            update: which of the plan's updates.
            inner: passes of the iteration before this one.
        """
        forest, plan = batch.forest, batch.forest.plan
        objective, advantage = self.recipe.objective, batch.credit.advantage
        edges = live_edges(plan, advantage, batch.weight, objective, update)
        parents = np.unique(plan.action[edges])
        tape = [part.nodes for part in forest.tape] if update == 0 else []
        taped = np.isin(parents, np.concatenate([parents[:0], *tape]))
        calls = [parents[~taped]]
        calls += [parents] if asks_reference(self.recipe) else []
        calls += [np.flatnonzero(forest.evaluated)] if inner == 0 else []
        nodes = np.concatenate(calls)
        self.forwards += len(nodes)
        self.backwards += len(parents)
        self.tokens += _tokens(batch.model, plan.prompt[nodes].astype(np.int64))

    def metrics(self, flop: PassFlop | None) -> dict[str, float]:
        """Returns `tokens` and `tflop` as far as they are known; see `PassFlop`."""
        known: dict[str, float] = {"tokens": self.tokens} if self.tokens else {}
        if flop is None or not self.forwards:
            return known
        done = self.forwards * flop.forward + self.backwards * flop.backward
        return {**known, "tflop": done / 1e12}


def _tokens(model: VelocityModel, prompt: Ints) -> int:
    """Returns the tokens of rows with these prompts, 0 if the model does not count them."""
    if not isinstance(model, CountsTokens):
        return 0
    try:
        return int(np.sum(model.row_tokens(prompt)))
    except NotImplementedError:
        return 0  # a family whose texts are all padded alike
