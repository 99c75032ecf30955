"""What a compiled kernel must be: the rules that bench/aot.py and its test hold every row to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Instructions per normal: noise is drawn again, not stored, which pays while it is this cheap.
LIMIT, LIMIT_CHIP, LIMITED_OPS = 30.0, "sm_90", ("branch_step", "edge_dots")

# A kernel must both load and store 16 bytes at a time, except those that `streams` excludes (for
# CUDA by name: second stages on partials of rows, a loss of scalars, a probe), those of ops that
# only write, and those that read states and write a few sums.
CUDA_NOT_STREAMING = re.compile(r"_(finish|reduce)_kernel$|^(ratio_loss|probe)_kernel$")
ONLY_WRITES = ("philox_normal",)
ONLY_READS = re.compile(r"_partials_kernel$|^_?(edge_dots|sde_log_prob)(_fwd)?_kernel$")


def label(row: dict[str, Any]) -> str:
    build = f" [{row['build']}]" if row["build"] else ""
    return f"{row['op']}: {row['kernel']}{build} in {row['language']} for {row['chip']}"


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names every kernel that breaks a rule, and the rule."""
    found = [f"{label(row)} must {rule}" for row in rows for rule in _broken(row)]
    return found + _silent(rows)


def _broken(row: dict[str, Any]) -> list[str]:
    found: list[str] = []
    if row["spills"]:
        found.append(f"spill nothing, got {row['spills']}")
    if row["stack"]:
        found.append(f"use no stack, got {row['stack']} bytes")
    if row["streams"]:
        if not row["wide_loads"] and row["op"] not in ONLY_WRITES:
            found.append("load 16 bytes at a time, got no such access")
        if not row["wide_stores"] and not ONLY_READS.search(row["kernel"]):
            found.append("store 16 bytes at a time, got no such access")
    if _is_limited(row) and (row["instructions_per_normal"] or 0) > LIMIT:
        got = row["instructions_per_normal"]
        found.append(f"take at most {LIMIT:g} instructions per normal, got {got}")
    return found


def _is_limited(row: dict[str, Any]) -> bool:
    return row["op"] in LIMITED_OPS and row["chip"] == LIMIT_CHIP


def _silent(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names ops whose noise was not found, so that the limit would hold for nothing."""
    costs: dict[str, list[float | None]] = {}
    for row in filter(_is_limited, rows):
        name = f"{row['op']} in {row['language']} for {row['chip']}"
        costs.setdefault(name, []).append(row["instructions_per_normal"])
    return [
        f"{name} must draw noise with MUFU.COS in one of its kernels, got none"
        for name, found in costs.items()
        if not any(found)
    ]
