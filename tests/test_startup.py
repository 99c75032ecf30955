"""`import branchcore` costs little beyond torch's own import and loads no optional package."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, sys, time
import torch
before, begin = set(sys.modules), time.process_time()
import branchcore
cpu_s = time.process_time() - begin
print(json.dumps([cpu_s, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""
HEAVY = {
    *("diffusers", "transformers", "accelerate", "peft", "sklearn", "scipy", "triton"),
    *("rich", "tqdm", "tensorboard", "wandb", "matplotlib", "PIL", "pandas", "pyarrow", "pdoc"),
}
LIMIT_S = 0.3
ATTEMPTS = 5


def fresh_import(code=CODE):
    """Returns the CPU seconds of an import in a process of its own, and the packages it loads."""
    # with the bytecode kept, as everybody but a read-only container has it
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cpu_s, packages = json.loads(done.stdout.splitlines()[-1])
    return cpu_s, set(packages)


@pytest.fixture(scope="module")
def first():
    return fresh_import()


def test_import_brings_no_optional_package(first):
    _, packages = first
    assert "branchcore" in packages
    assert packages & HEAVY == set()


def test_import_takes_less_than_a_third_of_a_second(first):
    # others on the machine only ever add CPU time: the least of some is the import's own
    least, attempts = first[0], 1
    while least >= LIMIT_S and attempts < ATTEMPTS:
        least, attempts = min(least, fresh_import()[0]), attempts + 1
    assert 0.0 < least < LIMIT_S


def test_what_a_heavier_import_would_load_is_seen():
    code = CODE.replace("import torch\n", "").replace("import branchcore\n", "import tqdm\n")
    _, packages = fresh_import(code)
    assert packages & HEAVY == {"tqdm"}
