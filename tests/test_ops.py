"""The ops as torch sees them: opcheck, compile, error messages, choice of implementation."""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from branchcore import _dispatch, ops, testing

built = pytest.mark.skipif(_dispatch.ISA == "none", reason="needs the compiled module")


def spec_of(name: str) -> testing.OpSpec:
    return importlib.import_module(f"branchcore.ops.{name}").SPEC


def registered(name: str) -> Any:
    return getattr(torch.ops.branchcore, name).default


def arguments(name: str, grad: bool) -> tuple[Any, ...]:
    """Arguments of the registered op, from the first case of its spec."""
    spec = spec_of(name)
    i = spec.build(**spec.cases[0].options)
    for leaf in spec.differentiable if grad else ():
        i[leaf] = i[leaf].detach().requires_grad_()
    return {
        "philox_normal": lambda: (*i["noise"], i["num_elements"], i["dtype"]),
        "branch_step": lambda: (
            *(i[n] for n in ("x_ND", "v_ND", "h_ND", "rows_M4", "child_start")),
            *i["noise"],
        ),
        "edge_dots": lambda: (i["v_ND"], i["v_old_ND"], i["child_start"], *i["noise"]),
        "ratio_loss": lambda: (*list(i.values())[:-1], *i["clip"]),
        "sde_log_prob": lambda: tuple(i.values()),
    }[name]()


NAMES = ["philox_normal", "branch_step", "edge_dots", "ratio_loss", "sde_log_prob"]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, grad: bool) -> None:
    results = torch.library.opcheck(registered(name), arguments(name, grad))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_backwards() -> None:
    x, v, h, rows, child_start, *draw = arguments("branch_step", grad=False)
    rows, y = stochastic(rows), torch.randn(len(rows), x.shape[1])
    grad_p, grad_q = torch.randn(len(rows)), torch.randn(len(x))
    calls = {
        "branch_step_backward": (y, rows[:, 1], child_start, torch.bfloat16),
        "edge_dots_backward": (grad_p, grad_q, v, h, child_start, *draw, x.shape[1], v.dtype),
        "sde_log_prob_backward": (grad_p, x, v, y, rows, child_start, h),
    }
    for name, call in calls.items():
        assert set(torch.library.opcheck(registered(name), call).values()) == {"SUCCESS"}, name


def stochastic(rows: torch.Tensor) -> torch.Tensor:
    return rows.clone().index_fill_(1, torch.tensor(3), 0.3)


def everything(i: testing.Inputs, j: testing.Inputs) -> torch.Tensor:
    """One graph through every public op."""
    root = ops.philox_normal(i["noise"], i["v_ND"].shape[1])
    step = ops.branch_step(i["x_ND"], i["v_ND"], i["rows_M4"], i["child_start"], i["noise"])
    log_prob = ops.sde_log_prob(
        i["x_ND"], i["v_ND"], step.y_MD.detach() + root, j["rows"], i["child_start"]
    )
    dots = ops.edge_dots(i["v_ND"], i["h_ND"], i["child_start"], i["noise"])
    loss = ops.ratio_loss(dots.p_E, dots.q_N, i["child_start"], *j["edges"], (0.1, 0.1))
    return loss.loss + log_prob.sum() + step.y_MD.sum() + 0.0 * loss.stats.sum_abs_dev


