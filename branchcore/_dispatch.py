"""Which implementation runs an op: registration, choice, and the reason for it.

Every op is registered once with `torch.library`; the choice falls inside the registered op, so it
holds under `torch.compile` and autograd alike.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

import torch  # before _C, so that both share one OpenMP runtime

LIBRARY = torch.library.Library("branchcore", "DEF")
# In the order of preference.
IMPLEMENTATIONS = ("cuda", "triton", "cpp", "reference")
TRITON = (3, 6)
FAST_DTYPES = (torch.float32, torch.bfloat16)

_ops: dict[str, tuple[str, ...]] = {}
_forced: str | None = None


def _load_native() -> tuple[ModuleType | None, str, ModuleType | None, ModuleType | None]:
    """Import the kernels for this CPU's instruction set and for CUDA, as far as they are built."""
    if importlib.util.find_spec("branchcore._C") is None:
        return None, "none", None, None
    module = importlib.import_module("branchcore._C")
    isa: str = module.best_isa()
    return module, isa, getattr(module, isa), getattr(module, "cuda", None)


_module, ISA, _native, _cuda = _load_native()
# Where CUDA kernels run; a test that emulates them on the host changes it.
cuda_device = "cuda"


def native() -> ModuleType:
    """Give the compiled CPU kernels; raises if the package has not been built."""
    if _native is None:
        raise RuntimeError(
            "branchcore: implementation 'cpp' needs the compiled module branchcore._C, "
            "got a checkout without it; try pip install -e ."
        )
    return _native


def cuda() -> ModuleType:
    """Give the compiled CUDA kernels; raises if they have not been built."""
    if _cuda is None:
        raise RuntimeError(
            "branchcore: implementation 'cuda' needs a build with CUDA, got one without; "
            "try BRANCHCORE_CUDA=ON pip install ."
        )
    return _cuda


def host() -> ModuleType | None:
    """Give what is compiled for host integers; None unbuilt, or with the reference forced."""
    return None if _forced == "reference" else _module


def triton_kernels(op: str) -> ModuleType:
    """Import the Triton kernels of an op; raises if Triton is not installed."""
    if not has_triton():
        raise RuntimeError(
            "branchcore: implementation 'triton' needs the package triton, 3.6 or newer, got none; "
            "try pip install 'branchcore[triton]'"
        )
    return importlib.import_module(f"branchcore.kernels.{op}")


@cache
def has_triton() -> bool:
    """Whether a Triton that the kernels know can be imported; it is not imported to find out."""
    if importlib.util.find_spec("triton") is None:
        return False
    # AMD's builds of torch bring it under other names
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            release = metadata.version(name).split(".")[:2]
        except metadata.PackageNotFoundError:
            continue
        return tuple(map(int, release)) >= TRITON
    return False


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that its kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def stream(tensor: torch.Tensor) -> tuple[int, int]:
    """Name the device and the stream of a launch: what every CUDA kernel takes last."""
    if not tensor.is_cuda:
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def special_functions(device: torch.device) -> bool:
    """Whether normals made on this device come from a GPU's special-function unit."""
    return (device.type == "cuda" or cuda_device == "cpu") and _forced != "reference"


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Copy a tensor whose last axis is not contiguous; GPU kernels take any stride of rows."""
    if tensor is None or tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Copy a tensor that is not contiguous."""
    return None if tensor is None else tensor.contiguous()


