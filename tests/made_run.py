"""Folders of runs that never ran: rows, trees and samples as training writes them."""

import json
import math

import numpy as np
import torch

from branchcore.models.commands.sample_history import keep_samples
from branchcore.run_records import SESSIONS, TREES, write_record

HOSTILE = "</script><script>alert('x')</script> & \"a\" <img src=http://x.invalid/y.png>"
PROMPTS = ("a red cube", HOSTILE, "日本の猫")
WARNING = (
    "clip_share: must be below half of the trained edges, got 0.61 (steps are too long for a clip "
    "range of 0.001; clipped edges have no gradient); try a smaller lr, fewer updates or a larger "
    "clip"
)


def row(i, iterations=30):
    found = {
        "iteration": i, "reward": i / 10 - 1.0, "reward/a": i / 20.0, "reward_std/a": 0.25,
        "reward/b": -1.0, "reward_std/b": 0.5, "zero_std_share": 0.1, "clip_share": 0.6,
        "ratio_dev_mean": 1e-4 * i, "ratio_dev_max": 1e-2, "noise_floor": 2e-5, "kl": 1e-3 * i,
        "grad_norm": math.nan if i == 4 else 0.5, "wall_s": 3.0, "time/rollout": 2.0,
        "time/update": 0.75, "time/other": 0.25, "mfu": 0.31, "memory_gb": 40.0,
        "work_saved": 0.4, "kept_share": 0.5, "skew/rollout": 0.07, "slowest/rollout": 1,
    }  # fmt: skip
    if i == 0:
        return {"iteration": 0, "eval/reward": -1.0, "eval/a": 0.0, "eval/diversity": 0.5}
    if i % 10 == 0:
        found |= {"eval/reward": i / 10, "eval/a": 0.1, "eval/diversity": 0.4, "eval/x_right": 0.5}
    if i == 7:
        found["warnings"] = [WARNING]
    if i == 9:
        found |= {"skipped": "gradient: must be finite, got NaN <b>"}
    return found


def tree(prompt=HOSTILE):
    """One root, two children, two leaves of each; one edge is pruned, one leaf is masked."""
    return {
        "prompt": prompt, "components": ["a", "b"], "reward_weights": [1.0, 2.0],
        "parent": [-1, 0, 0, 1, 1, 2, 2], "sigma": [1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        "stochastic": [False, *[True] * 6], "train": [False, *[True] * 6],
        "advantage": [0.0, 1.0, -1.0, 0.5, 1.5, -0.25, -2.0],
        "pruned": [False] * 5 + [True, False], "stopped": [False] * 7,
        "leaves": [3, 4, 5, 6], "rewards": [[1.0, 0.5], [2.0, 1.0], [0.0, -1.0], [None, None]],
    }  # fmt: skip


def make(out, *, iterations=30, goal=30, samples=True, trees=True, sessions=1):
    out.mkdir(parents=True)
    rows = [json.dumps(row(i)) + "\n" for i in range(iterations + 1)]
    (out / "metrics.jsonl").write_text("".join(rows))
    recipe = {"name": "branch_<mix>", "sigmas": [1.0, 0.5, 0.0], "clip": 0.001}
    config = {"lr": 6e-4, "fast_limit": math.inf, "prune": {"rule": "none", "rate": 0.0}}
    identity = {"recipe": recipe, "config": config, "facts": {"model": "digits", "path": HOSTILE}}
    (out / "run.json").write_text(json.dumps(identity))
    starts = [
        {"started": "2026-01-02T03:04:05+00:00", "after": 10 * i, "iterations": goal,
         "processes": 2, "device": "cuda, GPU <1>", "versions": {"torch": "2.13.0"}}
        for i in range(sessions)
    ]  # fmt: skip
    (out / SESSIONS).write_text("".join(json.dumps(start) + "\n" for start in starts))
    if trees:
        for at in (1, 10, 20, 30):
            if at <= iterations:
                text = json.dumps({"iteration": at, **tree()})
                write_record(out, TREES, f"{at:06d}.json", text.encode())
    if samples:
        for at in range(0, iterations + 1, 10):
            noise = np.random.default_rng(at).random((len(PROMPTS), 4, 1, 8, 8))
            keep_samples(out, at, torch.from_numpy(noise), PROMPTS)
    return out
