"""Time every op on a GPU: all its implementations against eager torch and torch.compile of it.

Run through `bench/ops.py --device cuda`. A case is compared with float64 before it is timed; a red
one is not timed and fails the run. Same dtype, same outputs, interleaved rounds, copies of 1 GiB in
every round, the faster of which is the ceiling; results are written after every case, so that a run
that is cut short leaves a whole file. Missed targets do not fail the run.
"""

from __future__ import annotations

import gc
import json
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from attempts import ContextDied, attempt, write_json
from gpu_cases import Case, noise_cases
from gpu_model_cases import model_cases
from gpu_timing import Call, Lane, Make, Prepared, num_sets, paired, spread, time_in_turn
from gpu_variants import compiler, forced, implementations
from gpu_verdicts import ceilings, verdicts, with_floors
from machine import facts
from torch._functorch import config as functorch_config

from branchcore import _dispatch, testing

COPY_BYTES = {"cuda": 2**30, "cpu": 2**20}
CASE_SECONDS = {"cuda": 0.5, "cpu": 0.0}
CASE_ROUNDS = {"cuda": (7, 40), "cpu": (2, 2)}
URGENT = ("wan-480p", "sd35-512", "vae-512")
"""Sizes with a target come first: a budget cuts the others."""
BROKEN = 75
"""Exit code of a run whose GPU context died; the same command with --resume goes on after it."""


