"""The CUDA kernels on the host, their integers, and what dispatch says of a GPU it cannot use."""

import importlib
import subprocess
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from branchcore.kernels.launch import launch_grid
from cuda_on_host.build import FLAGS, INCLUDES, compiler
from implementations import ALL, NATIVE, cpu_runs, cuda_on_host
from torch import Tensor

from branchcore import _dispatch, ops, testing
from branchcore.noise import Noise
from branchcore.reference.philox_normal import philox4x32

GPU, CPU, F32 = torch.device("cuda", 0), torch.device("cpu"), torch.float32
ON_HOST = next(each for each in ALL if each.emulated)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def names(num_draws: int) -> Noise:
    """Draws whose words use all 32 bits of every counter and key."""
    generator = torch.Generator().manual_seed(3)
    counter = torch.randint(-(2**31), 2**31 - 1, (num_draws, 3), generator=generator).int()
    return Noise(torch.tensor([2**32 - 2, 2**31 + 5, 2**32 - 1]), counter, torch.ones(1).double())


def reference_words(noise: Noise, num_elements: int) -> Tensor:
    blocks, (seed, iteration, purpose) = torch.arange(num_elements // 4)[None], noise.key
    own, _, uid = (column.long()[:, None] for column in noise.counter.unbind(1))
    words = philox4x32((blocks, purpose, own, uid), (seed, iteration))
    unsigned = torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).int()


@pytest.mark.parametrize("isa", NATIVE)
def test_integers_of_every_instruction_set(isa: str) -> None:
    if not cpu_runs(isa):
        pytest.skip(f"this machine has {_dispatch.ISA}")
    noise, out = names(5), torch.zeros(5, 4100, dtype=torch.int32)
    getattr(importlib.import_module("branchcore._C"), isa).philox_words(*noise[:2], out)
    assert torch.equal(out, reference_words(noise, 4100))


@needs_compiler
def test_integers_of_cuda_on_the_host() -> None:
    noise, out = names(3), torch.zeros(3, 1028, dtype=torch.int32)
    cuda_on_host().philox_words(*noise[:2], out, 0, 0)
    assert torch.equal(out, reference_words(noise, 1028))


@needs_compiler
def test_launches_write_nothing_else() -> None:
    """Rows of odd length inside a larger tensor: its other elements keep their bits."""
    inputs = testing.draws((2, 3))
    for num_elements in (1, 7, 129, 515):
        frame = torch.full((7, num_elements + 9), 3.0)
        cuda_on_host().philox_normal(*inputs, frame[1:6, 4:-5], 0, 0)
        inside = torch.zeros_like(frame, dtype=torch.bool)
        inside[1:6, 4:-5] = True
        assert (frame[~inside] == 3.0).all()
        assert not (frame[inside][: 2 * num_elements] == 3.0).any()


BROKEN = """
#include "cuda/launch.h"
#include <cstdio>
struct None {};
void half(None) { if (threadIdx.x % 2) branchcore::cuda::__shfl_xor_sync(~0u, 1.0f, 1); }
int main() {
  try { branchcore::cuda::launch("half", half, 4, None{}, 0, 0); }
  catch (const std::exception& error) { std::puts(error.what()); }
}
"""


