"""What `doctor` learns of NVIDIA's driver, whatever torch was built for."""

import pytest

import branchcore
from branchcore import _machine
from branchcore._machine import Driver


class FakeDriver:
    """What `libcuda.so.1` answers, and its name of the error 803."""

    def __init__(self, error):
        self.error = error

    def cuDriverGetVersion(self, number):
        number._obj.value = 12080

    def cuInit(self, _):
        return self.error

    def cuGetErrorName(self, error, name):
        assert error == self.error
        name._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"

    def cuDeviceGetCount(self, number):
        number._obj.value = 2


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (0, Driver("12.8", 2, "")),
        (100, Driver("12.8", 0, "")),
        (803, Driver("12.8", 0, "cuInit failed with CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)")),
    ],
    ids=["two-gpus", "no-gpu", "broken"],
)
def test_the_driver_is_asked_without_torch(error, found, monkeypatch):
    monkeypatch.setattr(_machine.ctypes, "CDLL", lambda _: FakeDriver(error))
    assert _machine.driver() == found


@pytest.mark.parametrize("smi", [None, "/usr/bin/nvidia-smi"])
def test_no_driver_library(smi, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(_machine.ctypes, "CDLL", missing)
    monkeypatch.setattr(_machine.shutil, "which", lambda _: smi)
    assert _machine.driver().failure == (
        "nvidia-smi is here but libcuda.so.1 is not" if smi else ""
    )


def test_compiled_modules_of_an_installed_copy_are_found(tmp_path, monkeypatch):
    for folder, name in (("here", "_C.cp39.so"), ("there", "_C.cp310.so")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    path = [str(tmp_path / "here"), str(tmp_path / "there")]
    monkeypatch.setattr(branchcore, "__path__", path)
    assert _machine._compiled_files() == ("_C.cp310.so", "_C.cp39.so")