def cuda_partials(num_rows: int, states: torch.Tensor) -> torch.Tensor:
    """Allocate the partial sums of a CUDA kernel: one per row and tile of the last axis."""
    tiles = -(-states.shape[-1] // cuda().tile_size())
    return states.new_empty(num_rows, tiles, dtype=torch.float32)


def _known(name: str | None) -> str | None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"use: name must be None or one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    if name == "cpp":
        native()
    if name == "cuda":
        cuda()
    if name == "triton" and not has_triton():
        triton_kernels("")
    return name


class use:
    """Force an implementation for every op, until the next call or to the end of the block.

    Args:
        name: "cuda", "triton", "cpp", "reference", or None for the automatic choice.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it is not built or installed on this machine.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._previous, _forced = _forced, _known(name)

    def __enter__(self) -> "use":
        return self

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._previous


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name the implementation that `op` runs with on this device and dtype.

    The automatic choice is the first of `IMPLEMENTATIONS` that the op has and that can run there.

    Raises:
        NotImplementedError: the forced one cannot.
    """
    if _forced is None:
        return next(name for name in _ops[op] if obstacle(name, device, dtype) is None)
    if _forced not in _ops[op]:
        raise NotImplementedError(
            f"{op}: implementation must be one of {', '.join(_ops[op])}, got {_forced!r}; "
            "try branchcore.use(None)"
        )
    why = obstacle(_forced, device, dtype)
    if why is not None:
        raise NotImplementedError(
            f"{op}: implementation {_forced!r} {why}, got {device.type} {_short(dtype)}; "
            "try branchcore.use(None)"
        )
    return _forced


def obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what an implementation lacks to run on this device and dtype; None if nothing."""
    if name == "reference":
        return None
    if dtype not in FAST_DTYPES:
        return "must run in float32 or bfloat16"
    if name == "cpp":
        return _cpp_obstacle(device)
    if name == "cuda":
        return _cuda_obstacle(device)
    if not has_triton():
        return f"needs the package triton, {'.'.join(map(str, TRITON))} or newer"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return "must run on a GPU (or on cpu with TRITON_INTERPRET=1)"
    return old_chip(device.index or 0) if device.type == "cuda" else None


def _cpp_obstacle(device: torch.device) -> str | None:
    if _native is None:
        return "needs the compiled module branchcore._C"
    return None if device.type == "cpu" else "must run on cpu"


def _cuda_obstacle(device: torch.device) -> str | None:
    if _cuda is None:
        return "needs a build with CUDA"
    if device.type != cuda_device:
        return "must run on an NVIDIA GPU"
    return None if device.type == "cpu" else chip_obstacle(device.index or 0)


@cache
def chip_obstacle(index: int) -> str | None:
    """Say why the compiled CUDA kernels cannot run on this GPU; asked once per device."""
    return cuda().obstacle(index) or None


@cache
def old_chip(index: int) -> str | None:
    """Say why Triton cannot compile for this GPU: NVIDIA's round to bfloat16 from sm_80 on."""
    if torch.version.hip or torch.cuda.get_device_capability(index) >= (8, 0):
        return None
    return "must run on an NVIDIA GPU of sm_80 or newer"


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
    _ops[name] = tuple(other for other in IMPLEMENTATIONS if other in implementations)
    return getattr(torch.ops.branchcore, name).default


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give a registered op its derivative."""
    torch.library.register_autograd(
        f"branchcore::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def registered() -> dict[str, tuple[str, ...]]:
    """List every op with the implementations that it has, in the order of preference."""
    return dict(_ops)


def explain() -> str:
    """Say which implementation every op runs with here, and why."""
    if _forced is None:
        why = "automatic (branchcore.use or BRANCHCORE_IMPL forces one)"
    else:
        why = f"forced to {_forced}"
    lines = [*_built(), f"choice: {why}"]
    for op in _ops:
        for device in devices():
            outcomes = (_outcome(op, device, dtype) for dtype in (*FAST_DTYPES, torch.float64))
            lines.append(f"  {op} on {device}: " + ", ".join(outcomes))
    return "\n".join(lines)


def devices() -> list[torch.device]:
    """List the CPU and the GPUs that torch sees."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def _built() -> list[str]:
    if _native is None:
        cpp = "not built (no branchcore._C; try pip install -e .)"
    else:
        cpp = f"built, {ISA} kernels, {torch.get_num_threads()} threads"
    cuda_build = "not built" if _cuda is None else f"built for sm_{_cuda.chips()}"
    triton = "installed" if has_triton() else "not installed"
    if has_triton() and interpreted():
        triton += ", interpreted (TRITON_INTERPRET=1)"
    return [
        f"cpp: {cpp}",
        f"cuda: {cuda_build}",
        f"triton: {triton}",
        "reference: plain torch, any device and float dtype",
    ]


def _outcome(op: str, device: torch.device, dtype: torch.dtype) -> str:
    try:
        return f"{_short(dtype)} {choose(op, device, dtype)}"
    except NotImplementedError:
        return f"{_short(dtype)} refused"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_forced = _known(os.environ.get("BRANCHCORE_IMPL") or None)
