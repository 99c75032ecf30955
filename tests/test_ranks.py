"""The same run on 1, 2 and 4 processes: noise, trees, gradients, metrics; and no deadlock."""

import os
import shutil
import subprocess
import sys

import numpy as np
import processes
import pytest
import ranked_plans
import ranked_runs
from ranked_runs import RUNS, relative

from branchcore.distributed import Ranks
from branchcore.metrics import repeatable

pytestmark = pytest.mark.ranks

LAYOUTS = {
    "replicas": (2, {"kind": "replicate"}),
    "4 replicas": (4, {"kind": "replicate"}),
    "shards": (2, {"kind": "shard"}),
    "4 shards": (4, {"kind": "shard"}),
    "hybrid": (4, {"kind": "shard", "shards": 2}),
    "resharded": (3, {"kind": "shard", "reshard": True}),
}
VARYING = ("model_calls", "tokens", "tflop")
UNSHARED = {"noise_floor", "clip_noise_share", "tflop_saved", "tflop"}


@pytest.fixture(scope="module")
def alone():
    return {kind: ranked_runs.run(kind) for kind in RUNS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_metrics_do_not_depend_on_the_processes(layout, alone):
    world, options = LAYOUTS[layout]
    # without a tape a trained parent has a forward more, and more of the work can be saved
    varying = {*VARYING, "work_saved"} if options.get("reshard") else {*VARYING}
    for found in processes.values(world, ranked_runs.ranked, list(RUNS), options):
        for kind, (gradients, rows) in found.items():
            wanted, logged = alone[kind]
            assert len(gradients) == len(wanted) > 0
            for a, b in zip(gradients, wanted, strict=True):
                assert relative(a, b) <= 1e-10, (kind, relative(a, b))
            for row, other in zip(map(repeatable, rows), map(repeatable, logged), strict=True):
                assert {*row} ^ {*other} <= UNSHARED, kind
                for name in {*row} & {*other} - varying:
                    np.testing.assert_allclose(
                        row[name], other[name], rtol=1e-7, atol=1e-9, err_msg=f"{kind}: {name}"
                    )


@pytest.mark.parametrize("kind", ["replicate", "shard"])
def test_a_run_of_2_processes_goes_on_with_1_and_with_3(kind, tmp_path):
    whole = ranked_plans.part(Ranks(), tmp_path / "whole", 4, {}, False)
    out, options = tmp_path / "cut", {"kind": kind}
    for found in processes.values(2, ranked_plans.part, out, 2, options, False):
        ranked_plans.assert_same(found, tuple(part[:2] for part in whole))
    shutil.copytree(out, tmp_path / "alone")
    rest = tuple(part[2:] for part in whole)
    ranked_plans.assert_same(ranked_plans.part(Ranks(), tmp_path / "alone", 4, {}, True), rest)
    for found in processes.values(3, ranked_plans.part, out, 4, options, True):
        ranked_plans.assert_same(found, rest)


def test_random_runs_neither_wait_for_each_other_nor_differ():
    seeds, options = range(200), {"kind": "shard", "reshard": True}
    wanted = ranked_plans.random_runs(Ranks(), seeds, {})
    found = processes.values(3, ranked_plans.random_runs, seeds, options, timeout_s=120.0)
    for rank in found:
        for seed, got, alone in zip(seeds, rank, wanted, strict=True):
            try:
                ranked_plans.assert_same(got, alone)
            except AssertionError as error:
                raise AssertionError(f"{seed}: {ranked_plans.drawn(seed)}") from error


def test_a_run_with_sharded_weights_draws_the_samples_of_one_process(tmp_path):
    few = ["--iterations", "1", "--set", "prompts_per_iteration=2", "--view", "none"]
    command = ["-m", "branchcore", "train", "--recipe", "branch_mix", *few]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sharded = [*torchrun, *command, "--parallel", "shard"]
    for words in ([*command, "--out", tmp_path / "one"], [*sharded, "--out", tmp_path / "two"]):
        subprocess.run(
            [sys.executable, *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=600,
        )
    one, two = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / out / "samples").iterdir())}
        for out in ("one", "two")
    )
    assert set(one) == {"000000.png", "000001.png", "grid.json"}
    assert two.keys() == one.keys()
    assert two["000000.png"] == one["000000.png"]
    assert (tmp_path / "two" / "samples.png").stat().st_size > 1000
