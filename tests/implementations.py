"""Every implementation of the ops that a machine may have, and what it takes to run it here."""

import importlib
import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from cuda_on_host.build import build, compiler

from branchcore import _dispatch

NATIVE = ("generic", "avx2", "avx512")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Implementation(NamedTuple):
    """One column of the conformance matrix."""

    name: str
    implementation: str
    device: torch.device
    isa: str = ""

    emulated: bool = False

    @contextmanager
    def forced(self) -> Generator[torch.device]:
        """Force it for every op; gives the device that it runs on."""
        native = getattr(importlib.import_module("branchcore._C"), self.isa) if self.isa else None
        patches = {"_native": native or _dispatch._native}
        if self.emulated:
            patches |= {"_cuda": cuda_on_host(), "cuda_device": "cpu"}
        with mock.patch.multiple(_dispatch, **patches), _dispatch.use(self.implementation):
            yield self.device

    def missing(self) -> str:
        """Say what this machine lacks; empty if nothing."""
        if self.isa and not cpu_runs(self.isa):
            return f"needs compiled {self.isa} kernels, this machine has {_dispatch.ISA}"
        if self.device == GPU and not torch.cuda.is_available():
            return "needs a GPU"
        if self.implementation == "triton" and self.device == CPU and not _dispatch.interpreted():
            return "needs TRITON_INTERPRET=1; test_triton.py runs it in its own process"
        if self.implementation == "triton" and not _dispatch.has_triton():
            return "needs triton"
        if self.emulated:
            return "" if compiler() else "needs a C++ compiler"
        if self.implementation == "cuda" and _dispatch._cuda is None:
            return "needs a build with CUDA"
        return ""


@cache
def cuda_on_host() -> ModuleType:
    """Compile the CUDA kernels for the host, once per process, and import them."""
    with TemporaryDirectory() as folder:
        spec = importlib.util.spec_from_file_location("cuda_on_host", build(Path(folder)))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def cpu_runs(isa: str) -> bool:
    """Whether this CPU has the instruction set; a newer CPU runs the older ones."""
    return _dispatch.ISA in NATIVE and NATIVE.index(isa) <= NATIVE.index(_dispatch.ISA)


ALL = [
    Implementation("reference", "reference", CPU),
    *(Implementation(isa, "cpp", CPU, isa) for isa in NATIVE),
    Implementation("cuda-on-host", "cuda", CPU, emulated=True),
    Implementation("triton-interpreter", "triton", CPU),
    Implementation("reference-gpu", "reference", GPU),
    Implementation("triton-gpu", "triton", GPU),
    Implementation("cuda-gpu", "cuda", GPU),
]
HERE = [each for each in ALL if not each.missing()]
