"""What the passes of group normalisation share: how they cut an image, and how they read it.

Letters: B images, P positions, C channels, G groups. An image is cut into at most `MAX_TILES` tiles
of whole positions and a tile into blocks of about `BLOCK` elements, by P and C alone. A program
owns a tile with all its channels, so that it reads one contiguous run of memory.

Why these: 4,096 elements over 8 warps are 16 per thread, so two (bf16) or four (fp32) loads of 16
bytes in flight per tensor, in 40 to 64 registers forward, which is four programs per SM, and 58 to
121 backward, which is two to four. 512 tiles fill 132 SMs with four programs each for one image,
and let the second stage read all tiles of a group in one or two steps.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from branchcore.kernels.build import Build

BLOCK = 4096
MAX_TILES = 512
MIN_POSITIONS = 32
NUM_WARPS = 8
COMBINE_BLOCK = 4096


class Tiles(NamedTuple):
    """How an image of P positions and C channels is cut."""

    tile_positions: int
    """Positions per tile, a multiple of BLOCK_P; the last tile may have fewer."""
    num_tiles: int
    constants: dict[str, int | bool]
    """The constexpr arguments of a pass over the tiles."""

    @classmethod
    def of(cls, num_positions: int, num_channels: int) -> "Tiles":
        """Cut an image; every tile has at least one position."""
        block_c = triton.next_power_of_2(num_channels)
        block_p = max(1, BLOCK // block_c)
        wanted = max(MIN_POSITIONS, triton.cdiv(num_positions, MAX_TILES))
        tile_positions = triton.cdiv(wanted, block_p) * block_p
        even = num_positions % tile_positions == 0 and num_channels == block_c
        constants = {"C": num_channels, "BLOCK_C": block_c, "BLOCK_P": block_p, "EVEN": even}
        num_tiles = triton.cdiv(num_positions, tile_positions)
        return cls(tile_positions, num_tiles, constants)


def combine_constants(num_channels: int, num_groups: int) -> dict[str, int]:
    """Give the constexpr arguments of a second stage over the tiles of a group."""
    block_c = triton.next_power_of_2(num_channels // num_groups)
    block_t = min(MAX_TILES, max(1, COMBINE_BLOCK // block_c))
    return {"C": num_channels, "G": num_groups, "BLOCK_C": block_c, "BLOCK_T": block_t}


@triton.jit
def place(program, num_positions, tile_positions):
    """Image of a program, the position of the batch at which its tile starts, and its length."""
    num_tiles = tl.cdiv(num_positions, tile_positions)
    image = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles).to(tl.int64) * tile_positions
    count = tl.minimum(num_positions - first, tile_positions).to(tl.int32)
    return image, image * num_positions + first, count


@triton.jit
def read(pointers, valid, EVEN: tl.constexpr):
    """Load a block as fp32, 0 where it is not valid; plain loads if all of it always is."""
    values = tl.load(pointers) if EVEN else tl.load(pointers, mask=valid, other=0.0)
    return values.to(tl.float32)


@triton.jit
def per_channel(statistics, image, c, which, C: tl.constexpr, G: tl.constexpr):
    """Spread one of the two numbers that every group of an image has over its channels."""
    group = image * G + c // (C // G)
    return tl.load(statistics + 2 * group + which, mask=c < C, other=0.0)


@triton.jit
def parameter(pointer, c, C: tl.constexpr):
    """Load weight or bias as fp32."""
    return tl.load(pointer + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)); an exp that overflows gives 0."""
    return 1.0 / (1.0 + tl.exp(-z))


class Shape(NamedTuple):
    """A call for which kernels are compiled ahead of time."""

    dtype: str
    num_positions: int
    num_channels: int
    num_groups: int = 32
    silu: bool = True

    def activation(self) -> dict[str, int]:
        """Give the constexpr arguments that only some passes over the tiles have."""
        return {"G": self.num_groups, "SILU": self.silu}

    def over_tiles(self, kernel: Any, types: dict[str, str], **constants: int) -> Build:
        """Compile a pass over the tiles, which moves 16 bytes at a time."""
        tiles = Tiles.of(self.num_positions, self.num_channels)
        constants = {**tiles.constants, **constants}
        aligned = ("num_positions",) if self.num_positions % 16 == 0 else ()
        return Build(kernel, types | SIZES, constants, (*aligned, "tile_positions"), NUM_WARPS)

    def over_groups(self, kernel: Any, types: dict[str, str], **scalars: str) -> Build:
        """Compile a second stage over the tiles of a group."""
        constants = combine_constants(self.num_channels, self.num_groups)
        return Build(
            kernel, types | SIZES | scalars, constants, ("tile_positions",), NUM_WARPS, False
        )


SIZES = {"num_positions": "i32", "tile_positions": "i32"}
SHAPES = (
    Shape("bf16", 64 * 64, 512),
    Shape("bf16", 512 * 512, 128),
    Shape("fp32", 256 * 256, 256),
    Shape("fp32", 64 * 64, 512, silu=False),
    Shape("bf16", 30 * 45, 320),
)
