"""What a machine has, as far as branchcore cares; nothing optional is imported to find out."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from branchcore import _dispatch

# Distributions that provide the module triton: releases, nightly builds, AMD.
_TRITON = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
_CUDA_SUCCESS, _CUDA_ERROR_NO_DEVICE = 0, 100


class Driver(NamedTuple):
    """NVIDIA's driver as the loader finds it, whatever torch was built for."""

    cuda: str
    """The newest CUDA that it runs, "13.0"; empty without a driver."""
    num_gpus: int
    """GPUs that it shows to this process."""
    failure: str
    """What is wrong with it; empty if nothing, or if there is none."""


class Gpu(NamedTuple):
    """A GPU that torch sees."""

    device: str
    name: str
    chip: str
    """Compute capability without its dot, "90"; AMD's name of the architecture, "gfx942"."""
    memory_gib: float
    compiled: bool
    """Whether the CUDA kernels were compiled for exactly this chip."""


class Machine(NamedTuple):
    """Versions and devices; an empty text means that there is none."""

    branchcore: str
    python: str
    system: str
    glibc: str
    cpu: str
    """The instruction set that torch uses."""
    isa: str
    """The one that the compiled kernels use."""
    foreign_modules: tuple[str, ...]
    """Compiled modules in the package's folders that this Python cannot load."""
    torch: str
    torch_cuda: str
    torch_hip: str
    static_cuda: str
    """The CUDA runtime inside the compiled module; empty for a build without CUDA."""
    chips: tuple[str, ...]
    driver: Driver
    gpus: tuple[Gpu, ...]
    triton: str
    interpreted: bool
    diffusers: str
    flash_attn: str
    forced: str
    """BRANCHCORE_IMPL."""


def examine() -> Machine:
    """Look at this machine."""
    static_cuda, chips = _cuda_build()
    loaded = _dispatch.obstacle("cpp", torch.device("cpu"), torch.float32) is None
    return Machine(
        branchcore=_version("branchcore") or "not installed",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        glibc=platform.libc_ver()[1],
        cpu=torch.backends.cpu.get_cpu_capability(),
        isa=_dispatch.ISA if loaded else "",
        foreign_modules=() if loaded else _compiled_files(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        torch_hip=torch.version.hip or "",
        static_cuda=static_cuda,
        chips=chips,
        driver=driver(),
        gpus=tuple(_gpu(device, chips) for device in _dispatch.devices() if device.type == "cuda"),
        triton=_triton(),
        interpreted=_dispatch.interpreted(),
        diffusers=_version("diffusers"),
        flash_attn=_version("flash-attn"),
        forced=os.environ.get("BRANCHCORE_IMPL", ""),
    )


def facts(machine: Machine) -> list[tuple[str, str]]:
    """Name everything in it for people."""
    runtime = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else ""
    if machine.torch_hip:
        runtime = f"HIP {machine.torch_hip}"
    kernels = f"CUDA {machine.static_cuda}, static, for sm_{', sm_'.join(machine.chips)}"
    cuda = machine.driver.cuda
    return [
        ("Python", machine.python),
        ("glibc", machine.glibc or "none"),
        ("CPU", f"{machine.cpu}, compiled kernels {machine.isa or 'missing'}"),
        ("torch", f"{machine.torch}, {runtime or 'no GPU runtime'}"),
        ("CUDA kernels", kernels if machine.static_cuda else "not in this build"),
        ("NVIDIA driver", machine.driver.failure or (f"CUDA {cuda}" if cuda else "none")),
        *((gpu.device, _gpu_fact(machine, gpu)) for gpu in machine.gpus),
        ("Triton", (machine.triton or "absent") + ", interpreted" * machine.interpreted),
        ("diffusers", machine.diffusers or "absent (optional)"),
        ("flash-attn", machine.flash_attn or "absent (optional)"),
    ]


def _gpu_fact(machine: Machine, gpu: Gpu) -> str:
    prefix = "" if machine.torch_hip else "sm_"
    text = f"{gpu.name}, {prefix}{gpu.chip}, {gpu.memory_gib} GiB"
    if not machine.static_cuda or machine.torch_hip:
        return text
    return f"{text}, {'compiled for' if gpu.compiled else 'not compiled for'}"


def driver() -> Driver:
    """Ask NVIDIA's driver itself, since a torch without CUDA cannot."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        half = "nvidia-smi is here but libcuda.so.1 is not" if shutil.which("nvidia-smi") else ""
        return Driver("", 0, half)
    number = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = spelled(number.value)
    error: int = library.cuInit(0)
    if error == _CUDA_ERROR_NO_DEVICE:
        return Driver(cuda, 0, "")
    if error != _CUDA_SUCCESS:
        name = ctypes.c_char_p(b"an unknown error")
        library.cuGetErrorName(error, ctypes.byref(name))
        return Driver(cuda, 0, f"cuInit failed with {(name.value or b'?').decode()} ({error})")
    library.cuDeviceGetCount(ctypes.byref(number))
    return Driver(cuda, number.value, "")


def spelled(version: int) -> str:
    """Spell a version as CUDA counts them: 12080 is 12.8."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _cuda_build() -> tuple[str, tuple[str, ...]]:
    try:
        module = _dispatch.cuda()
    except RuntimeError:
        return "", ()
    return spelled(module.runtime_version()), tuple(module.chips().split(", "))


def _gpu(device: torch.device, chips: Sequence[str]) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    chip = f"{found.major}{found.minor}"
    if torch.version.hip:
        chip = str(found.gcnArchName).partition(":")[0]
    # "90a" is code for 90 and no other chip
    compiled = chip in {each.rstrip("af") for each in chips}
    return Gpu(str(device), found.name, chip, round(found.total_memory / 2**30, 1), compiled)


def _compiled_files() -> tuple[str, ...]:
    # a checkout's package has the folders of an installed copy on its path
    folders = map(Path, sys.modules["branchcore"].__path__)
    return tuple(sorted({path.name for folder in folders for path in folder.glob("_C.*")}))


def _triton() -> str:
    if not _dispatch.has_triton():
        return ""
    return next(filter(None, map(_version, _TRITON)), "of an unknown version")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
