"""Casts that are the same in Triton's interpreter as on a device."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round fp32 to the nearest `dtype`, ties to even; the interpreter's own cast truncates."""
    if dtype == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(nan, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 (Triton types both branches)
        return x.to(dtype)
