"""Where and when a number was measured: every result file carries this."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import branchcore

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "diffusers")


def commit() -> str | None:
    """Names the commit, with "+" if files differ from it; None outside a git checkout."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def cpu() -> str:
    """Returns model name, family and model, since some hypervisors hide the name."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in path.read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in pairs if value}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"


def versions() -> dict[str, str]:
    """Returns the versions of what takes part; packages that are not installed are left out."""
    found = {"branchcore": branchcore.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def load_average() -> float | None:
    """Returns the load of the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """Returns commit, versions, kernels, processor, threads, load and date."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "commit": commit(),
        "versions": versions(),
        "kernels": branchcore.explain().splitlines()[0],
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_start": load_average(),
        "date": date.today().isoformat(),
    }
