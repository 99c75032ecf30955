"""What `doctor` expects of a machine, what it names when that is missing, and that it runs ops."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from branchcore import _dispatch, _machine, doctor, testing
from branchcore._machine import Driver, Gpu
from branchcore.cli import main
from branchcore.doctor import Check, Duty

built = pytest.mark.skipif(_dispatch.ISA == "none", reason="needs the compiled module")
NONE = Driver("", 0, "")
T4 = Gpu("cuda:0", "Tesla T4", "75", 14.6, False)
BASE = [Duty("reference", "cpu"), Duty("cpp", "cpu")]
OPS = ("branch_step", "edge_dots", "philox_normal", "ratio_loss", "sde_log_prob")


@pytest.fixture
def on_cpu(monkeypatch):
    """This machine as if it had no GPU and nothing in its environment."""
    monkeypatch.setattr(_machine, "driver", lambda: NONE)
    monkeypatch.setattr(_dispatch, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(_dispatch, "interpreted", lambda: False)
    monkeypatch.delenv("BRANCHCORE_IMPL", raising=False)
    return _machine.examine()


@pytest.fixture
def on_gpu(on_cpu, monkeypatch):
    """A T4 that torch sees, without Triton; tensors "on" it stay on the CPU."""
    found = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15_655_829_504)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_dispatch, "devices", lambda: [torch.device("cpu"), gpu])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_machine, "driver", lambda: Driver("13.0", 1, ""))
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    monkeypatch.setattr(_dispatch, "_cuda", None)
    monkeypatch.setattr(testing, "to", lambda inputs, _: inputs)
    _dispatch.chip_obstacle.cache_clear()
    yield
    _dispatch.chip_obstacle.cache_clear()


def build_with_cuda(monkeypatch, obstacle="", chips="80, 90", runtime=13000):
    """Fakes the compiled CUDA kernels."""
    module = SimpleNamespace(
        chips=lambda: chips, runtime_version=lambda: runtime, obstacle=lambda _: obstacle
    )
    monkeypatch.setattr(_dispatch, "_cuda", module)


def run(*words, **environment):
    """Runs code or the command line in a new process somewhere else."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=os.path.expanduser("~"),
        capture_output=True,
        text=True,
        check=False,
    )


@built
def test_a_healthy_cpu_machine_without_anything_optional():
    """No Triton, no diffusers, no GPU, no compiler on the path: all ops right, exit code 0."""
    code = """
import sys
sys.modules["triton"] = sys.modules["diffusers"] = None
from branchcore.cli import main
main(["doctor", "--json"])
"""
    done = run("-c", code, CUDA_VISIBLE_DEVICES="", BRANCHCORE_IMPL="", PATH="")
    report = json.loads(done.stdout)
    assert (done.returncode, report["healthy"], report["to_fix"]) == (0, True, []), report
    machine = report["machine"]
    assert machine["triton"] == ""
    assert machine["torch"] == torch.__version__
    assert machine["isa"] == _dispatch.ISA
    runs = {(each["op"], each["implementation"]) for each in report["checks"]}
    assert runs >= {(op, name) for op in OPS for name in ("reference", "cpp")}
    assert all(each["passed"] and each["device"] == "cpu" for each in report["checks"])
    choices = {each["op"]: each for each in report["choices"]}
    assert choices.keys() == _dispatch.registered().keys()
    assert choices["branch_step"]["float32"] == "cpp"
    assert set(choices["branch_step"]["passed_over"]) == {"cuda", "triton"}


