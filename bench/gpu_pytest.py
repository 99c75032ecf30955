"""Pytest plugin of gpu_check: a kernel that kills its GPU context fails one test, not all after it.

After an illegal access every CUDA call of the process fails. The worker of pytest-xdist that it
happened in is ended, with the error on its standard error; xdist starts another.
"""

from __future__ import annotations

import os
import sys

import pytest
from gpu_timing import context_is_dead

DEAD = 86


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.excinfo is None or "PYTEST_XDIST_WORKER" not in os.environ or not context_is_dead():
        return
    print(f"\nGPU context died in {item.nodeid}: {call.excinfo.value}", file=sys.stderr, flush=True)
    os._exit(DEAD)
