"""What the kernels of gate_norm_modulate share: widths, rows of tables, what they are built for.

Letters: B samples, S tokens, C channels, R modulation rows. All tokens of a sample share the row of
the modulation tables that row_B names.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from branchcore.kernels.build import Build
from torch import Tensor

# past it the backward's registers spill
MAX_CHANNELS = 6144


def block_of(num_channels: int) -> int:
    """Give the power of two that holds a token's channels; one program reads them all at once."""
    if num_channels > MAX_CHANNELS:
        raise NotImplementedError(
            f"gate_norm_modulate: x_BSC must have at most C={MAX_CHANNELS} channels in Triton, "
            f"got {num_channels}; try branchcore.use('reference')"
        )
    return triton.next_power_of_2(num_channels)


def strides(number: int, *tensors: Tensor | None) -> Iterator[int]:
    """Give the leading strides of tensors in elements.

    0 for one that is not given, and along an axis of length 1, whose stride says nothing but would
    choose how wide accesses are.
    """
    for tensor in tensors:
        for axis in range(number):
            short = tensor is None or tensor.shape[axis] == 1
            yield 0 if short else tensor.stride(axis)


@triton.jit
def table_row(values, row, stride, channel, inside):
    """Load a row of a table as fp32, 0 outside."""
    return tl.load(values + row * stride + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_factor(scale, weight, row, stride, channel, inside):
    """Give (1 + scale) weight of a row, 0 outside."""
    factor = tl.where(inside, 1.0, 0.0)
    if scale is not None:
        factor += table_row(scale, row, stride, channel, inside)
    if weight is not None:
        factor *= table_row(weight, 0, 0, channel, inside)
    return factor


@triton.jit
def load_once(at, inside):
    """Load what is read once."""
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def terms(g, r, mean, rstd, factor_c):
    """Give g, n = (r - mean) rstd and p = g (1 + scale) weight in fp32.

    One fused multiply-add for n: rounding the mean already costs what the product does.
    """
    g = g.to(tl.float32)
    return g, r.to(tl.float32) * rstd - mean * rstd, g * factor_c


@triton.jit
def means(pn, p, factor, CENTRED: tl.constexpr):
    """Give the sums of p n and of p over channels times a factor; the second is 0 for an RMS."""
    slope, level = 0.0, 0.0
    if CENTRED:
        # one reduction for both sums halves the barriers
        slope, level = tl.split(tl.sum(tl.join(pn, p), axis=0) * factor)
    else:
        slope = tl.sum(pn, axis=0) * factor
    return slope, level


class Site(NamedTuple):
    """A site of a real model that the kernels are compiled for ahead of time."""

    num_channels: int
    state: str = "bf16"
    """Type of x, y and all that has their shape."""
    tables: str = "bf16"
    absent: tuple[str, ...] = ("weight", "bias")
    """Inputs and outputs that the site does without."""
    centred: bool = True

    def build(self, kernel: Any, num_warps: int, constants: Mapping[str, Any]) -> Build:
        """List the compilation of a kernel; the names of its arguments give their types."""
        fixed = {
            **{name: "*fp32" for name in ("moments", "partials", "sums")},
            **{name: f"*{self.tables}" for name in _TABLES},
            "row": "*i64",
            "eps": "fp32",
        }
        given = [name for name in kernel.arg_names if not name.isupper()]
        absent = [name for name in given if name in self.absent]
        sizes = [name for name in given if name.startswith("num_") or name.endswith(_STRIDES)]
        types = {name: "i32" if name in sizes else f"*{self.state}" for name in given} | {
            name: fixed[name] for name in given if name in fixed
        }
        return Build(
            kernel,
            {name: types[name] for name in given if name not in absent},
            {**dict.fromkeys(absent), **constants},
            tuple(name for name in sizes if name not in _ANY),
            num_warps,
        )


_STRIDES = ("_sample", "_token", "_row")
_TABLES = (
    "scale",
    "shift",
    "gate",
    "weight",
    "bias",
    "dscale",
    "dshift",
    "dgate",
    "dweight",
    "dbias",
)
_ANY = ("num_tokens", "num_samples", "num_all", "num_tiles")

AFFINE = ("weight", "bias")
NO_BRANCH = ("y", "gate", "grad_residual", "dy", "dgate")
FROZEN = ("y", "partials")  # what the backward does without when no table has a gradient
SITES = (
    Site(1536),  # SD3.5-M
    Site(3072),  # FLUX, Qwen-Image
    Site(3072, absent=(*AFFINE, *NO_BRANCH)),  # before the first sublayer
    Site(1536, tables="fp32"),  # Wan 1.3B
    Site(5120, tables="fp32"),  # Wan 14B
    Site(5120, tables="fp32", absent=("scale", "shift", "dscale", "dshift")),  # its cross attention
    Site(2304, absent=("bias", "shift", "dbias", "dshift"), centred=False),  # Lumina 2
    Site(6144),  # FLUX.2
    Site(1536, state="fp32", tables="fp32"),
)