@built
@pytest.mark.usefixtures("on_cpu")
def test_it_prints_every_op_and_that_nothing_is_to_fix(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    for op in OPS:
        assert [op, "cpp", "cpu", "ok"] in [line[:4] for line in lines], text
        assert [op, "cpu", "cpp", "cpp", "reference"] in [line[:5] for line in lines], text
    assert text.endswith("to fix\n  nothing\n")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        ((), "try pip install -e . in the checkout, which needs a C++17 compiler, or a wheel"),
        (
            ("_C.cpython-39-x86_64-linux-gnu.so",),
            f"_C.cpython-39-x86_64-linux-gnu.so is not for Python {sys.version.split()[0]}; "
            "reinstall with this Python: pip install --force-reinstall --no-deps branchcore",
        ),
    ],
)
def test_a_missing_compiled_module(files, remedy, monkeypatch, capsys):
    monkeypatch.setattr(_dispatch, "_native", None)
    monkeypatch.setattr(_machine, "_compiled_files", lambda: files)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    text = capsys.readouterr().out
    last = text.rpartition("to fix\n")[2]
    assert last == f"  cpp on cpu needs the compiled module branchcore._C; {remedy}\n"
    assert "compiled kernels missing" in text


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, []),
        ({"triton": "3.9.0", "static_cuda": "13.0"}, []),
        ({"gpus": (T4,)}, [Duty("reference", "cuda:0"), Duty("triton", "cuda:0")]),
        (
            {"gpus": (T4,), "static_cuda": "13.0", "triton": ""},
            [Duty("reference", "cuda:0"), Duty("cuda", "cuda:0")],
        ),
        (
            {"gpus": (T4,), "static_cuda": "13.0", "triton": "3.9.0"},
            [Duty("reference", "cuda:0"), Duty("cuda", "cuda:0"), Duty("triton", "cuda:0")],
        ),
        (
            {"gpus": (T4._replace(chip="gfx942"),), "static_cuda": "13.0", "torch_hip": "6.4"},
            [Duty("reference", "cuda:0"), Duty("triton", "cuda:0")],
        ),
        (
            {"driver": Driver("13.0", 2, ""), "static_cuda": "13.0"},
            [Duty("reference", "cuda:0"), Duty("reference", "cuda:1")],
        ),
    ],
    ids=["cpu", "cpu-cuda-build", "gpu-cpu-build", "gpu", "gpu-triton", "amd", "unseen"],
)
def test_what_a_machine_should_offer(changes, more, on_cpu):
    machine = on_cpu._replace(**{"triton": "", "static_cuda": "", **changes})
    assert doctor.should_offer(machine) == BASE + more


@built
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("cuda", "driver", "line"),
    [
        (
            None,
            Driver("13.0", 1, ""),
            "triton on cuda:0 needs the package triton, 3.6 or newer; "
            "try pip install 'branchcore[triton]', "
            "or BRANCHCORE_CUDA=ON pip install .",
        ),
        (
            "is built for chips sm_80, 90, not for this one; build with BRANCHCORE_CUDA_ARCHS",
            Driver("13.0", 1, ""),
            "cuda on cuda:0 is built for chips sm_80, 90, not for this one; "
            "try BRANCHCORE_CUDA=ON BRANCHCORE_CUDA_ARCHS=75 pip install .",
        ),
        (
            "needs a driver for CUDA 13.0, this one is for CUDA 12.4; update the driver",
            Driver("12.4", 1, ""),
            "cuda on cuda:0 needs a driver for CUDA 13.0, this one is for CUDA 12.4; "
            "update the driver",
        ),
    ],
    ids=["cpu-build", "chip", "driver"],
)
def test_a_gpu_without_fast_kernels(cuda, driver, line, monkeypatch, capsys):
    monkeypatch.setattr(_machine, "driver", lambda: driver)
    if cuda is not None:
        build_with_cuda(monkeypatch, cuda)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    text = capsys.readouterr().out
    assert stop.value.code == 1
    assert text.rpartition("to fix\n")[2] == f"  {line}\n"
    assert "Tesla T4, sm_75, 14.6 GiB" in text
    assert ("not compiled for" in text) == (cuda is not None)
    assert all(check.passed for check in doctor.run_checks())


