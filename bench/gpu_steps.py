"""The steps of gpu_check: commands, how long each may take, and which run side by side."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
CUDA_BIN = Path("/usr/local/cuda/bin")
HAZARDS = 86
"""Exit code of a sanitizer that found something."""

Judged = tuple[str | None, Any]
"""A status in the place of the exit code's, or None; and what was found."""


class Step(NamedTuple):
    """A command and what it leaves."""

    name: str
    command: Sequence[str]
    result: Path | None = None
    """JSON that must be there afterwards."""
    junit: Path | None = None
    must_run: str | None = None
    """Text in the name of a test, at least one of which must have run; "" is any test."""
    takes_budget: bool = False
    reserve: float = 8.0
    """Seconds that a step with a budget keeps for ending."""
    resumable: bool = False
    environment: dict[str, str] = {}  # noqa: RUF012
    verdict: Callable[[str, str], Judged] | None = None
    """Reads the end of the log, knowing how the step ended."""
    skipped: str = ""
    """Why it does not run here."""

    def with_budget(self, seconds: float) -> list[str]:
        return ["--budget", f"{max(seconds, 3.0):.0f}"] if self.takes_budget else []


COMPILED = ("gate_norm,group_norm", "qk_norm,philox", "branch_step,dots,log_prob")
"""Parts of the ops that processes compile side by side."""

Phase = tuple[float, list[Step]]
"""Seconds, and steps that run side by side."""

QUIET = {
    "PYTHONUNBUFFERED": "1",
    "MPLBACKEND": "Agg",
    # if the installation failed, the checkout still has the reference and the Triton kernels
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}


def python(*arguments: object) -> list[str]:
    return [sys.executable, *(str(argument) for argument in arguments)]


def phases(out: Path, device: str, logs: Path) -> list[Phase]:
    """Plans a run; the last phase is the one that can use all the time that is left."""
    on_gpu = device == "cuda"
    side_by_side = [
        doctor(),
        *tests(on_gpu, logs),
        *sanitizers(on_gpu),
        *compilations(device),
    ]
    return [
        (20.0, [facts()]),
        (90.0, [installation(on_gpu)]),
        (115.0, side_by_side),
        (105.0, [ops(out, device)]),
        (65.0, [checklist(out, device)]),
        (135.0, [tree(out, on_gpu)]),
    ]


def facts() -> Step:
    program = shutil.which("nvidia-smi")
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,compute_mode"
    query = [f"--query-gpu={fields}", "--format=csv"]
    skipped = "" if program else "nvidia-smi is not there"
    return Step("facts", [program or "", *query], verdict=last_lines, skipped=skipped)


def last_lines(log: str, _status: str) -> Judged:
    return None, log.splitlines()[1:]


