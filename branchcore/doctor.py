"""What this machine should offer, and whether it does: versions, choices, and every op once.

`python -m branchcore doctor` prints a `Report` and exits with 1 if it names something to fix.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from branchcore import _dispatch, _machine, ops, testing
from branchcore._machine import Gpu, Machine
from branchcore.testing import OpSpec, Outcome

_INDENT = "  "


class Duty(NamedTuple):
    """One thing that this machine must be able to do."""

    implementation: str
    device: str


class Choice(NamedTuple):
    """What runs an op on a device, and why not something faster."""

    op: str
    device: str
    float32: str
    bfloat16: str
    float64: str
    passed_over: dict[str, str]
    """Reason per implementation that is preferred to the one for float32."""


class Check(NamedTuple):
    """One op, run once and held against float64."""

    op: str
    implementation: str
    device: str
    passed: bool
    found: str


class Report(NamedTuple):
    """Everything that `doctor` prints."""

    machine: Machine
    choices: list[Choice]
    checks: list[Check]
    to_fix: list[str]

    def as_json(self) -> dict[str, Any]:
        """Turn it into what `json.dumps` takes."""
        machine = self.machine._asdict() | {
            "driver": self.machine.driver._asdict(),
            "gpus": [gpu._asdict() for gpu in self.machine.gpus],
        }
        return {
            "healthy": not self.to_fix,
            "machine": machine,
            "choices": [choice._asdict() for choice in self.choices],
            "checks": [check._asdict() for check in self.checks],
            "to_fix": self.to_fix,
        }

    def __str__(self) -> str:
        sections = {
            f"branchcore {self.machine.branchcore} on {self.machine.system}": _table(
                _machine.facts(self.machine)
            ),
            "which implementation runs, and why not a preferred one": _table(
                [("op", "device", "float32", "bfloat16", "float64", ""), *self.choices]
            ),
            "the first case of every op, against float64": _table(self.checks),
            "to fix": self.to_fix or ["nothing"],
        }
        texts = ("\n".join([title, *(_INDENT + x for x in sections[title])]) for title in sections)
        return "\n\n".join(texts)


def examine() -> Report:
    """Look at the machine, run every op that can run on it, and name what to fix."""
    machine = _machine.examine()
    checks = list(run_checks())
    return Report(machine, choices(), checks, to_fix(machine, checks))


def should_offer(machine: Machine) -> list[Duty]:
    """Say what a machine must be able to do; what is not named here is never missed.

    The CPU runs the reference and the compiled kernels. Every GPU that torch or NVIDIA's driver
    shows runs the reference, so torch must see it. A GPU that torch sees runs the CUDA kernels if
    this build has them and it is NVIDIA's; and Triton's, if Triton is installed or nothing else is
    fast there.
    """
    duties = [Duty("reference", "cpu"), Duty("cpp", "cpu")]
    for index in range(max(len(machine.gpus), machine.driver.num_gpus)):
        device = f"cuda:{index}"
        duties.append(Duty("reference", device))
        if index >= len(machine.gpus):
            continue
        compiled = bool(machine.static_cuda) and not machine.torch_hip
        if compiled:
            duties.append(Duty("cuda", device))
        if machine.triton or not compiled:
            duties.append(Duty("triton", device))
    return duties


def to_fix(machine: Machine, checks: Sequence[Check]) -> list[str]:
    """Name every duty that the machine does not meet, every failed check, and what to do."""
    lines: list[str] = []
    if machine.forced:
        lines.append(
            f"BRANCHCORE_IMPL={machine.forced} forces one implementation for every op; unset it"
        )
    if machine.driver.failure:
        lines.append(
            f"NVIDIA driver: {machine.driver.failure}; reinstall the driver or reboot; in a "
            "container, start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
    for duty in should_offer(machine):
        why = _missing(machine, duty)
        if why is not None:
            lines.append(f"{duty.implementation} on {duty.device} {why}")
    return lines + _failures(checks)


def _missing(machine: Machine, duty: Duty) -> str | None:
    seen = {gpu.device: gpu for gpu in machine.gpus}
    if duty.device != "cpu" and duty.device not in seen:
        return _unseen(machine)
    device = torch.device(duty.device)
    why = _dispatch.obstacle(duty.implementation, device, torch.float32)
    if why is None or duty.implementation == "reference":
        return why
    if duty.implementation == "cpp":
        return f"{why}; {_no_module(machine)}"
    if duty.implementation == "triton":
        return f"{why}; try pip install 'branchcore[triton]', or BRANCHCORE_CUDA=ON pip install ."
    return _no_cuda_kernels(machine, seen[duty.device], why)


def _unseen(machine: Machine) -> str:
    torch_cuda, driver_cuda = machine.torch_cuda, machine.driver.cuda
    if not torch_cuda:
        return (
            f"is hidden: torch {machine.torch} is built without CUDA; install a build with CUDA "
            f"{driver_cuda} or older, see https://pytorch.org/get-started"
        )
    if _numbers(driver_cuda) < _numbers(torch_cuda):
        return (
            f"is hidden: torch {machine.torch} is for CUDA {torch_cuda}, the driver for CUDA "
            f"{driver_cuda}; update the driver or install a torch for an older CUDA"
        )
    return 'is hidden: see what python -c "import torch; torch.cuda.init()" says'


def _no_module(machine: Machine) -> str:
    if machine.foreign_modules:
        return (
            f"{', '.join(machine.foreign_modules)} is not for Python {machine.python}; "
            "reinstall with this Python: pip install --force-reinstall --no-deps branchcore"
        )
    return "try pip install -e . in the checkout, which needs a C++17 compiler, or a wheel"


def _no_cuda_kernels(machine: Machine, gpu: Gpu, why: str) -> str:
    older = _numbers(machine.driver.cuda)[:1] < _numbers(machine.static_cuda)[:1]
    if not older and not gpu.compiled:
        return (
            f"{why.partition(';')[0]}; "
            f"try BRANCHCORE_CUDA=ON BRANCHCORE_CUDA_ARCHS={gpu.chip} pip install ."
        )
    return why


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _failures(checks: Sequence[Check]) -> list[str]:
    """One line per implementation and device, since one cause tends to break all ops."""
    failed: dict[Duty, list[Check]] = {}
    for check in checks:
        if not check.passed:
            failed.setdefault(Duty(check.implementation, check.device), []).append(check)
    return [
        f"{duty.implementation} on {duty.device} fails in {', '.join(each.op for each in those)} "
        f"({those[0].found}); {_way_out(those[0])}"
        for duty, those in failed.items()
    ]


def _way_out(check: Check) -> str:
    if check.implementation in ("cpp", "cuda") and check.found.startswith("AttributeError"):
        return "the compiled module is older than the package: build it again, pip install -e ."
    if check.implementation == "reference":
        return "please report it with all of this"
    return "please report it with all of this; until then, BRANCHCORE_IMPL=reference avoids it"


def choices() -> list[Choice]:
    """Say which implementation runs each registered op on each device."""
    return [_choice(op, device) for op in _dispatch.registered() for device in _dispatch.devices()]


def _choice(op: str, device: torch.device) -> Choice:
    chosen: list[str] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        try:
            chosen.append(_dispatch.choose(op, device, dtype))
        except NotImplementedError:
            chosen.append("refused")
    preferred = takewhile(lambda name: name != chosen[0], _dispatch.IMPLEMENTATIONS)
    reasons = {name: _reason(op, name, device) for name in preferred}
    return Choice(op, str(device), chosen[0], chosen[1], chosen[2], reasons)


def _reason(op: str, implementation: str, device: torch.device) -> str:
    if implementation not in _dispatch.registered()[op]:
        return "not written for this op"
    why = _dispatch.obstacle(implementation, device, torch.float32)
    return why or "another one is forced"


def run_checks() -> Iterator[Check]:
    """Run the first case of every op with every implementation that can run here."""
    registered = _dispatch.registered()
    names = (module.name for module in pkgutil.iter_modules(ops.__path__))
    for op in (name for name in names if name in registered):
        spec: OpSpec = importlib.import_module(f"branchcore.ops.{op}").SPEC
        for device in _dispatch.devices():
            # the plainest first: a crashed kernel takes the rest of its device with it
            for implementation in reversed(registered[op]):
                if _dispatch.obstacle(implementation, device, torch.float32) is None:
                    yield _run(spec, implementation, device)


def _run(spec: OpSpec, implementation: str, device: torch.device) -> Check:
    try:
        inputs = testing.to(spec.build(**spec.cases[0].options), device)
        with _dispatch.use(implementation):
            outcomes = testing.check(spec, inputs)
    except Exception as error:  # whatever an implementation raises is what is asked for
        first = (str(error).strip() or "no message").splitlines()[0]
        return Check(
            spec.name, implementation, str(device), False, f"{type(error).__name__}: {first}"
        )
    worst = max(outcomes, key=_share)
    passed = all(outcome.passed for outcome in outcomes)
    found = f"{worst.name}: error {worst.error:.1e}, at most {worst.bound:.1e}"
    return Check(spec.name, implementation, str(device), passed, found)


def _share(outcome: Outcome) -> float:
    return outcome.error / max(outcome.bound, 1e-300) if outcome.passed else float("inf")


def _table(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Align columns; the last one, and texts of reasons, run free."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return list(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "ok" if value else "FAILED"
    if isinstance(value, dict):
        return "; ".join(f"not {name}: {why}" for name, why in value.items())
    return str(value)
