"""Where and when a number was measured: every result file carries this."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from branchcore import _dispatch

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Names the commit, with "+" if files differ from it; "unknown" outside a git checkout."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def cpu() -> str:
    """Names the processor."""
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def facts() -> dict[str, Any]:
    """Returns commit, processor, versions, threads, load and date."""
    return {
        "commit": commit(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "isa": _dispatch.ISA,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": date.today().isoformat(),
    }
