"""Triton kernels in the interpreter, which must be on before Triton is imported: in a new process.

`TRITON_INTERPRET=1 pytest tests/test_triton.py` runs the marked tests in this one.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from test_ops_conformance import SPECS

from branchcore import _dispatch, ops, reference, testing
from branchcore.reference.philox_normal import philox4x32

triton = pytest.importorskip("triton", reason="needs triton")

import triton.language as tl  # noqa: E402
from branchcore.kernels import noise, ratio_loss  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CORE = {"branch_step", "edge_dots", "philox_normal", "ratio_loss", "sde_log_prob"}
OPS = {spec.name: spec for spec in SPECS}
TESTS_PER_CASE = 2
LAST = 0xFFFFFFFF

interpreted = pytest.mark.skipif(
    not _dispatch.interpreted(), reason="needs TRITON_INTERPRET=1: test_in_the_interpreter"
)


def older(package: str, *release: int) -> bool:
    return tuple(map(int, version(package).split(".")[:2])) < release


def on_grid(start: int, stop: int, num: int) -> torch.Tensor:
    """(num,) words from start to stop, both included."""
    return torch.linspace(start, stop, num, dtype=torch.float64).round().long()


@pytest.mark.slow
@pytest.mark.skipif(_dispatch.interpreted(), reason="runs already in the interpreter")
@pytest.mark.skipif(
    older("triton", 3, 7) and not older("numpy", 2, 4),
    reason="Triton 3.6 cannot interpret a loop of run-time length with numpy 2.4",
)
def test_in_the_interpreter() -> None:
    files = ["tests/test_ops_conformance.py", "tests/test_triton.py"]
    # numpy gives the same twice
    chosen = "triton and not two_runs"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", chosen, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    with_triton = {name for name in OPS if "triton" in _dispatch._ops[name]}
    assert with_triton >= CORE
    # had nothing been selected, nothing would have failed
    least = TESTS_PER_CASE * sum(len(OPS[name].cases) for name in with_triton)
    passed = re.findall(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[0]) > least


@pytest.mark.skipif(_dispatch.interpreted(), reason="the interpreter passes any float as it is")
def test_ratio_bounds_are_passed_in_float64() -> None:
    params = {param.name: param for param in ratio_loss._ratio_loss_fwd_kernel.params}
    assert params["lower"].annotation_type == params["upper"].annotation_type == "fp64"


@pytest.mark.skipif(_dispatch.interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("op", sorted(CORE))
def test_a_kernel_does_not_see_alignment_or_batch(op: str) -> None:
    builds = _dispatch.triton_kernels(op).BUILDS
    params = [param for build in builds for param in build.kernel.params]
    assert len(params) > len(builds)
    seen = {param.name for param in params if not param.do_not_specialize}
    assert seen <= {"UNIT", "BLOCK"}, seen


@triton.jit
def _words_kernel(counter, words, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    w0 = tl.load(counter + at).to(tl.uint32)
    w1 = tl.load(counter + NUM + at).to(tl.uint32)
    w2 = tl.load(counter + 2 * NUM + at).to(tl.uint32)
    w3 = tl.load(counter + 3 * NUM + at).to(tl.uint32)
    key0 = tl.load(counter + 4 * NUM + at).to(tl.uint32)
    key1 = tl.load(counter + 5 * NUM + at).to(tl.uint32)
    w0, w1, w2, w3 = noise.philox4x32(w0, w1, w2, w3, key0, key1)
    tl.store(words + at, w0.to(tl.int64))
    tl.store(words + NUM + at, w1.to(tl.int64))
    tl.store(words + 2 * NUM + at, w2.to(tl.int64))
    tl.store(words + 3 * NUM + at, w3.to(tl.int64))


@interpreted
def test_philox_words_are_those_of_the_reference() -> None:
    num = 1024
    inputs = torch.randint(0, 2**32, (6, num), generator=torch.Generator().manual_seed(0))
    inputs[:, 0], inputs[:, 1] = 0, LAST
    found = torch.empty(4, num, dtype=torch.int64)
    _words_kernel[(1,)](inputs, found, NUM=num)
    w0, w1, w2, w3, key0, key1 = inputs
    assert torch.equal(found, torch.stack(philox4x32((w0, w1, w2, w3), (key0, key1))))


@triton.jit
def _parts_kernel(word, radius, cosine, sine, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    words = tl.load(word + at).to(tl.uint32)
    cos, sin = noise._cos_sin(words)
    tl.store(radius + at, noise._radius(words))
    tl.store(cosine + at, cos)
    tl.store(sine + at, sin)


@interpreted
def test_normals_are_exact_to_1e_6_over_all_words() -> None:
    num = 4096
    # both ends of either uniform, the whole range, and where the logarithm becomes a series
    words = torch.cat(
        [
            on_grid(0, 1023, num // 4),
            on_grid(LAST - 1023, LAST, num // 4),
            on_grid(0, LAST, num // 4),
            on_grid(int(0.98 * LAST), int(0.99 * LAST), num // 4),
        ]
    )
    found = torch.empty(3, num)
    _parts_kernel[(1,)](words, *found, NUM=num)
    k = (words >> 8).double()
    radius = (-2.0 * ((k + 1.0) / 2**24).log()).sqrt()
    angle = 2.0 * torch.pi * k / 2**24
    exact = torch.stack((radius, angle.cos(), angle.sin()))
    error = (found - exact).abs().amax(1)
    assert (error < 1e-6).all(), error


def loss_inputs(p: list[float], clip: tuple[float, float]) -> testing.Inputs:
    """One edge per node and column of the advantage, log-ratio p."""
    num = len(p)
    return {
        "p_E": torch.tensor(p),
        "q_N": torch.zeros(num),
        "child_start": torch.arange(num + 1),
        "exponent_E2": torch.tensor([[1.0, 0.5]], dtype=torch.float64).repeat(num, 1),
        "advantage_E2": torch.ones(num, 2),
        "weight_E": torch.ones(num),
        "clip": clip,
    }


@interpreted
def test_ratio_bounds_are_float64_and_pass_the_gradient_at_the_bound() -> None:
    # in fp32 both bounds would be 1, and cut these ratios
    inside = loss_inputs([5e-10, -5e-10], (1e-9, 1e-9))
    on_bound = loss_inputs([0.0, 0.0], (0.0, 0.0))
    for inputs in (inside, on_bound):
        inputs["advantage_E2"] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        with _dispatch.use("triton"):
            found = testing.evaluate(OPS["ratio_loss"], ops.ratio_loss, inputs)
        assert found["clipped_low"] == found["clipped_high"] == 0.0
        assert found["grad_p_E"].abs().min() > 0.0


@interpreted
def test_a_nan_ratio_is_kept_by_the_loss_and_the_maximum() -> None:
    inputs = loss_inputs([0.1, float("nan"), 0.2], (0.5, 0.5))
    with _dispatch.use("triton"):
        loss, stats = ops.ratio_loss(**inputs)
    exact = reference.ratio_loss(**inputs)
    assert loss.isnan()
    assert stats.max_abs_dev.isnan()
    assert stats.edges == exact.stats.edges == 3.0
