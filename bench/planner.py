"""Forecast of the planner against what 20 random runs need and take.

python bench/planner.py --json bench/results/planner.json

Digits and tiny pipelines of SD3, FLUX and Wan on one CPU thread: memory in bytes of live tensors,
the most in the second iteration; time in CPU seconds, the median of 5 pairs of a forecast and 3
iterations after it. Fifteen minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
from planner_cases import IMPOSSIBLE, Zoo, compare, one_thread, random_cases, refused


def summary(rows: list[dict[str, Any]], name: str, limit: float) -> dict[str, float]:
    """Returns how far forecasts are off, as shares of what was measured."""
    off = np.array([abs(row[name] - 1.0) for row in rows])
    return {
        "within": int((off <= limit).sum()), "of": len(rows), "limit": limit,
        "median": float(np.median(off)), "p80": float(np.quantile(off, 0.8)),
        "worst": float(off.max()),
    }  # fmt: skip


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--impossible", action="store_true", help="only what has to be refused")
    args = parser.parse_args()
    one_thread()
    if args.impossible:
        _impossible(args.json)
        return
    rows: list[dict[str, Any]] = []
    meta = machine.facts()
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        for case in random_cases(args.cases, args.seed):
            rows.append(compare(zoo, case))
            r = rows[-1]
            print(
                f"memory {r['memory_mb']:7.1f} of {r['memory_mb_measured']:7.1f} MB "
                f"({r['memory_ratio']:.2f})  time {r['cpu_s']:.3f} of {r['cpu_s_measured']:.3f} s "
                f"({r['time_ratio']:.2f}, iterations differ by {r['cpu_s_spread']:.0%})  "
                f"{r['case']}",
                flush=True,
            )
    found = {
        "memory": summary(rows, "memory_ratio", 0.15),
        "time": summary(rows, "time_ratio", 0.30),
    }
    print(found)
    if args.json:  # the refusals of the same code are made anew
        result = {"meta": meta, "summary": found, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    _impossible(args.json)


def _impossible(file: Path | None) -> None:
    """Asks for what cannot run; adds the refusals to a file of forecasts."""
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        rows = [refused(zoo, name) for name in IMPOSSIBLE]
    for row in rows:
        print(f"{row['asked']}: {row['refusal']}; the nearest ran: {row['nearest_ran']}")
    if file is not None:
        result = json.loads(file.read_text())
        result |= {"impossible": rows, "impossible_meta": machine.facts()}
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
