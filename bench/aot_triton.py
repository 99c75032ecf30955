"""Compiles the BUILDS of every kernels/<op>.py for NVIDIA and AMD chips, without either."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cubin
import triton
from branchcore.kernels.build import Build
from machine import ROOT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALIGNED = [["tt.divisibility", 16]]


def triton_version() -> str:
    return version("triton")


def ops() -> list[str]:
    """Returns the ops that have Triton kernels."""
    paths = sorted((ROOT / "kernels").glob("*.py"))
    return [path.stem for path in paths if (ROOT / "branchcore" / "ops" / path.name).is_file()]


def builds(op: str) -> list[Build]:
    """Returns what an op's kernels are compiled for; two alike are one."""
    found: dict[str, Build] = {}
    for build in import_module(f"branchcore.kernels.{op}").BUILDS:
        found.setdefault(f"{build.kernel.__name__} {_arguments(build)}", build)
    return list(found.values())


def compiled(op: str, index: int, chip: str) -> dict[str, Any]:
    """Compiles one of an op's builds for a chip; picklable, so that a pool can do it."""
    listed = builds(op)
    return row(op, listed[index], names(listed)[index], chip)


def row(op: str, build: Build, name: str, chip: str, **options: Any) -> dict[str, Any]:
    """Compiles a build for a chip, with more options of `triton.compile` if given."""
    try:
        measured = _measured(build, TARGETS[chip], options)
    except TritonError as error:
        raise RuntimeError(
            f"aot: {op}: {build.kernel.__name__} [{name}] must compile for {chip}, got {error}"
        ) from error
    return {
        "op": op,
        "kernel": build.kernel.__name__,
        "build": name,
        "language": "triton",
        "chip": chip,
        "streams": build.streams,
        **measured._asdict(),
    }


def names(listed: Sequence[Build]) -> list[str]:
    """Names each build by as few arguments as tell it from the others of its kernel."""
    found = [_arguments(build) for build in listed]
    shown: list[str] = []
    for build, own in zip(listed, found, strict=True):
        group = [other for b, other in zip(listed, found, strict=True) if b.kernel is build.kernel]
        keys = list(dict.fromkeys(key for other in group for key in other))
        for key in reversed(keys.copy()):
            fewer = [other for other in keys if other != key]
            keys = fewer if _differ(group, fewer) else keys
        shown.append(" ".join(f"{key}={own[key]}" for key in keys if key in own))
    return shown


def _arguments(build: Build) -> dict[str, str]:
    aligned = {f"{name} % 16": 0 for name in build.aligned}
    given = {**build.types, **build.constants, **aligned, "num_warps": build.num_warps}
    return {name: str(value) for name, value in given.items()}


def _differ(group: Sequence[dict[str, str]], keys: Sequence[str]) -> bool:
    return len({tuple(map(own.get, keys)) for own in group}) == len(group)


def _measured(build: Build, target: GPUTarget, options: dict[str, Any]) -> cubin.Kernel:
    arguments = build.kernel.arg_names
    aligned = [
        name in build.aligned or build.types.get(name, "").startswith("*") for name in arguments
    ]
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.types.get(name, "constexpr") for name in arguments},
        constexprs=dict(build.constants),
        attrs={(i,): ALIGNED for i, is_aligned in enumerate(aligned) if is_aligned},
    )
    # 3.9 wants to be told of fused multiply-adds, which a launch has by default
    options = {"num_warps": build.num_warps, "enable_fp_fusion": True, **options}
    found = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        return _amd(found.asm["amdgcn"], found.metadata.shared)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(found.asm["cubin"])
        (kernel,) = cubin.read(path).values()
    return kernel._replace(shared_bytes=found.metadata.shared)


def _amd(text: str, shared: int) -> cubin.Kernel:
    """Reads AMD's assembly; spills are counted in registers, the stack is ScratchSize."""

    def number(pattern: str) -> int:
        return int(re.findall(pattern, text)[0])

    return cubin.Kernel(
        registers=number(r"\.vgpr_count:\s*(\d+)"),
        stack=number(r"; ScratchSize: (\d+)"),
        spills=number(r"\.vgpr_spill_count:\s*(\d+)"),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        wide_stores=len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
        instructions_per_normal=None,
        shared_bytes=shared,
    )
