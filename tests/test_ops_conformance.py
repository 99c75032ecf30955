"""Every op x implementation x case against float64, and the bits that must not change."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from implementations import ALL, HERE, Implementation
from torch import Tensor

from branchcore import _dispatch, ops, testing
from branchcore.testing import Case, OpSpec

SPECS: list[OpSpec] = [
    importlib.import_module(f"branchcore.ops.{module.name}").SPEC
    for module in pkgutil.iter_modules(ops.__path__)
]
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.reason}")
    for spec in SPECS
    for case in spec.cases
]
MATRIX = [
    pytest.param(spec, case, each, id=f"{spec.name}-{each.name}-{case.reason}")
    for spec in SPECS
    for case in spec.cases
    for each in HERE
    if each.implementation in _dispatch._ops[spec.name]
]
# torch's own reductions may change with the batch shape
COMPILED = [param for param in MATRIX if param.values[2].implementation != "reference"]


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_what_runs_here(each: Implementation) -> None:
    if each.missing():
        pytest.skip(each.missing())
    assert any(param.values[2] == each for param in MATRIX)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("spec", "case", "each"), MATRIX)
def test_matches_float64(spec: OpSpec, case: Case, each: Implementation) -> None:
    with each.forced() as device:
        outcomes = testing.check(spec, testing.to(spec.build(**case.options), device))
    assert all(outcome.passed for outcome in outcomes), outcomes


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_explicit_backward_is_autograd_of_the_reference(spec: OpSpec, case: Case) -> None:
    inputs = testing.widen(spec.build(**case.options))
    # two orders of the same float64 sums: there is no eager error to compare with
    spec = dataclasses.replace(spec, factor=8.0)
    with _dispatch.use("reference"):
        outcomes = testing.check(spec, inputs)
    assert all(outcome.passed for outcome in outcomes), outcomes


@pytest.mark.parametrize(("spec", "case", "each"), MATRIX)
def test_two_runs_are_bitwise_equal(spec: OpSpec, case: Case, each: Implementation) -> None:
    with each.forced() as device:
        inputs = testing.to(spec.build(**case.options), device)
        first = testing.evaluate(spec, spec.op, inputs)
        assert same_bits(first, testing.evaluate(spec, spec.op, inputs))


@pytest.mark.parametrize(("spec", "case", "each"), COMPILED)
def test_a_row_does_not_see_its_batch(spec: OpSpec, case: Case, each: Implementation) -> None:
    with each.forced() as device:
        inputs = testing.to(spec.build(**case.options), device)
        for name, alone, together in testing.alone_and_together(spec, inputs):
            assert torch.equal(alone, together), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_threads_do_not_change_bits(spec: OpSpec) -> None:
    inputs = spec.build(**spec.large)
    before = torch.get_num_threads()
    runs = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        runs.append(testing.evaluate(spec, spec.op, inputs))
    torch.set_num_threads(before)
    assert same_bits(runs[0], runs[1])
    assert same_bits(runs[0], runs[2])
