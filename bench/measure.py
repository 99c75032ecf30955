"""Numbers and their uncertainty: paired rounds, bootstrap, peak memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

RESAMPLES = 10_000
SEED = 0


def median_ci(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of a median, resampled over rounds."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(SEED)
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))]
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Returns the median of slow / fast over rounds and its interval: how much faster `fast` is.

    Raises:
        ValueError: the rounds do not pair up.
    """
    if len(slow) != len(fast) or not len(slow):
        raise ValueError(
            f"paired_ratio: rounds must pair up and not be empty, got {len(slow)} and {len(fast)}"
        )
    ratios = np.asarray(slow, dtype=np.float64) / np.asarray(fast, dtype=np.float64)
    return float(np.median(ratios)), median_ci(ratios)


class PeakMemory:
    """Growth of the peak memory inside a block, MiB: CUDA allocations, else resident set size.

    On Linux the kernel's high-water mark (VmHWM) is reset first and unused heap is handed back, so
    that memory which an earlier plan freed counts again. Elsewhere `mib` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.mib = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            self.start = _reset_high_water_mark()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
        elif self.start is not None:
            self.mib = (_status_kib("VmHWM") - self.start) / 2**10


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, up to 2 GiB; tells whether it does (glibc).

    A trainer that repeats one iteration finds its pages again; plans that take turns would hand
    them back and fault them in anew, the more the larger their batches (0.2 to 0.8 of 1.2 s).
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # some versions let no block above 32 MiB stay on the heap
    large = mallopt(mmap_threshold, most) or mallopt(mmap_threshold, 2**25)
    return bool(large and mallopt(trim_threshold, most))


def _reset_high_water_mark() -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status_kib("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def tape_states(
    view: Any, device: torch.device, max_batch: int, share: float = 0.5, rows: int = 4
) -> int:
    """Returns how many states' graphs fit in the GPU's free memory; it runs a few.

    Args:
        view: model.
        device: GPU.
        max_batch: states whose graphs a backward makes anew beside those on the tape.
        share: of the memory that is then left; the rest is for what a call needs while it runs.
        rows: states to run.
    """
    x = torch.zeros(rows, *view.latent_shape, device=device)
    sigma, prompt = torch.full((rows,), 0.5, device=device), torch.zeros(rows, dtype=torch.int64)
    before = torch.cuda.memory_allocated(device)
    v = view.velocity(x, sigma, prompt.to(device))
    one = (torch.cuda.memory_allocated(device) - before) / rows
    v.sum().backward()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(int(share * (free / one - max_batch)), 0)


class Costs(NamedTuple):
    """What model calls cost, in forwards of the engine's own."""

    pair: float
    """Forward and backward."""
    released_forward: float
    """A forward as the released loops call it."""
    released_pair: float
    """A forward and backward as they call it: with guidance, both halves have a graph."""


def call_costs(view: Any, device: torch.device, rows: int = 64, repeats: int = 5) -> Costs:
    """Measures costs at a large batch, in turn; in CPU seconds on the CPU."""
    x = torch.zeros(rows, *view.latent_shape, device=device)
    sigma, prompt = torch.full((rows,), 0.5, device=device), torch.zeros(rows, dtype=torch.int64)
    prompt = prompt.to(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    def timed(call: Any, backward: bool) -> float:
        start = now()
        with torch.set_grad_enabled(backward):
            v = call(x, sigma, prompt)
        if backward:
            v.sum().backward()
        return now() - start

    released = getattr(view, "released_velocity", None)
    found: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        one = timed(view.velocity, False)
        pair = timed(view.velocity, True) / one
        if released is None:
            found.append((pair, 1.0, pair))
        else:
            found.append((pair, timed(released, False) / one, timed(released, True) / one))
    return Costs(*(float(value) for value in np.median(found[1:], axis=0)))