def test_compile_fullgraph() -> None:
    i = spec_of("branch_step").build(num_elements=70)
    k = len(i["rows_M4"])
    edges = (torch.ones(k, 2).double(), torch.rand(k, 2), torch.ones(k))
    j = {"rows": stochastic(i["rows_M4"]), "edges": edges}
    grads = []
    for run in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        i["v_ND"] = i["v_ND"].detach().requires_grad_()
        loss = run(i, j)
        grads.append((loss.detach(), *torch.autograd.grad(loss, i["v_ND"])))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (
            "sde_log_prob",
            {"v_ND": torch.ones(2, 4)},
            ValueError,
            "sde_log_prob: v_ND must be (N, D) with N=4, D=2053, got (2, 4)",
        ),
        (
            "branch_step",
            {"x_ND": torch.ones(4, 2, 2)},
            ValueError,
            "branch_step: x_ND must be (N, D), got (4, 2, 2); try flatten(1)",
        ),
        (
            "branch_step",
            {"v_ND": torch.ones(4, 2053).double()},
            TypeError,
            "branch_step: v_ND must be float32 or bfloat16, got float64",
        ),
        (
            "branch_step",
            {"rows_M4": torch.ones(9, 4)},
            TypeError,
            "branch_step: rows_M4 must be float64, got float32",
        ),
        (
            "branch_step",
            {"v_ND": torch.ones(4, 2053, device="meta")},
            ValueError,
            "branch_step: v_ND must be on cpu like the first argument, got meta",
        ),
        (
            "edge_dots",
            {"noise": None},
            ValueError,
            "edge_dots: child_start and noise must be given together, got one of them",
        ),
        (
            "edge_dots",
            {"noise": testing.draws((3,))._replace(mix=torch.ones(3, 2))},
            TypeError,
            "edge_dots: noise.mix must be float64, got float32",
        ),
        (
            "edge_dots",
            {"v_old_ND": 3.0},
            TypeError,
            "edge_dots: v_old_ND must be a tensor, got float",
        ),
        (
            "ratio_loss",
            {"clip": (-1.0, 1.0)},
            ValueError,
            "ratio_loss: clip must be two distances >= 0, got (-1.0, 1.0)",
        ),
        (
            "ratio_loss",
            {"clip": (0.1,)},
            ValueError,
            "ratio_loss: clip must be two distances >= 0, got (0.1,)",
        ),
        (
            "group_norm_silu",
            {"eps": -1e-6},
            ValueError,
            "group_norm_silu: eps must be positive, got -1e-06",
        ),
        (
            "gate_norm_modulate",
            {"eps": 0.0},
            ValueError,
            "gate_norm_modulate: eps must be positive, got 0.0",
        ),
        (
            "philox_normal",
            {"noise": testing.draws((3,))._replace(key=7)},
            TypeError,
            "philox_normal: noise.key must be a tensor, got int",
        ),
        (
            "philox_normal",
            {"noise": torch.ones(3)},
            TypeError,
            "philox_normal: noise must be a branchcore.Noise, got Tensor",
        ),
        (
            "philox_normal",
            {"dtype": torch.float16},
            TypeError,
            "philox_normal: dtype must be float32 or bfloat16 or float64, got float16",
        ),
    ],
)
def test_messages(name: str, changes: testing.Inputs, error: type, message: str) -> None:
    spec = spec_of(name)
    with pytest.raises(error) as caught:
        spec.op(**{**spec.build(**spec.cases[0].options), **changes})
    assert str(caught.value) == message


@built
@pytest.mark.parametrize("starts", [[0, 5, 2, 8, 9], [0, 2, 2, 8, 10], [1, 2, 2, 8, 9]])
def test_kernels_refuse_children_outside_their_tensors(starts: list[int]) -> None:
    inputs = spec_of("branch_step").build() | {"child_start": torch.tensor(starts)}
    with _dispatch.use("cpp"), pytest.raises(ValueError, match="child_start must be rising from 0"):
        ops.branch_step(**inputs)


@built
def test_use_forces_and_restores() -> None:
    dtypes = torch.float32, torch.float64
    cpu = torch.device("cpu")
    with _dispatch.use("reference"):
        assert [_dispatch.choose("branch_step", cpu, dtype) for dtype in dtypes] == [
            "reference"
        ] * 2
        with _dispatch.use(None):
            assert [_dispatch.choose("branch_step", cpu, t) for t in dtypes] == ["cpp", "reference"]
        assert _dispatch.choose("branch_step", cpu, torch.float32) == "reference"
        assert "forced to reference" in _dispatch.explain()
    _dispatch.use("cpp")
    assert "float64 refused" in _dispatch.explain()
    with pytest.raises(NotImplementedError, match="'cpp' must run in float32 or bfloat16, got cpu"):
        ops.philox_normal(testing.draws((1,)), 4, torch.float64)
    _dispatch.use(None)
    assert (
        "philox_normal on cpu: float32 cpp, bfloat16 cpp, float64 reference" in _dispatch.explain()
    )


def test_use_names_what_there_is() -> None:
    with pytest.raises(
        ValueError, match="name must be None or one of cuda, triton, cpp, reference, got 'gpu'"
    ):
        _dispatch.use("gpu")


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_native", None)
    assert "cpp: not built" in _dispatch.explain()
    assert "branch_step on cpu: float32 reference" in _dispatch.explain()
    with pytest.raises(RuntimeError, match="needs the compiled module"):
        _dispatch.use("cpp")


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, somewhere else."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=os.path.expanduser("~"),
        capture_output=True,
        text=True,
        check=False,
    )


SHOW = "from branchcore._dispatch import explain; print(explain())"


def test_environment_forces_an_implementation() -> None:
    assert "choice: forced to reference" in fresh(SHOW, BRANCHCORE_IMPL="reference").stdout
    wrong = fresh(SHOW, BRANCHCORE_IMPL="tritn")
    assert (
        "use: name must be None or one of cuda, triton, cpp, reference, got 'tritn'" in wrong.stderr
    )


def test_import_needs_neither_triton_nor_diffusers() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["diffusers"] = None
import branchcore, branchcore.ops
from branchcore import testing
print(branchcore.ops.philox_normal(testing.draws((2,)), 5).shape)
"""
    assert "torch.Size([2, 5])" in fresh(code).stdout
