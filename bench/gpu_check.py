"""Run all checks that need a GPU, each within its minutes, and write what came out.

    bench/gpu_check.sh OUT [--device cpu] [--limit 530]

Steps of one phase that nobody times run side by side. A step that fails or is cut off is recorded
and the later ones still run; the time that a step leaves goes to those after it. `--device cpu`
rehearses every step that can run without a GPU, tiny: its numbers mean nothing.
This file needs nothing but Python, so that it can report an installation that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from gpu_steps import ROOT, Step, phases
from gpu_summary import counts, ran, summary, tail

LOG_BYTES = 400_000
BROKEN = 75
"""Exit code of a step that can go on where it broke, with --mode resume."""
GRACE = ((signal.SIGINT, 8.0), (signal.SIGTERM, 4.0), (signal.SIGKILL, 4.0))


class Running(NamedTuple):
    """A started step."""

    step: Step
    child: subprocess.Popen[bytes]
    log: Path
    start: float
    end: float
    resumed: int = 0


class Check:
    """One run: where it writes, when it must end, what has happened so far."""

    def __init__(self, out: Path, device: str, limit: float, logs: Path) -> None:
        self.out, self.device, self.logs = out, device, logs
        self.start = time.monotonic()
        self.limit = limit
        self.steps: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Runs all phases; returns 1 if a step failed."""
        planned, used = phases(self.out, self.device, self.logs), 0.0
        scale = self.limit / sum(seconds for seconds, _ in planned)
        for seconds, steps in planned:
            used += scale * seconds
            running = []
            for step in steps:
                if step.skipped:
                    self.note({"name": step.name, "status": "skipped", "why": step.skipped})
                    continue
                running.append(self.begin(step, self.start + used))
            while running:
                running = self.collect(running)
                time.sleep(0.05)
            self.write()
        # of a step that was ended while it wrote
        for part in self.out.glob("*.part"):
            part.unlink()
        return int(any(step["status"] in ("failed", "cut off") for step in self.steps))

    def begin(self, step: Step, end: float, resumed: int = 0) -> Running:
        log = self.logs / f"{step.name.replace(' ', '_')}.log"
        left = max(end - time.monotonic(), 5.0)
        command = [*step.command, *step.with_budget(left - step.reserve)]
        command += ["--mode", "resume"] * bool(resumed)
        print(f"[{time.monotonic() - self.start:5.0f} s] {step.name}, {left:.0f} s", flush=True)
        with log.open("ab") as target:
            target.write(f"$ {' '.join(command)}\n".encode())
            target.flush()
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | step.environment,
                stdout=target,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        start = time.monotonic()
        return Running(step, child, log, start, max(end, start + 5.0), resumed)

    def collect(self, running: list[Running]) -> list[Running]:
        """Notes the steps that are done or out of time, and returns the others."""
        now = time.monotonic()
        late = [each for each in running if each.child.poll() is None and now >= each.end]
        stop([each.child for each in late])
        left = (self.look(each, late=each in late) for each in running)
        return [each for each in left if each is not None]

    def look(self, running: Running, *, late: bool) -> Running | None:
        """Returns a step that is still at work; None when it is done and noted."""
        step, child, *_ = running
        code, now = child.poll(), time.monotonic()
        if late:
            code = None
        elif code is None:
            return running
        if code == BROKEN and step.resumable and running.resumed < 8 and now + 15 < running.end:
            return self.begin(step, running.end, running.resumed + 1)
        status = "cut off" if late else "ok" if code == 0 else "failed"
        row = {
            "name": step.name,
            "status": status,
            "code": code,
            "seconds": round(now - running.start, 1),
            "allowed": round(running.end - running.start, 1),
            "resumed": running.resumed,
        }
        self.note(row | self.found(step, running.log, status))
        return None

    def found(self, step: Step, log: Path, status: str) -> dict[str, Any]:
        """Reads what a step left, and makes sure that its result file is one."""
        found: dict[str, Any] = {}
        if step.junit is not None:
            found["tests"] = counts(step.junit)
            if status == "ok" and step.must_run is not None and not ran(step.junit, step.must_run):
                wanted = f"a test with {step.must_run!r} in its name" if step.must_run else "a test"
                found |= {"status": "failed", "why": f"{wanted} must run, got none"}
        if step.verdict is not None:
            judged, found["found"] = step.verdict(tail(log, 4000, 100_000), status)
            if judged is not None:
                found["status"] = judged
        if step.result is not None:
            try:
                whole = json.loads(step.result.read_text())
                if status == "cut off" and whole.get("failures") == []:
                    found["status"] = "cut short"
            except (OSError, ValueError) as error:
                left = {"error": f"no result: {error}", "status": status, "log": tail(log, 30)}
                step.result.write_text(json.dumps(left, indent=1) + "\n")
        if found.get("status", status) != "ok":
            found["log"] = tail(log, 12)
        return found

    def note(self, row: dict[str, Any]) -> None:
        self.steps.append(row)
        print(f"    {row['name']}: {row['status']} {row.get('why', '')}", flush=True)

    def write(self) -> None:
        """Writes check.json, log.txt and summary.md; called after every phase."""
        result = {
            "device": self.device,
            "limit_s": self.limit,
            "seconds": round(time.monotonic() - self.start, 1),
            "steps": self.steps,
        }
        (self.out / "check.json").write_text(json.dumps(result, indent=1) + "\n")
        with (self.out / "log.txt").open("wb") as whole:
            for log in sorted(self.logs.glob("*.log")):
                text = log.read_bytes()
                whole.write(f"===== {log.stem}\n".encode())
                whole.write(text if len(text) <= LOG_BYTES else b"[...]\n" + text[-LOG_BYTES:])
        (self.out / "summary.md").write_text(summary(self.out, result))


def stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends steps and all that they started, politely first: pytest still says what it found."""
    for how, seconds in GRACE:
        # what a step started may outlive it: the group is asked until it is empty
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, how)
        end = time.monotonic() + seconds
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(end - time.monotonic(), 0.0))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results; made if it is not there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for everything")
    options = parser.parse_args()
    with TemporaryDirectory() as logs:
        check = Check(options.out.resolve(), options.device, options.limit, Path(logs))
        code = check.run()
    print((options.out / "summary.md").read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())
