"""What the kernels of a cubin take: registers, stack, spills, wide accesses, shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sass

RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Kernel(NamedTuple):
    """One kernel on one chip; sizes in bytes, of a thread, and of a block for shared memory."""

    registers: int
    stack: int
    spills: int
    wide_loads: int
    wide_stores: int
    instructions_per_normal: float | None
    shared_bytes: int


def tool(name: str) -> str:
    """Finds a CUDA tool that Triton brings along."""
    import triton  # only here, so that the rules can be read without it

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise RuntimeError(f"aot: {name} must come with triton, got no {path}")
    return str(path)


def run(*command: str, cwd: Path | None = None, text: str | None = None) -> str:
    """Returns what a command prints; raises with its own words if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"aot: {command[0]} must succeed, got\n{done.stdout}{done.stderr}")
    return done.stdout


def read(path: Path, lane_normals: int | None = None) -> dict[str, Kernel]:
    """Returns the kernels of a cubin by mangled name; see sass.py for `lane_normals`."""
    listed = RESOURCES.findall(run(tool("cuobjdump"), "--dump-resource-usage", str(path)))
    code = sass.functions(run(tool("nvdisasm"), "-c", "-ndf", str(path)))
    found: dict[str, Kernel] = {}
    for name, registers, stack, shared in listed:
        graph = sass.blocks(code[name])
        lines = [line for block in graph for line in block.instructions]
        found[name] = Kernel(
            registers=int(registers),
            stack=int(stack),
            spills=_local_bytes(lines),
            wide_loads=sum(line.is_wide("LDG", "LDGSTS") for line in lines),
            wide_stores=sum(line.is_wide("STG") for line in lines),
            instructions_per_normal=sass.instructions_per_normal(graph, lane_normals),
            shared_bytes=int(shared),
        )
    return found


def _local_bytes(lines: Iterable[sass.Instruction]) -> int:
    """Adds up what local loads and stores move: ptxas's spill loads and stores, and any stack's."""
    return sum(
        next((BYTES[word] for word in line.words if word in BYTES), 4)
        for line in lines
        if line.words[0] in ("LDL", "STL")
    )
