"""Kernels that test_aot.py compiles to see that the rules of bench/aot.py find their faults."""

import triton
import triton.language as tl
from branchcore.kernels.build import Build


@triton.jit
def centre_kernel(x, y, BLOCK: tl.constexpr):
    """Keeps a whole block in registers while its mean is taken."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(x + offsets)
    tl.store(y + offsets, block - tl.sum(block, axis=0) / BLOCK)


@triton.jit
def every_second_kernel(x, y, BLOCK: tl.constexpr):
    """Reads and writes every second element, which no 16-byte access can."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + 2 * offsets, tl.load(x + 2 * offsets))


POINTERS = {"x": "*fp32", "y": "*fp32"}
CENTRE = Build(centre_kernel, POINTERS, {"BLOCK": 8192})
EVERY_SECOND = Build(every_second_kernel, POINTERS, {"BLOCK": 1024})
