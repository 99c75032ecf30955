"""Draw the normals that a `Noise` names. Letters: M draws, D elements."""

import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.noise import blocks, draw, load_key, nothing_cached
from branchcore.kernels.tile import (
    NUM_WARPS,
    TILE,
    launch,
    one_variant,
    place,
    weave,
    write,
)
from torch import Tensor


@one_variant
def _philox_normal_fwd_kernel(key, counter, mix, out, num_elements, num_tiles, UNIT: tl.constexpr):
    """Grid: (M tiles,); a program owns a tile of a draw: 4 bytes per element, 2 in bf16."""
    m, tile, start, left = place(num_elements, num_tiles, UNIT)
    words, block, cache = load_key(key), blocks(tile), nothing_cached()
    eps, cache = draw(words, counter + 3 * m, mix + 2 * m, False, block, cache)
    write(out + m * num_elements + start, (weave(eps[0]), weave(eps[1])), left, UNIT)


def philox_normal_fwd(key: Tensor, counter_M3: Tensor, mix_M2: Tensor, out_MD: Tensor) -> None:
    """Fill out; all tensors are contiguous."""
    launch(_philox_normal_fwd_kernel, *out_MD.shape, key, counter_M3, mix_M2, out_MD)


_TYPES = {
    "key": "*i64",
    "counter": "*i32",
    "mix": "*fp64",
    "out": "*fp32",
    "num_elements": "i32",
    "num_tiles": "i32",
}

BUILDS = (
    Build(_philox_normal_fwd_kernel, _TYPES, {"UNIT": TILE}, num_warps=NUM_WARPS),
    Build(_philox_normal_fwd_kernel, _TYPES | {"out": "*bf16"}, {"UNIT": 8}, num_warps=NUM_WARPS),
)
