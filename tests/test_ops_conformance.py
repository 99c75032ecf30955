"""Every op x implementation x case against float64, and the bits that must not change."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from branchcore import _dispatch, ops, testing
from branchcore.testing import Case, Inputs, OpSpec

SPECS: list[OpSpec] = [
    importlib.import_module(f"branchcore.ops.{module.name}").SPEC
    for module in pkgutil.iter_modules(ops.__path__)
]
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.reason}")
    for spec in SPECS
    for case in spec.cases
]
NATIVE = ["generic", "avx2", "avx512"]


def cpu_runs(isa: str) -> bool:
    """Whether this CPU has the instruction set; a newer CPU runs the older ones."""
    return _dispatch.ISA in NATIVE and NATIVE.index(isa) <= NATIVE.index(_dispatch.ISA)


@pytest.fixture(params=["reference", *NATIVE])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Force the reference, or the C++ kernels of one instruction set."""
    if request.param == "reference":
        with _dispatch.use("reference"):
            yield "reference"
        return
    if not cpu_runs(request.param):
        pytest.skip(f"needs compiled {request.param} kernels, this machine has {_dispatch.ISA}")
    monkeypatch.setattr(_dispatch, "_native", getattr(native_module(), request.param))
    with _dispatch.use("cpp"):
        yield request.param


def native_module() -> ModuleType:
    return importlib.import_module("branchcore._C")


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_matches_float64(spec: OpSpec, case: Case, implementation: str) -> None:
    outcomes = testing.check(spec, spec.build(**case.options))
    assert all(outcome.passed for outcome in outcomes), outcomes


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_explicit_backward_is_autograd_of_the_reference(spec: OpSpec, case: Case) -> None:
    inputs = testing.widen(spec.build(**case.options))
    # two orders of the same float64 sums: there is no eager error to compare with
    spec = dataclasses.replace(spec, factor=8.0)
    with _dispatch.use("reference"):
        outcomes = testing.check(spec, inputs)
    assert all(outcome.passed for outcome in outcomes), outcomes


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_two_runs_are_bitwise_equal(spec: OpSpec, case: Case, implementation: str) -> None:
    inputs = spec.build(**case.options)
    first = testing.evaluate(spec, spec.op, inputs)
    assert same_bits(first, testing.evaluate(spec, spec.op, inputs))


def rows_of(name: str, value: Tensor, row: int, inputs: Inputs) -> Tensor | None:
    """The part of a result that belongs to one parent; None for sums over parents."""
    axis = name.rpartition("_")[2][:1]
    if axis == "N":
        return value[row : row + 1]
    if axis not in "ME":
        return None
    starts = inputs.get("child_start")
    first, last = (row, row + 1) if starts is None else starts[row : row + 2].tolist()
    return value[first:last]


# not the reference: torch's own reductions may change with the batch shape
@pytest.mark.parametrize("implementation", NATIVE, indirect=True)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_a_row_does_not_see_its_batch(spec: OpSpec, case: Case, implementation: str) -> None:
    inputs = spec.build(**case.options)
    batch = forward(spec, inputs)
    num_rows = next(len(value) for name, value in inputs.items() if is_row(name, value))
    for row in range(num_rows):
        alone = forward(spec, testing.one_row(inputs, row))
        for name, value in alone.items():
            expected = rows_of(name, batch[name], row, inputs)
            assert expected is None or torch.equal(value, expected), (name, row)


def is_row(name: str, value: object) -> bool:
    return name == "noise" or (isinstance(value, Tensor) and name.rpartition("_")[2][0] == "N")


def forward(spec: OpSpec, inputs: Inputs) -> dict[str, Tensor]:
    """Results and gradients, for a cotangent of ones that does not see the batch either."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in spec.differentiable}
    result = spec.op(**{**inputs, **leaves})
    results = dict(testing._named(result, spec.results))
    graded = [value.sum() for value in results.values() if value.requires_grad]
    if graded:
        grads = torch.autograd.grad(graded, list(leaves.values()))
        results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_threads_do_not_change_bits(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"counts": (4,) * 8, "num_elements": 9001}
    if spec.name == "philox_normal":
        large = {"num_draws": 16, "num_elements": 9001, "dtype": torch.float32}
    if spec.name == "ratio_loss":
        large = {"counts": (4,) * 1000}
    inputs = spec.build(**large)
    before = torch.get_num_threads()
    runs = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        runs.append(testing.evaluate(spec, spec.op, inputs))
    torch.set_num_threads(before)
    assert same_bits(runs[0], runs[1])
    assert same_bits(runs[0], runs[2])
