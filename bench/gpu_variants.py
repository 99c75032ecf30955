"""Which implementations and baselines of a case run on a device, and how one is forced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_cases import Case
from gpu_timing import Call, Make

from branchcore import _dispatch

OURS = ("cuda", "triton")


def implementations(case: Case, device: torch.device) -> list[str]:
    """Returns what every op of the case has on this device; on a CPU the automatic choice."""
    stems = [stem for stem, _ in case.checked]
    if device.type != "cuda":
        return [_dispatch.choose(stems[0], device, case.dtype)]
    return [
        name
        for name in OURS
        if _dispatch.obstacle(name, device, case.dtype) is None
        and all(name in _dispatch._ops[stem] for stem in stems)
    ]


def forced(make: Make, implementation: str) -> Make:
    """Makes and calls under an implementation."""

    def forced_make(i: int) -> Call:
        with _dispatch.use(implementation):
            call = make(i)

        def run() -> Any:
            with _dispatch.use(implementation):
                return call()

        return run

    return forced_make


def compiler(device: torch.device) -> Callable[..., Any]:
    """Returns torch.compile for one shape; on a CPU without its slow code generation."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
