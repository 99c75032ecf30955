"""Channels as the pairs that a rotation turns, and what qk_norm_rope is compiled for.

A tile is (heads, channels) of one token. Channels are loaded 16 bytes at a time and split into the
two channels of each pair only then, within a thread.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.rounding import cast
from torch import Tensor


@triton.jit
def load_pairs(
    row,
    keep,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr,
    ONCE: tl.constexpr = False,
):
    """Load D channels from each pointer of `row`, (n, 1), as fp32 pairs, two (n, BLOCK_D / 2)."""
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    if HALVES:
        i = tl.arange(0, BLOCK_D // 2)[None, :]
        keep = keep & (i < D // 2)
        a = tl.load(row + i, keep, 0.0, eviction_policy=POLICY).to(tl.float32)
        b = tl.load(row + (i + D // 2), keep, 0.0, eviction_policy=POLICY).to(tl.float32)
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(row + d, keep & (d < D), 0.0, eviction_policy=POLICY).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_D // 2, 2)))
    return a, b


@triton.jit
def stream_pairs(row, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Load what is read once, and leave the first-level cache to weights, cos and sin."""
    return load_pairs(row, keep, D, BLOCK_D, HALVES, True)


@triton.jit
def store_pairs(row, a, b, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Store pairs where `load_pairs` finds them, rounded once."""
    dtype: tl.constexpr = row.dtype.element_ty
    if HALVES:
        i = tl.arange(0, BLOCK_D // 2)[None, :]
        keep = keep & (i < D // 2)
        tl.store(row + i, cast(a, dtype), mask=keep)
        tl.store(row + (i + D // 2), cast(b, dtype), mask=keep)
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        x = tl.reshape(tl.join(a, b), (a.shape[0], BLOCK_D))
        tl.store(row + d, cast(x, dtype), mask=keep & (d < D))


@triton.jit
def weight_pairs(
    weight,
    head,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACROSS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Load the weights of a head's channels, (1, BLOCK_D / 2), or of all heads', (heads, ...)."""
    own = head if ACROSS else tl.zeros((1, 1), tl.int64)
    return load_pairs(weight + own * D, own < NUM_HEADS, D, BLOCK_D, HALVES)


@triton.jit
def mean_of_pairs(a, b, COUNT: tl.constexpr, ACROSS: tl.constexpr):
    """Average a + b over the channels of a head, (heads, 1), or over those of all heads, ()."""
    total = tl.sum(a + b) if ACROSS else tl.sum(a + b, axis=1, keep_dims=True)
    return total * (1.0 / COUNT)


# a program holds a token with all its heads in registers
MAX_CHANNELS = 16384


class Tile(NamedTuple):
    """A token in a program; it depends on the token's own shape, and never on the batch."""

    HEADS: int
    BLOCK_D: int
    num_warps: int


def tile(num_heads: int, num_channels: int) -> Tile:
    """Give each thread 32 channels of a tensor, on up to 16 warps, or fewer if heads are few.

    At least a thread per channel of a head, else cos and sin would need a wider layout than the
    states, and every state would go through shared memory to meet them.
    """
    heads = triton.next_power_of_2(num_heads)
    block = max(2, triton.next_power_of_2(num_channels))
    if heads * block > MAX_CHANNELS:
        raise NotImplementedError(
            f"qk_norm_rope: q_BSHD must have at most {MAX_CHANNELS} channels in Triton, H and D "
            f"rounded up to powers of two, got {heads} x {block}; try branchcore.use('reference')"
        )
    return Tile(heads, block, min(max(heads * block // 1024, block // 32, 1), 16))


def strides(x_BSHD: Tensor) -> tuple[int, int, int | None]:
    """Give the strides of samples, tokens and heads; None for heads that follow each other.

    That of a single sample or token is 0: it may be anything, and would choose how wide accesses
    are, and so the order of sums.
    """
    sample, token, head = (
        stride if size > 1 else 0
        for size, stride in zip(x_BSHD.shape[:3], x_BSHD.stride(), strict=False)
    )
    return sample, token, None if head in (0, x_BSHD.shape[3]) else head


class Site(NamedTuple):
    """The attention of a real model that the kernels are compiled for ahead of time."""

    num_heads: int
    num_channels: int
    state: str = "bf16"
    weight: str = "bf16"
    across: bool = False
    rope: bool = True
    halves: bool = False

    def build(self, kernel: Any, absent: tuple[str, ...] = (), **more: Any) -> Build:
        """List the compilation of a kernel; the names of its arguments give their types."""
        states, weights = ("q", "k", "x", "grad", "q_out", "k_out", "dx"), ("q_weight", "k_weight")
        types = {
            **dict.fromkeys(states, f"*{self.state}"),
            **dict.fromkeys((*weights, "weight", "dweight"), f"*{self.weight}"),
            **dict.fromkeys(("cos", "sin", "partials"), "*fp32"),
            "eps": "fp32",
        }
        given = [name for name in kernel.arg_names if not name.isupper()]
        absent = (*absent, *(name for name in given if name.endswith("_stride_h")))
        absent = absent if self.rope else (*absent, "cos", "sin")
        constants = {
            **dict.fromkeys(("Q_HEADS", "K_HEADS", "NUM_HEADS"), self.num_heads),
            **{"D": self.num_channels, "ACROSS": self.across, "HALVES": self.halves},
            **tile(self.num_heads, self.num_channels)._asdict(),
            **more,
        }
        return Build(
            kernel,
            {name: types.get(name, "i32") for name in given if name not in absent},
            {
                **dict.fromkeys(name for name in given if name in absent),
                **{name: constants[name] for name in kernel.arg_names if name.isupper()},
            },
            tuple(name for name in given if "_stride_" in name or name == "num_channels"),
            constants["num_warps"],
        )


SITES = (
    Site(24, 128),  # FLUX, Qwen-Image
    Site(24, 64, rope=False),  # SD3.5-M
    Site(38, 64, rope=False),  # SD3.5-L
    Site(12, 128, across=True),  # Wan 1.3B
    Site(40, 128, weight="fp32", across=True),  # Wan 14B
    Site(40, 128, weight="fp32", across=True, rope=False),  # its cross attention
    Site(40, 128, halves=True),  # as Cosmos rotates
    Site(24, 128, state="fp32", weight="fp32"),
)
