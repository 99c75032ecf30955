"""What a tape costs whose rows are dropped after the rewards: whole, masked, or computed again.

    python bench/masked_backward.py [--widths 64 256 512 768] [--rows 16] [--kept 0.5] [--rounds 7]
        [--device cpu] [--json bench/results/masked_backward.json]

An MMDiT with a LoRA (bench/mmdit.py), two blocks of heads of 64, 64 image and 16 text tokens.
Seconds of the update alone, medians of interleaved rounds, against the backward of a whole tape of
which nothing was dropped: `whole` backpropagates zeros for dropped rows, `masked` leaves them out,
`again` has no tape and pays a forward and a backward of the kept rows, `half` is what the masked
backward cannot beat. CPU time on a CPU; on a GPU wall time between two synchronisations.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import facts
from mmdit import MMDiTConfig, MMDiTModel
from pruning import table
from torch import Tensor

from branchcore.masked_backward import MaskedBackward


class Tape:
    """One model, its rows and their gradients."""

    def __init__(self, width: int, rows: int, kept: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = MMDiTConfig(
            width=width, heads=width // 64, blocks=2, side=16, text_tokens=16, text_width=64,
            pooled_width=64, rank=16,
        )  # fmt: skip
        self.device, self.model = device, MMDiTModel(config, 4, device, dtype)
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, *self.model.latent_shape, generator=rng).to(device)
        self.gradient = torch.randn(self.x.shape, generator=rng).to(device, dtype)
        self.kept = torch.randperm(rows, generator=rng)[:kept].to(device)
        self.sigma = torch.rand(rows, generator=rng).to(device)
        self.prompt = (torch.arange(rows) % 4).to(device)
        self.dropped = torch.zeros_like(self.gradient)
        self.dropped[self.kept] = self.gradient[self.kept]

    def forward(self, rows: Tensor | None = None, masked: bool = False) -> Tensor:
        inputs = (self.x, self.sigma, self.prompt)
        if rows is not None:
            inputs = tuple(t[rows] for t in inputs)
        with MaskedBackward() if masked else nullcontext():
            return self.model.velocity(*inputs)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def seconds(self, arm: str) -> float:
        """Times one update; what a tape has paid in the rollout is not counted."""
        self.model.module.zero_grad(set_to_none=True)
        gradient, kept = self.gradient, self.kept
        before: dict[str, Callable[[], Tensor]] = {
            "all": self.forward,
            "whole": self.forward,
            "masked": lambda: self.forward(masked=True),
            "half": lambda: self.forward(kept),
        }
        v = before[arm]() if arm in before else None
        start = self.clock()
        v = self.forward(kept) if v is None else v
        few = {"all": gradient, "whole": self.dropped, "masked": self.dropped}
        v.backward(few.get(arm, gradient[kept]))
        return self.clock() - start


def measure(width: int, rows: int, kept: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Returns one row: the share of each arm in the backward of everything."""
    tape, arms = Tape(width, rows, kept, device), ("all", "whole", "masked", "again", "half")
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms if turn % 2 else arms[::-1]:
            spent = tape.seconds(arm)
            if turn:  # the first round warms up
                found[arm].append(spent)
    pairs = {arm: zip(found[arm], found["all"], strict=True) for arm in arms[1:]}
    return {
        "width": width,
        "rows": rows,
        "kept": kept,
        "all_ms": round(1e3 * statistics.median(found["all"]), 2),
        **{arm: round(statistics.median(a / b for a, b in pair), 3) for arm, pair in pairs.items()},
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 256, 512, 768])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    meta, device = facts(), torch.device(args.device)
    kept = max(1, round(args.kept * args.rows))
    rows = [measure(width, args.rows, kept, args.rounds, device) for width in args.widths]
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
