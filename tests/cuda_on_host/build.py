"""Builds the CUDA kernels for the host: `python tests/cuda_on_host/build.py OUT` gives OUT/*.so."""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fvisibility=hidden"]
INCLUDES = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]


def compiler() -> str | None:
    """Names the C++ compiler, if there is one."""
    return shutil.which("c++") or shutil.which("g++")


def sources() -> list[Path]:
    """Lists every kernel; device.cu only asks a driver."""
    return [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.stem != "device"]


def build(out: Path) -> Path:
    """Compiles and links; returns the module's file."""
    command = [compiler(), *FLAGS, "-DBC_SPECIAL_FUNCTIONS", *(f"-I{i}" for i in INCLUDES)]

    def compiled(source: Path) -> Path:
        target = out / f"{source.stem}.o"
        subprocess.run([*command, "-c", "-x", "c++", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [HERE / "module.cpp", *sources()]))
    module = out / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler(), "-shared", *objects, "-o", module], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
