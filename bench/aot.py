"""Compiles every GPU kernel ahead of time: it compiles, spills nothing, keeps 16-byte accesses.

    python bench/aot.py [--json bench/results/aot.json] [--op OP] [--chip sm_90] [--language cuda]

Needs triton and nvcc, and no GPU. Exits 1 if a kernel breaks a rule of aot_rules.py. Sizes are in
bytes, of a thread, and for shared memory of a block. `spills` are the bytes that local loads and
stores move, which is what ptxas calls spill loads plus spill stores, and on AMD registers.
`instructions_per_normal` is defined in sass.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import aot_cuda
from aot_rules import LIMIT_CHIP, faults
from machine import ROOT, facts

LANGUAGES = ("triton", "cuda")
SOURCES = ("kernels/*.py", "csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cu")
RENEW = "python bench/aot.py --json bench/results/aot.json"


def digest() -> str:
    """Fingerprints the sources of all GPU kernels."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def compile_all(
    languages: Sequence[str], op: str | None, chips: Sequence[str] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compiles what is asked for, on all cores; returns the rows, and what made them."""
    rows: list[dict[str, Any]] = []
    meta: dict[str, Any] = {"sources": digest()}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        try:
            triton = _start_triton(pool, op, chips, meta) if "triton" in languages else []
            cuda = _start_cuda(pool, op, chips, meta) if "cuda" in languages else {}
            rows += [future.result() for future in triton]
            for name, future in cuda.items():
                found, meta["ptx"][name] = future.result()
                rows += found
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first failure is the answer
            raise
    return rows, meta


def _start_triton(
    pool: ProcessPoolExecutor, op: str | None, chips: Sequence[str] | None, meta: dict[str, Any]
) -> list[Future[dict[str, Any]]]:
    import aot_triton  # only where Triton is installed

    meta["triton"] = aot_triton.triton_version()
    return [
        pool.submit(aot_triton.compiled, name, index, target)
        for name in _chosen(aot_triton.ops(), op and [op])
        for index in range(len(aot_triton.builds(name)))
        for target in _chosen(aot_triton.TARGETS, chips)
    ]


def _start_cuda(
    pool: ProcessPoolExecutor, op: str | None, chips: Sequence[str] | None, meta: dict[str, Any]
) -> dict[str, Future[tuple[list[dict[str, Any]], list[aot_cuda.Name]]]]:
    meta["nvcc"], meta["ptx"] = aot_cuda.nvcc_version(), {}
    return {
        name: pool.submit(aot_cuda.compiled, name, _chosen(aot_cuda.CHIPS, chips))
        for name in _chosen(aot_cuda.names(), op and [op])
    }


def _chosen(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    return [name for name in names if wanted is None or name in wanted]


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line per kernel and build: registers by chip, the rest for one chip."""
    chips = sorted({row["chip"] for row in rows}, key=lambda x: (x.startswith("gfx"), len(x), x))
    print(f"| kernel | build | | {' | '.join(chips)} | loads | stores | per normal |")
    print(f"|---|---|---|{'--:|' * (len(chips) + 3)}")
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["kernel"], row["build"], row["language"]), {})[row["chip"]] = row
    for key, by_chip in lines.items():
        one = by_chip.get(LIMIT_CHIP, next(iter(by_chip.values())))
        registers = [str(by_chip[chip]["registers"]) if chip in by_chip else "" for chip in chips]
        found = [one["wide_loads"], one["wide_stores"], one["instructions_per_normal"] or ""]
        print(f"| {' | '.join([*key, *registers, *map(str, found)])} |")
    print(f"\nRegisters by chip. 16-byte accesses and instructions per normal for {LIMIT_CHIP}.")


def one_row_a_line(table: dict[str, Any]) -> str:
    """Formats the table so that a change of one kernel is a change of its lines."""
    rows = ",\n".join(json.dumps(row) for row in table["kernels"])
    return f'{{\n"meta": {json.dumps(table["meta"])},\n"kernels": [\n{rows}\n]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--chip", action="append", help="only this chip; may be repeated")
    parser.add_argument("--language", choices=LANGUAGES, help="only kernels in it")
    args = parser.parse_args()
    start = time.perf_counter()
    rows, meta = compile_all([args.language] if args.language else LANGUAGES, args.op, args.chip)
    if not rows:
        parser.error("--op, --chip and --language must leave a kernel to compile, got none")
    print_summary(rows)
    if args.json:
        table = {"meta": {**facts(), **meta}, "kernels": rows}
        args.json.write_text(one_row_a_line(table))
    found = faults(rows)
    print("\n".join(found))
    print(f"{len(rows)} compilations, {len(found)} faults, {time.perf_counter() - start:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
