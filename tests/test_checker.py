"""The conformance checker must fail what is wrong: a test that cannot fail is a defect."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from branchcore import _dispatch, testing
from branchcore.ops.branch_step import SPEC, branch_step
from branchcore.reference import BranchStep


def zeros(y: Tensor) -> Tensor:
    return y * 0.0


def shifted(y: Tensor) -> Tensor:
    return y.roll(1, dims=1)


def scaled(y: Tensor) -> Tensor:
    return y * 1.001


def with_nan(y: Tensor) -> Tensor:
    return torch.where(torch.arange(y.shape[1]) == 5, float("nan"), y)


def wrong_last(y: Tensor) -> Tensor:
    return y + 1e-3 * (torch.arange(y.numel()) == y.numel() - 1).view_as(y)


def transposed(y: Tensor) -> Tensor:
    return y.reshape(y.shape[1], y.shape[0])


def rounded(y: Tensor) -> Tensor:
    return y.bfloat16()


def unwritten(y: Tensor) -> Tensor:
    out = torch.empty_like(y)
    out[:, :-1] = y[:, :-1]
    return out


FAULTS = [zeros, shifted, scaled, with_nan, wrong_last, transposed, rounded, unwritten]


def failed(run: Callable[..., Any], **options: Any) -> list[str]:
    outcomes = testing.check(SPEC, SPEC.build(**options), run)
    return [outcome.name for outcome in outcomes if not outcome.passed]


def test_right_result_passes() -> None:
    assert failed(branch_step) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_wrong_result_fails(fault: Callable[[Tensor], Tensor]) -> None:
    def run(**inputs: Any) -> BranchStep:
        right = branch_step(**inputs)
        return right._replace(y_MD=fault(right.y_MD))

    assert any("y_MD" in name for name in failed(run))


@pytest.mark.parametrize("fault", [zeros, shifted, scaled, with_nan, wrong_last])
def test_wrong_gradient_fails(fault: Callable[[Tensor], Tensor]) -> None:
    def run(**inputs: Any) -> BranchStep:
        inputs["v_ND"].register_hook(fault)
        return branch_step(**inputs)

    assert failed(run) == ["grad_v_ND"]


def test_wrong_log_prob_fails() -> None:
    def run(**inputs: Any) -> BranchStep:
        right = branch_step(**inputs)
        return right._replace(log_prob_M=right.log_prob_M + 1e-5)

    assert failed(run) == ["log_prob_M"]


def test_noise_of_another_stream_fails() -> None:
    def run(**inputs: Any) -> BranchStep:
        noise = inputs["noise"]
        inputs["noise"] = noise._replace(counter=noise.counter + torch.tensor([0, 0, 1]).int())
        return branch_step(**inputs)

    with _dispatch.use("reference"):
        assert failed(run) == ["y_MD", "log_prob_M"]


def test_poison_fills_new_tensors() -> None:
    with testing.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3, dtype=torch.bfloat16).isnan().all()