@needs_compiler
def test_the_host_notices_a_shuffle_that_lanes_leave_out(tmp_path) -> None:
    source, program = tmp_path / "half.cpp", tmp_path / "half"
    source.write_text(BROKEN)
    includes = [f"-I{path}" for path in INCLUDES]
    subprocess.run([compiler(), *FLAGS, *includes, source, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert said == "half: threads wait at a barrier that others skip\n"


def test_a_failed_launch_names_the_kernel() -> None:
    compiled = _dispatch._cuda
    if compiled is None or torch.cuda.is_available():
        pytest.skip("needs a build with CUDA and no GPU")
    assert compiled.runtime_version() >= 12000
    assert compiled.obstacle(0)
    with pytest.raises(RuntimeError, match=r'philox_normal: CUDA failed, got ".+"; try'):
        compiled.philox_normal(*testing.draws((1,)), torch.zeros(1, 4), 0, 0)


class BrokenKernel:
    """Stands for a Triton kernel whose launch fails."""

    fn = SimpleNamespace(__name__="_broken_fwd_kernel")

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*_, **__):
            self.grids.append(grid)
            raise RuntimeError("Triton Error [CUDA]: out of resources")

        return run


def test_a_triton_launch_is_on_its_device_and_named() -> None:
    kernel, x = BrokenKernel(), torch.zeros(3)
    with (
        mock.patch.object(torch.cuda, "device_of") as device_of,
        pytest.raises(RuntimeError, match="_broken_fwd_kernel: launch failed, got 'Triton Error"),
    ):
        launch_grid(kernel, 5, x)
    device_of.assert_called_once_with(x)
    with pytest.raises(ValueError, match="_broken_fwd_kernel: programs must be at most 2"):
        launch_grid(kernel, 2**31, x)
    launch_grid(kernel, 0, x)
    launch_grid(kernel, (4, 0), x)
    assert kernel.grids == [(5,)]


def test_a_cuda_launch_past_int32_says_so() -> None:
    compiled = _dispatch._cuda
    if compiled is None:
        pytest.skip("needs a build with CUDA")
    out = torch.zeros(1, 512).expand(2**31, 512)
    with pytest.raises(ValueError, match="philox_normal: tiles of all rows must be at most 2"):
        compiled.philox_normal(*testing.draws((1,)), out, 0, 0)


def fake(obstacle: str) -> SimpleNamespace:
    return SimpleNamespace(obstacle=lambda _: obstacle, chips=lambda: "80, 90")


@pytest.fixture
def _asked_anew():
    for asked in (_dispatch.chip_obstacle, _dispatch.old_chip):
        asked.cache_clear()
    yield
    for asked in (_dispatch.chip_obstacle, _dispatch.old_chip):
        asked.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("cuda", "triton", "chosen"),
    [
        (fake(""), True, "cuda"),
        (fake("is built for chips sm_80, 90, not for this one"), True, "triton"),
        (None, True, "triton"),
        (None, False, "reference"),
        (None, None, "reference"),
    ],
    ids=["cuda", "chip not built for", "CPU-only build", "no Triton either", "sm_75"],
)
def test_a_gpu_tensor_runs_on_what_there_is(cuda, triton: bool | None, chosen: str) -> None:
    """`triton` None: it is there, but the chip is too old for its bfloat16."""
    chip = (7, 5) if triton is None else (9, 0)
    with (
        mock.patch.multiple(_dispatch, _cuda=cuda, has_triton=lambda: triton is not False),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=chip),
    ):
        assert _dispatch.choose("branch_step", GPU, F32) == chosen
        assert _dispatch.choose("branch_step", CPU, F32) == "cpp"


@pytest.mark.usefixtures("_asked_anew")
def test_a_forced_implementation_says_why_it_cannot_run() -> None:
    why = "is built for chips sm_80, 90, not for this one; build with BRANCHCORE_CUDA_ARCHS"
    with (
        mock.patch.object(_dispatch, "_cuda", fake(why)),
        _dispatch.use("cuda"),
        pytest.raises(NotImplementedError, match="branch_step: implementation 'cuda' is built for"),
    ):
        _dispatch.choose("branch_step", GPU, F32)
    with (
        mock.patch.object(_dispatch, "_cuda", fake("")),
        _dispatch.use("cuda"),
        pytest.raises(NotImplementedError, match="'cuda' must run on an NVIDIA GPU, got cpu"),
    ):
        ops.philox_normal(testing.draws((1,)), 4)


def test_what_is_not_there_is_named() -> None:
    with (
        mock.patch.object(_dispatch, "_cuda", None),
        pytest.raises(RuntimeError, match="'cuda' needs a build with CUDA, got one without; try"),
    ):
        _dispatch.use("cuda")
    with (
        mock.patch.object(_dispatch, "has_triton", return_value=False),
        pytest.raises(RuntimeError, match="needs the package triton, 3"),
    ):
        _dispatch.use("triton")
    if not _dispatch.interpreted():
        with (
            mock.patch.object(_dispatch, "has_triton", return_value=True),
            _dispatch.use("triton"),
            pytest.raises(NotImplementedError, match="must run on a GPU"),
        ):
            ops.philox_normal(testing.draws((1,)), 4)


def test_a_nan_is_seen_in_the_statistics() -> None:
    edges = torch.full((3, 2), 1.0)
    inputs = (torch.tensor([0.1, torch.nan, 0.2]), torch.zeros(1), torch.tensor([0, 3]))
    rest = (edges.double(), edges, torch.ones(3), (0.1, 0.1))
    for each in ALL:
        if not each.missing():
            with each.forced() as device:
                moved = (value.to(device) for value in inputs)
                loss = ops.ratio_loss(*moved, *(v.to(device) for v in rest[:3]), rest[3])
            assert loss.stats.max_abs_dev.isnan(), each.name