def installation(on_gpu: bool) -> Step:
    environment = QUIET | {"BRANCHCORE_CUDA": "ON", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # the chips of one file are compiled side by side
    environment["NVCC_APPEND_FLAGS"] = "--threads=8"
    if shutil.which("nvcc") is None and (CUDA_BIN / "nvcc").exists():
        environment["CUDACXX"] = str(CUDA_BIN / "nvcc")
    install = python("-m", "pip", "install", "--no-build-isolation", "--no-deps", ROOT)
    # what was installed, not the checkout: the checkout's own folders are not on this path
    explain = python("-c", "import branchcore; print(branchcore.explain())")
    both = f"{shlex.join(install)} && cd / && PYTHONPATH= {shlex.join(explain)}"
    skipped = "" if on_gpu else "a rehearsal runs on what is installed"
    return Step("install", ["sh", "-c", both], environment=environment, skipped=skipped)


def doctor() -> Step:
    command = python("-m", "branchcore", "doctor", "--json")
    return Step("doctor", command, environment=QUIET, verdict=first_json)


def first_json(log: str, _status: str) -> Judged:
    """Finds the report in a log that may hold warnings too."""
    start = log.find("\n{")
    try:
        return None, json.JSONDecoder().raw_decode(log[start + 1 :])[0]
    except ValueError:
        return None, {"error": "doctor printed no JSON", "log": log.splitlines()[-20:]}


def tests(on_gpu: bool, logs: Path) -> list[Step]:
    """Splits the tests in two commands: the conformance matrix of the GPU, and what is marked."""
    common = ["-p", "no:cacheprovider", "-p", "gpu_pytest", "--durations=5"]
    if on_gpu and find_spec("xdist"):
        # groups: tests that need much memory run one after the other
        workers = max(min(6, (os.cpu_count() or 2) // 2), 1)
        common += ["-n", str(workers), "--dist", "loadgroup"]
    if on_gpu and find_spec("pytest_timeout"):
        # a kernel that never ends holds the main thread
        common += ["--timeout=60", "--timeout-method=thread"]
    chosen = "gpu" if on_gpu else "branch_step and generic and matches"
    commands = {
        "conformance": [ROOT / "tests" / "test_ops_conformance.py", "-k", chosen],
        "gpu tests": [ROOT / "tests", "-m", "gpu"] if on_gpu else [ROOT / "tests/test_gpu.py"],
    }
    found = []
    for name, which in commands.items():
        junit = logs / f"{name.replace(' ', '_')}.xml"
        command = python("-m", "pytest", *which, *common, f"--junitxml={junit}")
        least = {"conformance": "cuda-gpu"}.get(name, "") if on_gpu else None
        step = Step(name, command, junit=junit, must_run=least, environment=QUIET)
        found.append(step)
    return found


def sanitizers(on_gpu: bool) -> list[Step]:
    beside = CUDA_BIN / "compute-sanitizer"
    program = shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)
    skipped = "" if program else "compute-sanitizer is not there"
    if not on_gpu:
        skipped = "a rehearsal has no GPU"
    environment = QUIET | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch asks the driver for what it may not have, and its kernels are not ours to check
    only = {
        "memcheck": ["--report-api-errors", "no"],
        "racecheck": [] if skipped else our_kernels(str(program)),
    }
    found = []
    for tool, which in only.items():
        options = ["--tool", tool, "--error-exitcode", str(HAZARDS), "--print-limit", "20", *which]
        small = python(BENCH / "small_cases.py", "--implementation", "cuda")
        command = [program or "", *options, *small]
        step = Step(tool, command, environment=environment, verdict=sanitized, skipped=skipped)
        found.append(step)
    return found


def our_kernels(program: str) -> list[str]:
    """Restricts a sanitizer to kernels in our namespace, as its version spells that."""
    try:
        said = subprocess.run(
            [program, "--help"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    option = next((name for name in ("--kernel-name", "--kernel-regex") if name in said), None)
    return [option, "kns=branchcore"] if option else []


def sanitized(log: str, status: str) -> Judged:
    """Tells what a sanitizer found from a device that it does not support, and from no time."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    cases = re.findall(r"\w+: \d+ cases", log)
    if "not supported" in log and not cases:
        return "skipped", "compute-sanitizer does not support this device"
    reports = re.findall(r"========= (?:Invalid|Error: |Misaligned|Race|Program hit).*", log)
    if status == "cut off" and not reports:
        done = sum(int(case.split()[1]) for case in cases)
        planned = re.findall(r"^(\d+) cases to run", log, re.MULTILINE)
        return "cut short", [f"{done} of {planned[0] if planned else '?'} cases", *cases]
    return None, [*cases, *summary, *reports[:10]]


def compilations(device: str) -> Iterator[Step]:
    """Fill the compilers' caches while nothing is timed; their failures are those of `ops`."""
    for number, which in enumerate(COMPILED if device == "cuda" else ("branch_step",)):
        options = ["--op", which, "--mode", "compile"]
        options += ["--gpu-cases"] * (device == "cpu")
        command = python(BENCH / "ops.py", "--device", device, *options)
        name = f"compile {number + 1}"
        yield Step(name, command, takes_budget=True, environment=QUIET, verdict=never_fails)


def never_fails(log: str, _status: str) -> Judged:
    return "ok", log.splitlines()[-3:]


def ops(out: Path, device: str) -> Step:
    result = out / "ops.json"
    which = ["--gpu-cases"] if device == "cpu" else []
    command = python(BENCH / "ops.py", "--device", device, "--json", result, *which)
    # its last case may compile before it is timed
    return Step(
        "ops",
        command,
        result=result,
        takes_budget=True,
        reserve=25.0 if device == "cuda" else 8.0,
        resumable=True,
        environment=QUIET,
    )


def checklist(out: Path, device: str) -> Step:
    result = out / "checklist.json"
    command = python(BENCH / "gpu_checklist.py", "--device", device, "--json", result)
    return Step("checklist", command, result=result, takes_budget=True, environment=QUIET)


def tree(out: Path, on_gpu: bool) -> Step:
    """SD3.5-M itself where diffusers and peft are installed, else a plain model of its shapes."""
    result = out / "tree_throughput.json"
    which = ["--device", "cuda"]
    if all(find_spec(package) for package in ("diffusers", "peft")):
        which += ["--model", "sd35m512"]
    if not on_gpu:
        which = ["--device", "cpu", "--model", "mmdit-small", "--leaves", "12", "--steps", "7"]
        which += ["--plans", "branch,exact:branch,steel:branch,engine"]
    command = python(BENCH / "tree_throughput.py", *which, "--json", result)
    return Step("tree", command, result=result, takes_budget=True, reserve=15.0, environment=QUIET)