class Bench:
    """The cases of one device, what was found, and what went wrong."""

    def __init__(self, device: torch.device, path: Path | None, budget: float) -> None:
        self.device, self.path = device, path
        self.start, self.end = time.perf_counter(), time.perf_counter() + budget
        self.rows: list[dict[str, Any]] = []
        self.cut: list[str] = []
        self.failures: list[dict[str, str]] = []
        self.copy_seconds: dict[str, list[float]] = {}
        self.checked: dict[str, bool] = {}
        self.meta = facts(device) | {"budget_s": budget}
        # backward of the compiled baselines is called again and again on one forward
        functorch_config.donated_buffer = False
        self.lane = Lane(device)
        source = torch.randn(COPY_BYTES[device.type] // 8, device=device)
        target = torch.empty_like(source)
        # a copy engine or a kernel like ours: either may be the faster one
        copies: dict[str, Call] = {
            "copy": lambda: target.copy_(source),
            "negated copy": lambda: torch.neg(source, out=target),
        }
        self.copies = {name: self.lane.prepare(lambda _, c=c: c, 1) for name, c in copies.items()}

    def cases(self, op: str | None) -> list[Case]:
        found = [*noise_cases(self.device), *model_cases(self.device)]
        order = {size: rank for rank, size in enumerate(URGENT)}
        found.sort(key=lambda case: order.get(case.size, len(URGENT)))
        return [case for case in found if op is None or any(o in case.op for o in op.split(","))]

    def resume(self) -> None:
        """Takes over rows and failures of a run that broke: neither is tried again."""
        before = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}
        self.rows, self.failures = before.get("rows", []), before.get("failures", [])
        self.checked = before.get("conformance", {})
        self.copy_seconds = before.get("copy_seconds", {})

    def run(self, op: str | None) -> bool:
        """Times the cases; False if the GPU's context died, which ends the process's use of it."""
        known = {failure["what"] for failure in self.failures} | {row["name"] for row in self.rows}
        pending = self.cases(op)[::-1]
        while pending:
            case = pending.pop()
            name = f"{case.op} {case.size} {case.label} {case.direction}"
            if name in known:
                continue
            if time.perf_counter() > self.end:
                self.cut.append(name)
                continue
            try:
                attempt(name, partial(self.time, case, name), self.failures)
                # its inputs go with it
                del case
                attempt(f"after {name}", self.release, self.failures)
            except ContextDied:
                return False
            finally:
                self.write()
        return True

    def warm(self, op: str | None) -> None:
        """Runs everything once, so that compiled code is on disk when a run is timed."""
        pending = self.cases(op)[::-1]
        while pending and time.perf_counter() < self.end:
            case = pending.pop()
            makes = [forced(case.ours, name) for name in implementations(case, self.device)]
            makes.append(case.baseline(compiler(self.device)))
            for make in makes:
                attempt(case.op, lambda make=make: make(0)(), self.failures)
            del case, makes, make
            self.release()

    def release(self) -> None:
        """Frees what a case held and waits for it; raises if the GPU's context is dead."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def conforms(self, case: Case, implementation: str) -> bool:
        """Compares the case, cut to a few rows, with float64; says what is off."""
        for stem, options in case.checked:
            key = f"{stem} {options} {implementation}"
            if key not in self.checked:
                spec = import_module(f"branchcore.ops.{stem}").SPEC
                inputs = testing.to(spec.build(**options), self.device)
                with _dispatch.use(implementation):
                    wrong = [o for o in testing.check(spec, inputs) if not o.passed]
                self.checked[key] = not wrong
                if wrong:
                    raise AssertionError(f"{key}: must agree with float64, got {wrong}")
            if not self.checked[key]:
                return False
        return True

    def time(self, case: Case, name: str) -> None:
        sets = num_sets(self.device, case.footprint)
        fatal = {(f.get("op"), f.get("implementation")) for f in self.failures if "fatal" in f}
        makes: dict[str, Make] = {}
        for each in implementations(case, self.device):
            tags = {"op": case.op, "implementation": each}
            check = partial(self.conforms, case, each)
            if (case.op, each) not in fatal and attempt(
                f"{name} {each}", check, self.failures, **tags
            ):
                makes[each] = forced(case.ours, each)
        ours = list(makes)
        if not ours:
            return
        makes["eager"] = case.baseline(lambda function: function)
        makes["compile"] = case.baseline(compiler(self.device))
        ready: dict[str, Prepared] = {}
        for each, make in makes.items():
            tags = {"op": case.op, "implementation": each}
            prepare = partial(self.lane.prepare, make, sets)
            prepared = attempt(f"{name} {each}", prepare, self.failures, **tags)
            if prepared is not None:
                ready[each] = prepared
        kind = self.device.type
        timed = ready | self.copies
        times = time_in_turn(self.lane, timed, CASE_SECONDS[kind], CASE_ROUNDS[kind])
        for each in self.copies:
            self.copy_seconds.setdefault(each, []).extend(times.pop(each))
        for each in ready:
            row = describe(case, each, ready[each], times, baseline=each not in ours)
            self.rows.append(row | {"name": name, "sets": sets})
            print(text(row), flush=True)

    def result(self) -> dict[str, Any]:
        copied = {name: spread(seconds) for name, seconds in self.copy_seconds.items()}
        shortest = min((each.median for each in copied.values()), default=None)
        rate = None if shortest is None else COPY_BYTES[self.device.type] / shortest
        limits = ceilings(rate, self.rows)
        rows = [with_floors(row, limits) for row in self.rows]
        return {
            "meta": self.meta | {"seconds": time.perf_counter() - self.start},
            "ceilings": limits._asdict()
            | {"copy_s": {name: each._asdict() for name, each in copied.items()}},
            "copy_seconds": self.copy_seconds,
            "rows": rows,
            "verdicts": [verdict._asdict() for verdict in verdicts(rows)],
            "conformance": self.checked,
            "cut": self.cut,
            "failures": self.failures,
        }

    def write(self) -> None:
        write_json(self.path, self.result())


def describe(
    case: Case,
    implementation: str,
    prepared: Prepared,
    times: dict[str, list[float]],
    *,
    baseline: bool,
) -> dict[str, Any]:
    """Returns one row: what was timed, its microseconds, and its ratios round by round."""
    low, median, high = (1e6 * value for value in spread(times[implementation]))
    row: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "label": case.label,
        "direction": case.direction,
        "implementation": implementation,
        "baseline": baseline,
        "us": median,
        "us_p20": low,
        "us_p80": high,
        "bytes": case.num_bytes,
        "normals": case.num_normals,
        "graphed": prepared.graphed,
        "calls": prepared.calls,
        "rounds": len(times[implementation]),
        "host_us": 1e6 * prepared.host_seconds,
    }
    for other in ("eager", "compile"):
        known = not baseline and other in times
        row[f"ratio_to_{other}"] = (
            paired(times[other], times[implementation]).median if known else None
        )
    return row


def text(row: dict[str, Any]) -> str:
    ratios = [
        f"{row[f'ratio_to_{other}']:.2f}x {other}"
        for other in ("eager", "compile")
        if row[f"ratio_to_{other}"] is not None
    ]
    return (
        f"{row['op']:20s} {row['size']:9s} {row['label']:36s} {row['direction']:20s} "
        f"{row['implementation']:9s} {row['us']:10.2f} us {'' if row['graphed'] else '(launched) '}"
        f"{' '.join(ratios)}"
    )


def main(device: torch.device, op: str | None, path: Path | None, budget: float, mode: str) -> int:
    """Times the cases; returns 1 if one is red or broke, BROKEN if the GPU's context died.

    Args:
        device: tiny sizes on a CPU, where the numbers mean nothing.
        op: only cases whose op has one of these words, separated by commas, in its name.
        path: result file.
        budget: seconds; cases that do not fit are named.
        mode: "time"; "resume" after a run that broke; "compile" to fill the compilers' caches.
    """
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    bench = Bench(device, path, budget)
    if mode == "compile":
        with suppress(ContextDied):
            bench.warm(op)
        return int(bool(bench.failures))
    if mode == "resume":
        bench.resume()
    if not bench.run(op):
        return BROKEN
    bench.write()
    for name in bench.cut:
        print(f"cut by the budget: {name}")
    for verdict in bench.result()["verdicts"]:
        met = {True: "met", False: "missed", None: "-"}[verdict["met"]]
        print(f"{met:7s} {verdict['target']}: {verdict['wanted']}, got {verdict['got']}")
    return int(bool(bench.failures))
