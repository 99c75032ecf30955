"""Which implementation runs an op: registration, choice, and the reason for it.

Every op is registered once with `torch.library`; the choice falls inside the registered op, so it
holds under `torch.compile` and autograd alike.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any

import torch  # before _C, so that both share one OpenMP runtime

LIBRARY = torch.library.Library("branchcore", "DEF")
IMPLEMENTATIONS = ("cpp", "reference")
CPP_DTYPES = (torch.float32, torch.bfloat16)

_ops: list[str] = []
_forced: str | None = None


def _load_native() -> tuple[str, ModuleType | None]:
    """Import the kernels for this CPU's instruction set, if the package has been built."""
    if importlib.util.find_spec("branchcore._C") is None:
        return "none", None
    module = importlib.import_module("branchcore._C")
    isa: str = module.best_isa()
    return isa, getattr(module, isa)


ISA, _native = _load_native()


def native() -> ModuleType:
    """Give the compiled kernels; raises if the package has not been built."""
    if _native is None:
        raise RuntimeError(
            "branchcore: implementation 'cpp' needs the compiled module branchcore._C, "
            "got a checkout without it; try pip install -e ."
        )
    return _native


def _known(name: str | None) -> str | None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"use: name must be None or one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    if name == "cpp":
        native()
    return name


class use:
    """Force an implementation for every op, until the next call or to the end of the block.

    Args:
        name: "cpp", "reference", or None for the automatic choice.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it is not built on this machine.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._previous, _forced = _forced, _known(name)

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name the implementation that `op` runs with on this device and dtype."""
    supported = device.type == "cpu" and dtype in CPP_DTYPES
    if _forced is None:
        return "cpp" if supported and _native is not None else "reference"
    if _forced == "cpp" and not supported:
        raise NotImplementedError(
            f"{op}: implementation 'cpp' must run on cpu in float32 or bfloat16, got {device.type} "
            f"{_short(dtype)}; try branchcore.use(None)"
        )
    return _forced


def _lead(first: torch.Tensor, *_: Any) -> tuple[torch.device, torch.dtype]:
    return first.device, first.dtype


def define(
    schema: str,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    lead: Callable[..., tuple[torch.device, torch.dtype]] = _lead,
) -> Callable[..., Any]:
    """Register an op and return its callable.

    Args:
        schema: torch schema, all arguments positional and without defaults.
        implementations: function per implementation name, each taking the schema's arguments.
        fake: the same for shapes and dtypes only.
        lead: device and dtype of a call that the choice looks at; the first argument's by default.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        return implementations[choose(name, *lead(*args))](*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"branchcore::{name}", fake, lib=LIBRARY)
    _ops.append(name)
    return getattr(torch.ops.branchcore, name).default


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give a registered op its derivative."""
    torch.library.register_autograd(
        f"branchcore::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def explain() -> str:
    """Say which implementation every op runs with here, and why."""
    if _native is None:
        built = "cpp: not built (no branchcore._C; try pip install -e .)"
    else:
        built = f"cpp: built, {ISA} kernels, {torch.get_num_threads()} threads"
    if _forced is None:
        why = "automatic (branchcore.use or BRANCHCORE_IMPL forces one)"
    else:
        why = f"forced to {_forced}"
    lines = [built, "reference: plain torch, any device and float dtype", f"choice: {why}"]
    for op in _ops:
        lines.append(
            f"  {op}: " + ", ".join(_outcome(op, dtype) for dtype in (*CPP_DTYPES, torch.float64))
        )
    return "\n".join(lines)


def _outcome(op: str, dtype: torch.dtype) -> str:
    try:
        return f"{_short(dtype)} {choose(op, torch.device('cpu'), dtype)}"
    except NotImplementedError:
        return f"{_short(dtype)} refused"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_forced = _known(os.environ.get("BRANCHCORE_IMPL") or None)
