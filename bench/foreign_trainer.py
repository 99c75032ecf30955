"""CPU seconds of an iteration of a foreign Flow-GRPO trainer, as it is and at three depths.

    python bench/foreign_trainer.py --json bench/results/foreign.json

The trainers are those of tests/foreign, on diffusers' SD3 classes with random weights: `tiny` is
the pipeline of the tests (width 32), `small` has a transformer of width 128, where matrix products
and not calls take the time. All train the same LoRA with guidance on the same
number of leaves. The trainers take turns, each round runs them in another order, and the first
iteration of every turn is not counted. Ten minutes.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import ROOT, facts
from measure import keep_freed_memory, paired_ratio
from readme_text import markdown

sys.path.insert(0, str(ROOT / "tests"))
Config: Any = importlib.import_module("foreign.config").Config

PROMPTS = ("a bold cat", "seven dogs on the red house", "blue", "a thin red cat")
TREE = {"method": "branchcore", "splits": (0, 2, 4), "branching": 2}
"""8 leaves of a tree, the group of the others."""


class Arm(NamedTuple):
    """A trainer and what it is given."""

    trainer: str
    options: dict[str, Any]
    what: str


ARMS = {
    "original": Arm("original", {}, "diffusers, peft, accelerate, no branchcore"),
    "depth 1": Arm("depth1", {}, "step and loss swapped"),
    "depth 2": Arm("depth2", {}, "iterations by the engine, same recipe"),
    "depth 3": Arm("depth3", {}, "all by the engine, same recipe"),
    "depth 3, tree": Arm("depth3", TREE, "all by the engine, recipe `branchcore`, equal leaves"),
}
SIZES = {"tiny": None, "small": 128}
"""Width of the transformer if it is not the tests' own."""


def build(folder: Path, width: int | None) -> None:
    """Writes a pipeline with random weights, as the tests do."""
    importlib.import_module("tiny_pipelines.sd3").build(folder)
    if width is None:
        return
    sd3: Any = importlib.import_module("diffusers").SD3Transformer2DModel
    parts: Any = importlib.import_module("tiny_pipelines.parts")
    with parts.seeded():
        transformer = sd3(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            num_attention_heads=width // 64, attention_head_dim=64, caption_projection_dim=width,
            joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        parts.liven(transformer).save_pretrained(folder / "transformer")


def redness(images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Scores images (L, 3, H, W)."""
    del prompts
    return {"reward": images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))}


def seconds(arm: Arm, config: Any) -> tuple[list[float], list[float]]:
    """Runs a trainer; returns CPU and wall seconds of every iteration but the first."""
    cpu, wall = [], []

    def log(_row: dict[str, Any]) -> None:
        cpu.append(time.process_time())
        wall.append(time.perf_counter())

    importlib.import_module(f"foreign.{arm.trainer}").train(config, redness, log, **arm.options)
    return np.diff(cpu).tolist(), np.diff(wall).tolist()


def measure(size: str, kl: float, rounds: int, iterations: int) -> dict[str, Any]:
    """Returns a row per trainer of one pipeline."""
    spent: dict[str, list[float]] = {name: [] for name in ARMS}
    waited: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / size
        build(model, SIZES[size])
        for turn in range(rounds):
            names = list(ARMS) if turn % 2 else list(ARMS)[::-1]
            for name in names:
                config = Config(
                    model=str(model),
                    prompts=PROMPTS,
                    out=f"{folder}/{name}-{turn}",
                    kl=kl,
                    epochs=1 + iterations,
                )
                cpu, wall = seconds(ARMS[name], config)
                spent[name].append(float(np.median(cpu)))
                waited[name].append(float(np.median(wall)))
    rows = []
    for name, arm in ARMS.items():
        ratio, ci = paired_ratio(spent["original"], spent[name])
        rows.append(
            {
                "name": name,
                "what": arm.what,
                "cpu_s": round(float(np.median(spent[name])), 4),
                "wall_s": round(float(np.median(waited[name])), 4),
                "ratio": round(ratio, 3),
                "ci95": [round(x, 3) for x in ci],
            }
        )
    return {"size": size, "kl": kl, "rounds": rounds, "iterations": iterations, "rows": rows}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--kl", nargs="+", type=float, default=[0.04, 0.0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    meta, cases = facts(), []
    config = {"group": Config.group, "prompts": Config.prompts_per_epoch, "steps": Config.steps,
              "batch": Config.batch, "guidance": Config.guidance}  # fmt: skip
    for size in args.sizes:
        for kl in args.kl:
            cases.append(measure(size, kl, args.rounds, args.iterations))
            print(f"{size}, kl {kl}")
            head = ("trainer", "CPU s", "original / it")
            rows = [
                [r["name"], f"{r['cpu_s']:.3f}", f"{r['ratio']:.2f}"] for r in cases[-1]["rows"]
            ]
            print(markdown(head, rows), flush=True)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"meta": meta, "config": config, "cases": cases}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
