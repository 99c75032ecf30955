"""An hour of training under random faults, beside quiet runs of as many iterations.

    python bench/faults.py [--minutes 60] [--kill-every 5] [--seeds 0 1 2] [--out runs/faults]
        [--json bench/results/faults.json]

BranchGRPO with its digits preset on two processes under torchrun, which starts them again when one
is killed: 2 % of the reward's calls raise, 0.5 % hang, and every five minutes a process drawn at
random gets SIGKILL. Every call of the reward takes 3 s, as a served one would, so that an hour is
some hundred iterations. The quiet runs are of one process each, without pauses; the first has the
seed of the disturbed run. A run is judged by its held-out reward (60 prompts x 8 noises).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults_run import EVERY, events
from machine import facts
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"
SCRIPT = Path(__file__).with_name("faults_run.py")
ENDLESS = 10**6
FAULTS = {"raises": 0.02, "hangs": 0.005, "pause": 3.0}


def rows(out: Path) -> list[dict[str, Any]]:
    """Returns the metrics of a run so far."""
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def happened(out: Path) -> list[dict[str, Any]]:
    """Returns the events of a run."""
    path = events(out)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def disturbed(out: Path, seed: int, minutes: float, kill_every: float) -> dict[str, Any]:
    """Trains under faults for some minutes and returns what happened."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc-per-node=2", "--max-restarts=99", str(SCRIPT)]
    options = [w for name, value in FAULTS.items() for w in (f"--{name}", str(value))]
    draw, kills = random.Random(), list[dict[str, Any]]()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("ab") as log:
        run = subprocess.Popen(
            [*words, str(out), str(seed), str(ENDLESS), *options], stdout=log, stderr=log
        )
        start = time.monotonic()
        due = start + 60.0 * kill_every
        try:
            with tqdm(total=round(60 * minutes), unit="s") as bar:
                while (left := start + 60.0 * minutes - time.monotonic()) > 0.0:
                    if run.poll() is not None:
                        raise RuntimeError(f"faults: the run must go on, it ended; see {log.name}")
                    time.sleep(min(1.0, left))
                    bar.update(round(time.monotonic() - start) - bar.n)
                    if time.monotonic() >= due:
                        kills.append(_kill(out, draw))
                        due += 60.0 * kill_every
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(timeout=120.0)
    return {"minutes": (time.monotonic() - start) / 60.0, "kills": kills}


def _kill(out: Path, draw: random.Random) -> dict[str, Any]:
    """Kills a process that started last on its rank; returns rank and iteration."""
    newest = {e["rank"]: e["pid"] for e in happened(out) if e["what"] == "start"}
    rank = draw.choice(sorted(newest))
    done = rows(out)
    os.kill(newest[rank], signal.SIGKILL)
    return {"rank": rank, "after_iteration": done[-1]["iteration"] if done else 0}


def quiet(out: Path, seed: int, iterations: int) -> None:
    """Trains without faults, on one process."""
    words = [sys.executable, str(SCRIPT), str(out), str(seed), str(iterations)]
    with out.with_suffix(".log").open("ab") as log:
        subprocess.run(words, stdout=log, stderr=log, check=True)


def held_out(out: Path) -> dict[int, float]:
    """Returns the held-out reward by iteration."""
    return {r["iteration"]: r["eval/reward"] for r in rows(out) if "eval/reward" in r}


def result_of(out: Path, seeds: Sequence[int], end: int, told: dict[str, Any]) -> dict[str, Any]:
    """Returns the result file of finished runs, all judged at one iteration."""
    counts = Counter(e["what"] for e in happened(out / "disturbed"))
    done = [r for r in rows(out / "disturbed") if r["iteration"]]
    numbers = [r["iteration"] for r in done]
    curves = {f"quiet {seed}": held_out(out / f"quiet-{seed}") for seed in seeds}
    return {
        "meta": facts(),
        **told,
        "faults": dict(counts),
        "masked_leaves": sum(r.get("masked_leaves", 0) for r in done),
        "iterations": numbers[-1],
        "every_iteration_once": numbers == list(range(1, numbers[-1] + 1)),
        "judged_at": end,
        "cut_short": end < max(held_out(out / "disturbed")),
        "disturbed": held_out(out / "disturbed")[end],
        "quiet": [curves[f"quiet {seed}"][end] for seed in seeds],
        "curves": {"disturbed": held_out(out / "disturbed"), **curves},
    }


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Training under random faults.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kill-every", type=float, default=5.0, help="minutes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="quiet runs")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args(words)
    told = disturbed(args.out / "disturbed", args.seeds[0], args.minutes, args.kill_every)
    end = max(held_out(args.out / "disturbed"))
    if end < EVERY:
        raise RuntimeError(f"faults: the run must reach iteration {EVERY}, got {end}")
    for seed in tqdm(args.seeds, unit="quiet run"):
        quiet(args.out / f"quiet-{seed}", seed, end)
    result = result_of(args.out, args.seeds, end, told)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("meta", "curves")}, indent=1))


if __name__ == "__main__":
    main()
