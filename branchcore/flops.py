"""The work that pruning saves: FLOPs of a forward as the model runs it, and passes in forwards.

A backward counts as `report.BACKWARD` forwards. Letters: M rows, N rows of a call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from branchcore.credit import Floats
from branchcore.forest import Forest
from branchcore.gradient import live_edges
from branchcore.model import VelocityModel, call_velocity
from branchcore.plan import Ints
from branchcore.recipes.recipe import Recipe
from branchcore.report import BACKWARD, asks_reference
from branchcore.stages import Batch

_ROWS = 4
_NO_PRODUCT = (
    "aten",
    "prim",
    "prims",
    "branchcore",
    "profiler",
    "c10d",
    "_c10d_functional",
    "fsdp",
)
"""Namespaces whose operators are no matrix products, but for those named so."""
_PRODUCT = re.compile(r"attention|convolution|conv\d|(mm|gemm|matmul|linear)(_|$)")


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Scores and values: the counter has this formula for the kernels of CUDA alone."""
    pairs = math.prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


_MORE: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention,
}


def forward_flop(
    forest: Forest, model: VelocityModel, *, max_batch: int | None = None
) -> float | None:
    """Counts the floating point operations of a forward per row, a multiply-add being two.

    One call of up to 4 rows of the first wave, run as a training forward that keeps nothing for a
    backward: calls without gradient may be CUDA graphs, in which nothing is seen. Compiled regions
    run as they were written. The random state is left as it was.

    Args:
        forest: its plan and noise levels are those of the rows; the states are of no account.
        model: the policy.
        max_batch: rows of a call at most.

    Returns:
        None where the counter cannot know: it saw no matrix product, or operators of packages that
        it has no formula for.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton: not before it is needed

    plan = forest.plan
    nodes = np.flatnonzero(plan.evaluated)
    nodes = nodes[plan.depth[nodes] == plan.depth[nodes].min()]
    most = min(_ROWS, max_batch or _ROWS)
    nodes = nodes[np.unique(np.linspace(0, len(nodes) - 1, most).round().astype(np.int64))]
    rows = torch.from_numpy(nodes).to(forest.x.device)
    sigma, prompt = forest.sigma[rows], forest.prompt[rows]
    host = (plan.sigma[nodes], plan.prompt[nodes])
    x, device = forest.x[:1].repeat(len(nodes), 1), forest.x.device
    cuda = [device] if device.type == "cuda" else []
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    others = _Others(counter.flop_registry)
    with ExitStack() as around:
        around.enter_context(torch.random.fork_rng(devices=cuda))
        around.enter_context(torch.compiler.set_stance("force_eager"))
        around.enter_context(torch.enable_grad())
        around.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda _: None, _forgotten))
        around.enter_context(counter)
        around.enter_context(others)
        call_velocity(model, x, sigma, prompt, host=host)
    flop = counter.get_total_flops()
    return flop / len(nodes) if flop and not others.names else None


def _forgotten(_: None) -> Tensor:
    raise RuntimeError("forward_flop: a counted call must have no backward, got one")


class _Others(TorchDispatchMode):
    """Remembers operators that may be matrix products and that the counter has no formula for."""

    supports_higher_order_operators = True

    def __init__(self, known: Collection[Any]) -> None:
        super().__init__()
        self.known = known
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        operator = getattr(func, "overloadpacket", func)
        space, _, name = str(operator).partition(".")
        if operator not in self.known and (space not in _NO_PRODUCT or _PRODUCT.search(name)):
            self.names.add(str(operator))
        return func(*args, **(kwargs or {}))


class Work(NamedTuple):
    """Passes of an iteration, in forwards."""

    spent: float = 0.0
    saved: float = 0.0

    def plus(self, other: Work) -> Work:
        """Returns the work of both."""
        return Work(self.spent + other.spent, self.saved + other.saved)

    def metrics(self, flop: float | None) -> dict[str, float]:
        """Returns `work_saved`, a share of all there was to do, and `tflop_saved` if it is known.

        Of prompts that were not rolled out it is the rollout: nobody knows what they would train.

        Args:
            flop: of a forward, `forward_flop`.
        """
        share = self.saved / max(self.spent + self.saved, 1.0)
        known = {} if flop is None else {"tflop_saved": self.saved * flop / 1e12}
        return {"work_saved": share, **known}


def pass_work(
    batch: Batch, weight_M: Floats, recipe: Recipe, *, update: int, tape: int | None
) -> Work:
    """Returns what one pass costs, and what it does not cost since edges have weight 0.

    A parent costs a backward, a forward if it is on no tape, and one of the reference if there is a
    KL or a preference. Saved are those of parents that would have had a gradient; that of a dropped
    parent on the tape counts as saved too.

    Args:
        batch: before the pass, its tape in place.
        weight_M: (M,) edge weights of the pass.
        recipe: the method.
        update: which of the plan's updates.
        tape: nodes that the rollout would have taped if nothing were dropped; None = all.
    """
    forest, advantage = batch.forest, batch.credit.advantage
    plan = forest.plan

    def parents(weight: Floats) -> Ints:
        edges = live_edges(plan, advantage, weight, recipe.objective, update)
        return np.unique(plan.action[edges])

    every, kept = parents(np.ones(len(plan))), parents(weight_M)
    first = np.unique(plan.action[plan.trained(0)])
    planned = first[plan.evaluated[first]][:tape]
    taped = [part.nodes for part in forest.tape] if update == 0 else []
    on_tape = np.concatenate([np.zeros(0, dtype=np.int64), *taped])
    again = np.count_nonzero(~np.isin(kept, on_tape))
    avoided = np.count_nonzero(~np.isin(every, planned)) - again
    each = BACKWARD + asks_reference(recipe)
    return Work(each * len(kept) + again, each * (len(every) - len(kept)) + avoided)