@built
@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_with_its_chip_compiled_meets_its_duties(monkeypatch):
    build_with_cuda(monkeypatch, chips="75a, 90")
    machine = _machine.examine()
    assert machine.gpus == (T4._replace(compiled=True),)
    assert doctor.to_fix(machine, []) == []
    choice = next(each for each in doctor.choices() if each[:2] == ("philox_normal", "cuda:0"))
    assert choice[2:] == ("cuda", "cuda", "reference", {})


@built
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"torch": "2.13.0+cpu", "torch_cuda": "", "driver": Driver("12.4", 1, "")},
            "reference on cuda:0 is hidden: torch 2.13.0+cpu is built without CUDA; install a "
            "build with CUDA 12.4 or older, see https://pytorch.org/get-started",
        ),
        (
            {"torch": "2.13.0", "torch_cuda": "13.0", "driver": Driver("12.4", 1, "")},
            "reference on cuda:0 is hidden: torch 2.13.0 is for CUDA 13.0, the driver for CUDA "
            "12.4; update the driver or install a torch for an older CUDA",
        ),
        (
            {"torch_cuda": "13.0", "driver": Driver("13.0", 1, "")},
            'reference on cuda:0 is hidden: see what python -c "import torch; torch.cuda.init()" '
            "says",
        ),
        (
            {"driver": Driver("", 0, "nvidia-smi is here but libcuda.so.1 is not")},
            "NVIDIA driver: nvidia-smi is here but libcuda.so.1 is not; reinstall the driver or "
            "reboot; in a container, start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        ),
        (
            {"forced": "reference"},
            "BRANCHCORE_IMPL=reference forces one implementation for every op; unset it",
        ),
    ],
    ids=["torch-without-cuda", "old-driver", "unknown", "half-a-driver", "forced"],
)
def test_other_things_to_fix(changes, line, on_cpu):
    assert doctor.to_fix(on_cpu._replace(**changes), []) == [line]


@built
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("function", "kernel", "found", "remedy"),
    [
        ("philox_normal", lambda *_: None, "out_MD: error nan, at most", "please report it"),
        (
            "sde_log_prob_backward",
            lambda *_: None,
            "grad_v_ND: error nan, at most",
            "please report it with all of this; until then, BRANCHCORE_IMPL=reference avoids it",
        ),
        ("philox_normal", "boom", "RuntimeError: boom", "please report it"),
        ("philox_normal", None, "AttributeError: ", "is older than the package: build it"),
    ],
    ids=["writes-nothing", "one-result-wrong", "raises", "absent"],
)
def test_a_kernel_that_fails_is_named(function, kernel, found, remedy, monkeypatch, capsys):
    def raises(*_):
        raise RuntimeError("boom\nand more")

    kernels = dict(vars(_dispatch.native()))
    kernels[function] = raises if kernel == "boom" else kernel
    if kernel is None:
        del kernels[function]
    monkeypatch.setattr(_dispatch, "_native", SimpleNamespace(**kernels))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    op = function.removesuffix("_backward")
    failed = [each for each in report["checks"] if not each["passed"]]
    assert [(each["op"], each["implementation"]) for each in failed] == [(op, "cpp")]
    assert failed[0]["found"].startswith(found)
    assert "\n" not in failed[0]["found"]
    (line,) = report["to_fix"]
    assert line.startswith(f"cpp on cpu fails in {op} ({found}")
    assert remedy in line
    assert report["healthy"] is False


def test_one_cause_is_one_line():
    """What breaks an implementation on a device breaks all its ops: one line names them."""
    checks = [Check(op, "triton", "cuda:0", False, "OSError: no cc") for op in ("a", "b")]
    checks.append(Check("a", "reference", "cuda:1", False, "x: error 1, at most 0"))
    first, second = doctor._failures(checks)
    assert first.startswith("triton on cuda:0 fails in a, b (OSError: no cc); please report it")
    assert "BRANCHCORE_IMPL" not in second
