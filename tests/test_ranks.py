"""The same run on 1, 2 and 4 processes: noise, trees, gradients, metrics; and no deadlock."""

import numpy as np
import processes
import pytest
import ranked_runs
from ranked_runs import RUNS, relative

from branchcore.metrics import repeatable

LAYOUTS = {
    "replicas": (2, {"kind": "replicate"}),
    "4 replicas": (4, {"kind": "replicate"}),
    "shards": (2, {"kind": "shard"}),
    "4 shards": (4, {"kind": "shard"}),
    "hybrid": (4, {"kind": "shard", "shards": 2}),
    "resharded": (3, {"kind": "shard", "reshard": True}),
}
VARYING = ("model_calls", "tokens", "tflop")
UNSHARED = {"noise_floor", "tflop_saved", "tflop"}


@pytest.fixture(scope="module")
def alone():
    return {kind: ranked_runs.run(kind) for kind in RUNS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_metrics_do_not_depend_on_the_processes(layout, alone):
    world, options = LAYOUTS[layout]
    for found in processes.values(world, ranked_runs.ranked, list(RUNS), options):
        for kind, (gradients, rows) in found.items():
            wanted, logged = alone[kind]
            assert len(gradients) == len(wanted) > 0
            for a, b in zip(gradients, wanted, strict=True):
                assert relative(a, b) <= 1e-10, (kind, relative(a, b))
            for row, other in zip(map(repeatable, rows), map(repeatable, logged), strict=True):
                assert {*row} ^ {*other} <= UNSHARED, kind
                for name in {*row} & {*other} - {*VARYING}:
                    np.testing.assert_allclose(
                        row[name], other[name], rtol=1e-7, atol=1e-9, err_msg=f"{kind}: {name}"
                    )
