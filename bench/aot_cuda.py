"""Compiles csrc/cuda/*.cu for every chip that a release may be built for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cubin
from aot_rules import CUDA_NOT_STREAMING
from machine import ROOT

SOURCES = ROOT / "csrc" / "cuda"
CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PTX = "arch=compute_100,code=compute_100"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", '-DBRANCHCORE_CHIPS="aot"', "-I", str(ROOT / "csrc"))
NAMESPACE = re.compile(r"\(anonymous namespace\)::|branchcore::cuda::|branchcore::")
NAME = re.compile(r"^(?:void )?(\w+)(?:<(.*?)>)?\(", re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([$\w]+)")
LANE_CHUNK = re.compile(r"constexpr int kChunks? = (\d+);")


class Name(NamedTuple):
    """A kernel, and the template arguments that it is instantiated with."""

    kernel: str
    arguments: str


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


def nvcc_version() -> str:
    return re.findall(r"V([\d.]+)", cubin.run("nvcc", "--version"))[0]


def names() -> list[str]:
    """Returns the files that hold kernels, by stem."""
    return sorted(path.stem for path in SOURCES.glob("*.cu") if "__global__" in path.read_text())


def lane_normals() -> int:
    """Returns how many elements of a full tile a thread owns, and so the normals of one stream."""
    chunk, chunks = LANE_CHUNK.findall((SOURCES / "tile.h").read_text())
    return int(chunk) * int(chunks)


def compiled(source: str, chips: Sequence[str]) -> tuple[list[dict[str, Any]], list[Name]]:
    """Compiles a file for all chips, and for PTX, at once.

    Returns:
        A row per kernel and chip, and the kernels in the PTX.
    """
    targets = [f"arch={chip.replace('sm', 'compute')},code={chip}" for chip in chips]
    flags = [flag for target in (*targets, PTX) for flag in ("-gencode", target)]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path, fat = str(SOURCES / f"{source}.cu"), str(folder / "kernels.fatbin")
        cubin.run("nvcc", *FLAGS, *flags, "-fatbin", "-o", fat, path)
        cubin.run(cubin.tool("cuobjdump"), "-xelf", "all", "-xptx", "all", fat, cwd=folder)
        (ptx,) = (path.read_text() for path in folder.glob("*.ptx"))
        rows = [
            _row(source, chip, name, kernel)
            for chip in chips
            for path in folder.glob(f"*.{chip}.cubin")
            for name, kernel in _read(path)
        ]
    return rows, sorted(demangled(ENTRY.findall(ptx)))


def _read(path: Path) -> list[tuple[Name, cubin.Kernel]]:
    found = cubin.read(path, lane_normals())
    return sorted(zip(demangled(found), found.values(), strict=True))


def _row(source: str, chip: str, name: Name, kernel: cubin.Kernel) -> dict[str, Any]:
    return {
        "op": source,
        "kernel": name.kernel,
        "build": name.arguments,
        "language": "cuda",
        "chip": chip,
        "streams": not CUDA_NOT_STREAMING.search(name.kernel),
        **kernel._asdict(),
    }


def demangled(mangled: Iterable[str]) -> list[Name]:
    """Names kernels as in the source: without namespaces and parameters."""
    shown = cubin.run("c++filt", text="\n".join(mangled))
    return [Name(*found) for found in NAME.findall(NAMESPACE.sub("", shown))]
