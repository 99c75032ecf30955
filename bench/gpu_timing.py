"""Time prepared calls in turn on a GPU, in CUDA graphs and on inputs that are not in its cache.

A variant is prepared on several sets of inputs, so many that together they exceed the second-level
cache, and all its calls on them are captured in one graph; outputs stay alive, so that every call
writes memory of its own. A kernel is put before the first event that keeps the GPU busy until all
is enqueued: no launch latency is inside. Where a capture fails, the same calls are launched one by
one. On a CPU (rehearsals) the calls are simply timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
Make = Callable[[int], Call]
"""Makes the call on the i-th set of inputs; what it does itself is not timed."""

CACHES = 2.5
"""Inputs and outputs of all sets, in second-level caches."""
MOST_SETS, MOST_CALLS = 48, 64
PASS_SECONDS = 300e-6
"""One timed launch lasts at least this long, as far as MOST_CALLS allows."""
CYCLES_PER_SECOND = 2e9
HOST_CALLS = 20


class Spread(NamedTuple):
    """Quantiles over rounds."""

    p20: float
    median: float
    p80: float


class Prepared(NamedTuple):
    """A variant that is ready: one launch makes so many calls."""

    launch: Call
    calls: int
    graphed: bool
    host_seconds: float
    """What one call costs the host, launched from Python."""
    launch_seconds: float
    """What one launch costs the host: a replay of the graph, or all the calls."""
    kept: Any
    """What must stay alive as long as the launch: outputs and the graph's pool."""


def spread(values: Sequence[float]) -> Spread:
    """Returns p20, median and p80."""
    found = torch.tensor(values, dtype=torch.float64)
    return Spread(*found.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def paired(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Returns the spread of slow / fast, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the second-level cache; 1 MiB for a CPU, whose rehearsals are small."""
    if device.type != "cuda":
        return 2**20
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def num_sets(device: torch.device, footprint: int) -> int:
    """Returns how many sets of inputs keep a call from finding its own in the cache."""
    wanted = math.ceil(CACHES * cache_bytes(device) / max(footprint, 1))
    return min(max(wanted, 2), MOST_SETS if device.type == "cuda" else 2)


def context_is_dead() -> bool:
    """Whether the process has a GPU context that answers nothing but errors."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Lane:
    """A device and the stream on which everything is prepared, captured and timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None

    def prepare(self, make: Make, sets: int) -> Prepared:
        """Makes all inputs, warms up (compilation happens here) and captures."""
        with torch.cuda.stream(self.stream):
            calls = [make(i) for i in range(sets)]
            for call in (*calls, calls[0]):
                call()
        if not self.on_gpu:
            return Prepared(lambda: [call() for call in calls], sets, False, 0.0, 0.0, calls)
        self.wait()
        host = self._host_seconds(calls)
        alone = self.seconds(lambda: [call() for call in calls], host * sets) / sets
        times = math.ceil(min(PASS_SECONDS / max(alone, 1e-7), MOST_CALLS) / sets)
        ordered = calls * max(times, 1)
        try:
            graph, outputs = self._capture(ordered)
        except RuntimeError as error:
            print(f"    no graph: {str(error).splitlines()[0][:120]}", flush=True)
            self.wait()
            launch = lambda: [call() for call in ordered]  # noqa: E731
            return Prepared(launch, len(ordered), False, host, host * len(ordered), calls)
        replay = self._host_seconds([graph.replay], 1)
        return Prepared(graph.replay, len(ordered), True, host, replay, (calls, outputs))

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, launch: Call, host_seconds: float = 0.0) -> float:
        """Times one launch; host_seconds is what enqueueing it takes."""
        if not self.on_gpu:
            start = time.perf_counter()
            launch()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int((1.5 * host_seconds + 100e-6) * CYCLES_PER_SECOND))
            start.record()
            launch()
            end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def _host_seconds(self, calls: Sequence[Call], times: int = HOST_CALLS) -> float:
        with torch.cuda.stream(self.stream):
            start = time.perf_counter()
            for i in range(times):
                calls[i % len(calls)]()
            taken = time.perf_counter() - start
        self.wait()
        return taken / times

    def _capture(self, calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = [call() for call in calls]
        with torch.cuda.stream(self.stream):
            graph.replay()
        self.wait()
        return graph, outputs


def time_in_turn(
    lane: Lane, variants: Mapping[str, Prepared], seconds: float, rounds: tuple[int, int] = (7, 40)
) -> dict[str, list[float]]:
    """Times all variants once per round, for about so many seconds.

    Returns:
        Seconds per call, by variant and round.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    start, done, total = time.perf_counter(), 0, rounds[0]
    while done < total:
        for name, variant in variants.items():
            taken = lane.seconds(variant.launch, variant.launch_seconds)
            found[name].append(taken / variant.calls)
        done += 1
        if done == 1:
            one = max(time.perf_counter() - start, 1e-6)
            total = min(max(int(seconds / one), rounds[0]), rounds[1])
    return found
