"""Philox4x32-10 and Box-Muller in registers. Specification: branchcore/reference/philox_normal.py.

A tensor of blocks gives four tensors of normals, of elements 4j .. 4j + 3 of each block j;
`tile.weave` puts them in order. The integers are the reference's, bit by bit. On NVIDIA the maths
is that of csrc/noise.h: the special-function unit, with a series where u1 is nearly 1. Elsewhere,
in the interpreter too, sine and cosine are polynomials, because a library's bring a slow path.
"""

import triton
import triton.language as tl
from branchcore.kernels.rounding import INTERPRETED
from branchcore.kernels.tile import OCTETS, WHOLE, add_scaled
from triton.language.extra import libdevice

ROUNDS = tl.constexpr(10)
NO_STREAM = tl.constexpr(-1)
WORD_TO_TURN = tl.constexpr(2.0**-24)
# of (int32(w) >> 8): radians in [-pi, pi), where the unit is most exact
WORD_TO_ANGLE = tl.constexpr(3.7450703e-7)
MINUS_TWO_LOG_2 = tl.constexpr(-1.38629436)


def _is_nvidia(_semantic=None):
    """Whether the kernel is being compiled for NVIDIA, ahead of time included."""
    if _semantic is None:  # interpreted
        return tl.constexpr(False)
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


_is_nvidia.__triton_builtin__ = True
# High and low word of a product in one instruction; of the two halves compilers make two, at times.
MULTIPLY = tl.constexpr("{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }")
WORDS = tl.constexpr((tl.uint32, tl.uint32))


@triton.jit
def philox4x32(w0, w1, w2, w3, key0, key1):
    """Encrypt counters of four uint32 words under keys of two; all six tensors of one shape."""
    multiplier0 = tl.full(w0.shape, 0xD2511F53, tl.uint32)
    multiplier1 = tl.full(w0.shape, 0xCD9E8D57, tl.uint32)
    step0 = tl.full(w0.shape, 0x9E3779B9, tl.uint32)
    step1 = tl.full(w0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        if _is_nvidia():
            even = tl.inline_asm_elementwise(
                MULTIPLY, "=r,=r,r,r", [w0, multiplier0], WORDS, True, 1
            )
            odd = tl.inline_asm_elementwise(
                MULTIPLY, "=r,=r,r,r", [w2, multiplier1], WORDS, True, 1
            )
        else:
            even = tl.umulhi(w0, multiplier0), tl.mul(w0, multiplier0, False)
            odd = tl.umulhi(w2, multiplier1), tl.mul(w2, multiplier1, False)
        w0 = odd[0] ^ w1 ^ key0
        w1 = odd[1]
        w2 = even[0] ^ w3 ^ key1
        w3 = even[1]
        key0 = tl.add(key0, step0, False)
        key1 = tl.add(key1, step1, False)
    return w0, w1, w2, w3


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) for u = ((word >> 8) + 1) 2^-24."""
    u = ((word >> 8) + 1).to(tl.int32).to(tl.float32) * WORD_TO_TURN
    twice = 2.0 - 2.0 * u
    series = twice * (1.0 + twice * (0.25 + twice * 0.0833333333))
    log2 = libdevice.fast_log2f(u) if _is_nvidia() else tl.log2(u)
    return tl.sqrt(tl.where(twice < 0.03125, series, MINUS_TWO_LOG_2 * log2))


@triton.jit
def _cos_sin(word):
    """(cos, sin)(2 pi u) for u = (word >> 8) 2^-24."""
    if _is_nvidia():
        angle = (word.to(tl.int32) >> 8).to(tl.float32) * WORD_TO_ANGLE
        x, y = libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        # the nearest quarter turn, then minimax polynomials on an eighth either way: csrc/noise.h
        k = (word >> 8).to(tl.int32)
        quarter = (k + (1 << 21)) >> 22
        f = (k - (quarter << 22)).to(tl.float32) * WORD_TO_TURN
        square = f * f
        sine = -7.5402067809e1 * square + 8.1592553564e1
        sine = (sine * square - 4.1341662633e1) * square + 6.2831852879
        sine *= f
        cosine = 5.9245959780e1 * square - 8.5443741600e1
        cosine = (cosine * square + 6.4939326470e1) * square - 1.9739208694e1
        cosine = cosine * square + 1.0
        odd = (quarter & 1) != 0
        x = tl.where(odd, sine, cosine)
        y = tl.where(odd, cosine, sine)
        x = tl.where(((quarter + 1) & 2) != 0, -x, x)
        y = tl.where((quarter & 2) != 0, -y, y)
    return x, y


@triton.jit
def _half(block, key, stream, uid, scale):
    """The four normals of each block of a stream, times `scale`."""
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = philox4x32(
        block,
        zero + key[2],
        zero + stream.to(tl.uint32),
        zero + uid.to(tl.uint32),
        zero + key[0],
        zero + key[1],
    )
    r0 = scale * _radius(w0)
    cos0, sin0 = _cos_sin(w1)
    r1 = scale * _radius(w2)
    cos1, sin1 = _cos_sin(w3)
    return r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1


@triton.jit
def _normals(block, key, stream, uid, scale):
    if INTERPRETED:
        # an interpreted operation costs the same for twice the elements
        both = _half(tl.join(block, block + 1), key, stream, uid, scale)
        a0, b0 = tl.split(both[0])
        a1, b1 = tl.split(both[1])
        a2, b2 = tl.split(both[2])
        a3, b3 = tl.split(both[3])
        pair = (a0, a1, a2, a3), (b0, b1, b2, b3)
    else:
        first = _half(block, key, stream, uid, scale)
        pair = first, _half(block + 1, key, stream, uid, scale)
    return pair


@triton.jit
def blocks(tile):
    """Philox block of the first half of each octet of a tile."""
    return (tile * (WHOLE // 4) + tl.arange(0, OCTETS) * 2).to(tl.uint32)


@triton.jit
def load_key(key):
    """Key words of a call and its purpose."""
    key0 = tl.load(key).to(tl.uint32)
    key1 = tl.load(key + 1).to(tl.uint32)
    return key0, key1, tl.load(key + 2).to(tl.uint32)


@triton.jit
def silence():
    """Noise of a tile that is 0."""
    zero = tl.zeros([OCTETS], tl.float32)
    half = zero, zero, zero, zero
    return half, half


@triton.jit
def nothing_cached():
    """What `draw` keeps of a shared stream, before the first."""
    return silence(), NO_STREAM, 0


@triton.jit
def draw(key, counter, mix, still, block, cache):
    """eps of the draw at `counter` and `mix`: 0 if it is `still` or names no stream.

    Siblings that share a stream reuse its normals, the cache, while they follow each other.
    """
    own = tl.load(counter)
    shared = tl.load(counter + 1)
    uid = tl.load(counter + 2)
    normals, stream, stream_uid = cache
    if still:
        own = NO_STREAM
        shared = NO_STREAM
    if own != NO_STREAM:
        eps = _normals(block, key, own, uid, tl.load(mix).to(tl.float32))
    else:
        eps = silence()
    if shared != NO_STREAM:
        if (shared != stream) | (uid != stream_uid):
            normals = _normals(block, key, shared, uid, 1.0)
            stream = shared
            stream_uid = uid
        eps = add_scaled(eps, tl.load(mix + 1).to(tl.float32), normals)
    return eps, (normals, stream, stream_uid)
