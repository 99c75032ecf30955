"""Every implementation of the ops that a machine may have, and what it takes to run it here."""

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from branchcore import _dispatch

NATIVE = ("generic", "avx2", "avx512")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Implementation(NamedTuple):
    """One column of the conformance matrix."""

    name: str
    implementation: str
    device: torch.device
    isa: str = ""

    @contextmanager
    def forced(self) -> Generator[torch.device]:
        """Force it for every op; gives the device that it runs on."""
        native = getattr(importlib.import_module("branchcore._C"), self.isa) if self.isa else None
        patch = mock.patch.object(_dispatch, "_native", native or _dispatch._native)
        with patch, _dispatch.use(self.implementation):
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
        if self.implementation == "cuda" and _dispatch._cuda is None:
            return "needs a build with CUDA"
        return ""


def cpu_runs(isa: str) -> bool:
    """Whether this CPU has the instruction set; a newer CPU runs the older ones."""
    return _dispatch.ISA in NATIVE and NATIVE.index(isa) <= NATIVE.index(_dispatch.ISA)


ALL = [
    Implementation("reference", "reference", CPU),
    *(Implementation(isa, "cpp", CPU, isa) for isa in NATIVE),
    Implementation("triton-interpreter", "triton", CPU),
    Implementation("reference-gpu", "reference", GPU),
    Implementation("triton-gpu", "triton", GPU),
    Implementation("cuda-gpu", "cuda", GPU),
]
HERE = [each for each in ALL if not each.missing()]
