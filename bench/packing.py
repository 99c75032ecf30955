"""Measure how densely model calls are filled by token cost, and what packing costs.

python bench/packing.py --json bench/results/packing.json

A parent's cost is the tokens of its model call: patches of its latent and its text. Sets, drawn
independently per parent, as pruning leaves them:

buckets  images of side 512, 768 or 1024 px by 0.4, 0.3, 0.3 and an aspect ratio of RATIOS at about
         that area; a token per 16 x 16 px; text 16 to 512 tokens, log-normal around 64
sides    images whose height and width are any multiples of 64 from 512 to 1024 px; the same text
clips    the same, every second one a video of 33 frames, which are 9 in the latent
texts    completions of a language model, 32 to 1024 tokens, log-normal around 450

A call holds the longest item, or 1.25 or 2 times that. Next-fit takes items as they come (window
1); `sorted` has them all at once, the longest first, which no queue has. Sets of few sizes leave
gaps that nothing fits in, whatever the order.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray

from branchcore import use
from branchcore.packing import WINDOW, pack

Ints = NDArray[np.int64]
RATIOS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
SIDES = np.arange(512, 1025, 64) // 16
TEXT = (64, 16, 512)
SPACE = {"the longest": 1.0, "1.25 of it": 1.25, "2 of it": 2.0}
WINDOWS = (1, 8, WINDOW, 512)
COUNTS = (20_000, 100_000)
REFERENCE_COUNT = 2_000


def buckets(rng: np.random.Generator, count: int) -> Ints:
    """Draws images of few sizes."""
    side = rng.choice([512, 768, 1024], size=count, p=[0.4, 0.3, 0.3])
    ratio = np.sqrt(rng.choice(RATIOS, size=count))
    height, width = (np.round(side * r / 64).astype(np.int64) * 4 for r in (1 / ratio, ratio))
    return height * width + lengths(rng, count, *TEXT)


def sides(rng: np.random.Generator, count: int) -> Ints:
    """Draws images of many sizes."""
    return rng.choice(SIDES, count) * rng.choice(SIDES, count) + lengths(rng, count, *TEXT)


def clips(rng: np.random.Generator, count: int) -> Ints:
    """Draws stills and videos of many sizes."""
    patches = rng.choice(SIDES, count) * rng.choice(SIDES, count)
    return patches * rng.choice([1, 9], count) + lengths(rng, count, *TEXT)


def texts(rng: np.random.Generator, count: int) -> Ints:
    """Draws completions."""
    return lengths(rng, count, 450, 32, 1024)


def lengths(rng: np.random.Generator, count: int, middle: int, low: int, high: int) -> Ints:
    """Draws log-normal numbers of tokens around a median, cut at both ends."""
    drawn = middle * np.exp(0.6 * rng.normal(size=count))
    return np.clip(drawn, low, high).astype(np.int64)


SETS = {"buckets": buckets, "sides": sides, "clips": clips, "texts": texts}


def milliseconds(tokens: Ints, capacity: int, window: int, repeats: int) -> float:
    """Returns the median CPU time of packing."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        pack(tokens, capacity, window)
        times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times)


def row(name: str, space: str) -> dict[str, Any]:
    """Measures one set and capacity."""
    tokens = {count: SETS[name](np.random.default_rng(0), count) for count in COUNTS}
    fewer = tokens[COUNTS[0]]
    capacity = int(SPACE[space] * max(drawn.max() for drawn in tokens.values()))
    density = {f"{w}": pack(fewer, capacity, w).density(fewer, capacity) for w in WINDOWS}
    everything = pack(np.sort(fewer)[::-1], capacity, len(fewer)).density(fewer, capacity)
    some = fewer[:REFERENCE_COUNT]
    with use("reference"):
        reference_ms = milliseconds(some, capacity, WINDOW, 3)
    return {
        "set": name,
        "space": space,
        "capacity": capacity,
        "mean_tokens": float(fewer.mean()),
        "density_by_window": density,
        "density_sorted": everything,
        "ms": {f"{n}": milliseconds(t, capacity, WINDOW, 9) for n, t in tokens.items()},
        "ms_of_2000": {
            "compiled": milliseconds(some, capacity, WINDOW, 9),
            "reference": reference_ms,
        },
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    rows = [row(name, space) for name in SETS for space in SPACE]
    for r in rows:
        found = ", ".join(f"W={w} {d:.3f}" for w, d in r["density_by_window"].items())
        print(
            f"{r['set']:7} {r['capacity']:6} tokens a call (mean {r['mean_tokens']:.0f}): {found}, "
            f"sorted {r['density_sorted']:.3f}; {COUNTS[1]} in {r['ms'][str(COUNTS[1])]:.1f} ms; "
            f"{REFERENCE_COUNT} in "
            f"{r['ms_of_2000']['compiled']:.2f} ms, reference {r['ms_of_2000']['reference']:.1f} ms"
        )
    if args.json:
        args.json.write_text(json.dumps({"meta": machine.facts(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
