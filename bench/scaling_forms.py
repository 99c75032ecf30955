"""Closed forms of what an iteration communicates, and what they come to on many GPUs.

Letters: n processes that share a collective, U optimizer updates, R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

GATHERS, SCATTERS, REDUCES, CONTROL = "all-gather", "reduce-scatter", "all-reduce", "control"
Shapes = Sequence[tuple[int, ...]]


class Sent(NamedTuple):
    """Collectives of one process and the bytes that it sends in them."""

    number: int
    bytes: float

    def times(self, count: int) -> Sent:
        """Returns so many of these."""
        return Sent(self.number * count, self.bytes * count)


def ring_bytes(kind: str, payload: int, n: int) -> float:
    """Returns what one of n processes sends of a whole tensor of `payload` bytes, in a ring."""
    return (2 if kind == REDUCES else 1) * (n - 1) / n * payload


def parts_of(module: nn.Module) -> list[list[tuple[int, ...]]]:
    """Returns the parameter shapes of everything that FSDP2 gathers as one; the rest is last."""
    lists = [part for part in module.children() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = [tuple(p.shape) for p in module.parameters() if id(p) not in inside]
    return [[tuple(p.shape) for p in block.parameters()] for block in blocks] + [rest]


def part_bytes(shapes: Shapes, n: int, itemsize: int) -> int:
    """Returns the bytes of a part, the first dimension of each tensor padded to a multiple of n."""
    return itemsize * sum(-(-s[0] // n) * n * math.prod(s[1:]) for s in shapes)


def all_parts(
    kind: str, parts: Sequence[Shapes], n: int, itemsize: int = 4, *, shards: int | None = None
) -> Sent:
    """Returns what gathering or scattering all parts once sends.

    Args:
        kind: GATHERS or SCATTERS; REDUCES of the shards of `shards` processes over n copies.
        parts: of `parts_of`.
        n: processes of a collective.
        itemsize: bytes of a number.
        shards: processes that share a copy; None = n.
    """
    split = shards or n
    payloads = [part_bytes(part, split, itemsize) for part in parts]
    if kind == REDUCES:
        payloads = [payload // split for payload in payloads]
    return Sent(len(parts), sum(ring_bytes(kind, payload, n) for payload in payloads))


def replicated(sizes: Sequence[int], n: int, bucket: int, updates: int = 1) -> Sent:
    """Returns the all-reduces of an iteration whose weights are replicated.

    Args:
        sizes: bytes of the gradients, in order.
        n: processes.
        bucket: most bytes of one all-reduce.
        updates: U.
    """
    count, filled = 0, bucket + 1
    for size in sizes:
        if filled + size > bucket:
            count, filled = count + 1, 0
        filled += size
    return Sent(count, ring_bytes(REDUCES, sum(sizes), n)).times(updates)


def sharded_gathers(updates: int, calls: int = 0, passes: int = 0, *, reshard: bool = False) -> int:
    """Returns how often all weights are gathered in an iteration.

    Args:
        updates: U; weights that stay whole are gathered once for each.
        calls: forwards without a gradient.
        passes: forwards with a backward, the one of weight zero that ends an update included.
        reshard: gathered for every call.
    """
    return calls + 2 * passes if reshard else updates


def control(updates: int, rounds: int, *, sharded: bool, reshard: bool) -> int:
    """Returns the small collectives: prompts, errors, masked leaves, metrics, times; norms, counts.

    Args:
        updates: U.
        rounds: R of the process that has the most.
        sharded: the norm of the gradient is summed up.
        reshard: rounds, calls and passes are agreed on, and errors where they are: once, after
            every rollout and after its scores instead of once per update.
    """
    errors = 1 + 2 * rounds if reshard else updates
    agreed = updates * (1 + rounds) + rounds
    return 4 + 2 * errors + sharded * updates + reshard * agreed


class Loop(NamedTuple):
    """Calls of a released training loop on one GPU in one iteration."""

    name: str
    rollout: int
    edges: int
    updates: int


LOOPS = (Loop("BranchGRPO", 406, 436, 37), Loop("DanceGRPO, 8 GPUs", 384, 216, 2))
"""Two prompts of 16 leaves, 20 steps, and two of 12 samples, 16 steps of which 9 are trained: the
released scripts for FLUX, one row a call, FSDP full shard in fp32 without `no_sync`."""


def released(loop: Loop, parts: Sequence[Shapes], n: int) -> Sent:
    """Returns what a released loop sends: weights for every forward and backward, all gradients."""
    gathers = all_parts(GATHERS, parts, n).times(loop.rollout + 2 * loop.edges)
    scatters = all_parts(SCATTERS, parts, n).times(loop.edges)
    return Sent(gathers.number + scatters.number, gathers.bytes + scatters.bytes)


class Calls(NamedTuple):
    """Model calls of one process: forwards without a gradient, forwards with a backward."""

    calls: int
    passes: int


def engine(
    parts: Sequence[Shapes],
    n: int,
    updates: int,
    *,
    mixed: bool = False,
    shards: int | None = None,
    made: Calls | None = None,
) -> Sent:
    """Returns what branchcore sends of sharded weights and gradients.

    Args:
        parts: of `parts_of`.
        n: processes.
        updates: U.
        mixed: gathered in bfloat16, reduced in float32.
        shards: processes that share a copy; None = all.
        made: calls of a process with `reshard`; None = weights stay whole.
    """
    copy = shards or n
    times = sharded_gathers(updates, *(made or (0, 0)), reshard=made is not None)
    sent = [
        all_parts(GATHERS, parts, copy, 2 if mixed else 4).times(times),
        all_parts(SCATTERS, parts, copy).times(updates),
    ]
    if copy < n:
        sent.append(all_parts(REDUCES, parts, n // copy, shards=copy).times(updates))
    return Sent(sum(s.number for s in sent), sum(s.bytes for s in sent))


def row(model: str, method: str, gpus: int, sent: Sent, control: int | None) -> dict[str, Any]:
    """Returns a line of the result."""
    return {
        "model": model, "method": method, "gpus": gpus, "collectives": sent.number,
        "control": control, "gigabytes": sent.bytes / 1e9,
    }  # fmt: skip
