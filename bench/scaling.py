"""Count the collectives of an iteration on small worlds; extrapolate them by closed forms.

python bench/scaling.py --json bench/results/scaling.json

The digits model on 1, 2 and 4 processes over gloo, started by torchrun; every count must equal its
closed form. Bytes are those that a process sends in a ring. Runs on a CPU, two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import machine
import numpy as np
import scaling_forms as forms
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from branchcore import TrainerConfig, parallel, recipes, schedule
from branchcore.distributed import Ranks, joined
from branchcore.models.digits.model import load_digits_model
from branchcore.models.digits.prompts import PROMPTS
from branchcore.parallel import ParallelConfig
from branchcore.recipes.recipe import Recipe
from branchcore.rollout import num_calls
from branchcore.trainer import Trainer

BUCKET, PROMPTS_EACH, BATCH, GPUS = 2**19, 4, 8, (8, 64, 512)
WAYS: dict[str, dict[str, Any]] = {
    "replicate": {"kind": "replicate"},
    "shard": {"kind": "shard"},
    "hybrid": {"kind": "shard", "shards": 2},
    "reshard": {"kind": "shard", "reshard": True},
}
OPS = {
    "allreduce_": forms.REDUCES, "all_reduce": forms.REDUCES, "_allgather_base_": forms.GATHERS,
    "_reduce_scatter_base_": forms.SCATTERS, "allgather_": forms.CONTROL,
}  # fmt: skip


class Collectives(TorchDispatchMode):
    """Notes every collective under it: (kind, bytes of the whole tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the tensors inside come by next
        name = func.overloadpacket.__name__
        if "c10d" in func.namespace and name not in ("_wrap_tensor_autograd", "wait_tensor"):
            leaves = tree_leaves(args)
            size = max(t.nbytes for t in leaves if isinstance(t, Tensor))
            # of the all-reduces only those of gradients are larger than a few numbers
            small = OPS[name] == forms.REDUCES and size < 4096
            self.seen.append((forms.CONTROL if small else OPS[name], size))
        return func(*args, **(kwargs or {}))


def tree() -> Recipe:
    """One update of a small BranchGRPO tree."""
    return recipes.build("branch_grpo", schedule.shifted_linear(4), splits=(0, 1), clip=0.1)


def chains() -> Recipe:
    """Two updates of chains."""
    return recipes.build("dance_grpo", schedule.shifted_linear(4), group=3, clip=0.1, updates=2)


RECIPES = {"tree": tree, "chains": chains}
CASES = (("tree", 1), ("tree", 2), ("chains", 1), ("chains", 2))
FEW = (CASES[0], CASES[3])
"""Recipes and rounds; those of the tests."""


def _reward(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    del prompts
    return {"ink": images.flatten(1).mean(1)}


def one(ranks: Ranks, way: str, recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Returns the collectives of this process's second iteration, and its model calls."""
    model = load_digits_model()
    config = TrainerConfig(
        iterations=2, prompts_per_iteration=PROMPTS_EACH * ranks.world_size, max_batch=BATCH,
        prompts_per_round=PROMPTS_EACH // rounds, checkpoint_every=99,
    )  # fmt: skip
    made = [0, 0]

    def note(*_: Any) -> None:
        made[torch.is_grad_enabled()] += 1

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model, PROMPTS[:31], _reward, recipe, config, Path(out) / "run", ranks=ranks,
            parallel=ParallelConfig(**WAYS[way]),
        )  # fmt: skip
        trainer.step()
        model.module.register_forward_pre_hook(note)
        with Collectives() as collectives:
            trainer.step()
    return {"calls": made[0], "passes": made[1], "seen": collectives.seen}


def _count_here(to: Path, cases: Sequence[tuple[str, int]]) -> None:
    """Counts everything on the processes that torchrun started."""
    # so that digits has several
    parallel._BUCKET = BUCKET  # pyright: ignore[reportPrivateUsage, reportConstantRedefinition]
    rows: list[dict[str, Any]] = []
    with joined("cpu") as ranks:
        for way in ways(ranks.world_size):
            for name, rounds in cases:
                found = one(ranks, way, RECIPES[name](), rounds)
                if not ranks.alone:
                    others = ranks.gather(found["seen"])
                    assert all(o == found["seen"] for o in others), (way, name, rounds)
                rows.append({"way": way, "recipe": name, "rounds": rounds, **found})
        if ranks.main:
            to.write_text(json.dumps(rows))


def ways(world_size: int) -> list[str]:
    """Returns the ways to spread weights that a number of processes can show."""
    if world_size == 1:
        return ["replicate"]
    return [way for way in WAYS if way != "hybrid" or world_size > 2]


def counted(world_size: int, *, few: bool = False) -> list[dict[str, Any]]:
    """Runs the cases under torchrun and returns what one process saw; all saw the same."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(world_size), __file__, "--count-to", str(to),
            *(["--few"] if few else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"scaling: processes must end well, got\n{done.stderr[-4000:]}")
        rows = cast("list[dict[str, Any]]", json.loads(to.read_text()))
    return [{"processes": world_size, **r} for r in rows]


def check(found: dict[str, Any]) -> dict[str, Any]:
    """Holds what one process saw to the closed forms; returns the counts of the case.

    Raises:
        AssertionError: a count or a number of bytes differs.
    """
    n, way, rounds = found["processes"], found["way"], found["rounds"]
    recipe = RECIPES[found["recipe"]]()
    updates, module = recipe.updates, load_digits_model().module
    parts, seen = forms.parts_of(module), cast("list[tuple[str, int]]", found["seen"])
    copy = 2 if way == "hybrid" else n
    groups = {forms.GATHERS: copy, forms.SCATTERS: copy}
    groups[forms.REDUCES] = n if way == "replicate" else n // copy
    sent = [(k, forms.ring_bytes(k, size, groups[k])) for k, size in seen if k != forms.CONTROL]
    got = forms.Sent(len(sent), sum(size for _, size in sent))
    made = forms.Calls(found["calls"], found["passes"]) if way == "reshard" else None
    if made and (found["recipe"], rounds) == ("tree", 1):
        assert made == calls_of(recipe, range(PROMPTS_EACH), BATCH), made
    sharded = way != "replicate"
    if n == 1:
        want, small = forms.Sent(0, 0.0), 0
    elif sharded:
        shards = 2 if way == "hybrid" else None
        want = forms.engine(parts, n, updates, shards=shards, made=made)
        small = forms.control(updates, rounds, sharded=True, reshard=way == "reshard")
    else:
        sizes = [p.nbytes for p in module.parameters() if p.requires_grad]
        want = forms.replicated(sizes, n, BUCKET, updates)
        small = forms.control(updates, rounds, sharded=False, reshard=False)
    assert got.number == want.number, (found["processes"], way, found["recipe"], got, want)
    assert math.isclose(got.bytes, want.bytes), (way, found["recipe"], got, want)
    control = sum(k == forms.CONTROL for k, _ in seen)
    assert control == small, (way, found["recipe"], rounds, control, small)
    kinds = {kind: sum(k == kind for k, _ in seen) for kind in dict.fromkeys(OPS.values())}
    return {
        **{name: found[name] for name in ("processes", "way", "recipe", "rounds")},
        **{name: found[name] for name in ("calls", "passes")}, **kinds, "bytes": got.bytes,
    }  # fmt: skip


def calls_of(recipe: Recipe, prompts: Sequence[int], max_batch: int) -> forms.Calls:
    """Forecasts the calls of a process with `reshard`, and without pruning, from its plan."""
    plan = recipe.plan(prompts, seed=0, iteration=0)
    passes = [
        -(-len(np.unique(plan.action[plan.trained(update)])) // max_batch) + 1
        for update in range(recipe.updates)
    ]
    return forms.Calls(num_calls(plan, max_batch=max_batch, keep_velocity=None), sum(passes))


def extrapolated() -> list[dict[str, Any]]:
    """Returns the lines of published models on many GPUs."""
    from branchcore.models import weights
    from branchcore.models.sizing import shapes

    small = shapes.flow_model(shapes.SHAPES["sd35m-512"])
    weights.add_lora(small, rank=32)
    sizes = [p.nbytes for p in small.module.parameters() if p.requires_grad]
    flux = forms.parts_of(shapes.build(shapes.SHAPES["flux-512"]))
    made = calls_of(recipes.build_preset("branch_grpo", "flux", updates=1), [0, 1], BATCH)
    whole = forms.control(1, 1, sharded=True, reshard=False)
    rows: list[dict[str, Any]] = []
    for n in GPUS:
        lora = forms.replicated(sizes, n, 64 * 2**20)
        few = forms.control(1, 1, sharded=False, reshard=False)
        rows.append(forms.row("SD3.5-M, LoRA 32", "branchcore, replicate", n, lora, few))
        many = forms.control(37, 1, sharded=True, reshard=False)
        every = forms.control(1, 1, sharded=True, reshard=True)
        for method, sent, control in (
            ("branchcore, shard", forms.engine(flux, n, 1), whole),
            ("shard, 37 updates", forms.engine(flux, n, 37), many),
            ("shard, mixed", forms.engine(flux, n, 1, mixed=True), whole),
            ("shard, mixed, shards 8", forms.engine(flux, n, 1, mixed=True, shards=8), whole),
            ("shard, mixed, reshard", forms.engine(flux, n, 1, mixed=True, made=made), every),
            *((f"released {o.name}", forms.released(o, flux, n), None) for o in forms.LOOPS),
        ):
            rows.append(forms.row("FLUX, all weights", method, n, sent, control))
    return rows


def result(worlds: Sequence[int]) -> dict[str, Any]:
    """Counts, checks and extrapolates."""
    rows = [check(found) for world in worlds for found in counted(world)]
    made = calls_of(recipes.build_preset("branch_grpo", "flux", updates=1), [0, 1], BATCH)
    return {
        "meta": machine.facts(), "counted": rows, "many": extrapolated(), "max_batch": BATCH,
        "reshard_calls": made._asdict(), "released": [loop._asdict() for loop in forms.LOOPS],
    }  # fmt: skip


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--count-to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--few", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count_to:
        _count_here(args.count_to, FEW if args.few else CASES)
        return
    found = result(args.worlds)
    for r in found["counted"]:
        print("  ".join(f"{name} {value}" for name, value in r.items()))
    for r in found["many"]:
        print(
            f"{r['model']:18} {r['method']:28} {r['gpus']:4} GPUs {r['gigabytes']:12.3f} GB sent, "
            f"{r['collectives']} collectives, {r['control']} small ones"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
