"""Philox4x32-10 integers and Box-Muller normals: the specification of every draw.

Block j of a stream gives elements 4j .. 4j + 3 from its four words w0 .. w3:

    u1 = ((w0 >> 8) + 1) 2^-24,  u2 = (w1 >> 8) 2^-24,  r = sqrt(-2 ln u1)
    z0 = r cos(2 pi u2),  z1 = r sin(2 pi u2),  and z2, z3 likewise from w2, w3.

Both uniforms are exact in fp32, so fp32 and fp64 normals agree to 1e-6.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
Letters: M draws, D elements, B = ceil(D / 4) blocks.
"""

import math

import torch
from torch import Tensor

from branchcore.noise import NO_STREAM, Noise
from branchcore.reference.edges import wide

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encrypt a counter of four 32-bit words under a key of two; words are int64 tensors."""
    c0, c1, c2, c3 = (word & WORD for word in counter)
    k0, k1 = (word & WORD for word in key)
    for _ in range(ROUNDS):
        # int64 products wrap, and their 64 bits are the unsigned product's
        even, odd = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c2 = (odd >> 32 & WORD) ^ c1 ^ k0, (even >> 32 & WORD) ^ c3 ^ k1
        c1, c3 = odd & WORD, even & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def box_muller(w0: Tensor, w1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn two 32-bit words into two independent standard normals."""
    u1 = ((w0 >> 8) + 1).to(dtype) * 2.0**-24
    u2 = (w1 >> 8).to(dtype) * 2.0**-24
    radius = (-2.0 * u1.log()).sqrt()
    angle = 2.0 * math.pi * u2
    return radius * angle.cos(), radius * angle.sin()


def stream_normal(
    key: Tensor, stream_M: Tensor, uid_M: Tensor, num_elements: int, dtype: torch.dtype
) -> Tensor:
    """Draw (M, D) normals, one stream per row; a row of stream -1 is 0."""
    seed, iteration, purpose = key.unbind()
    block_1B = torch.arange((num_elements + 3) // 4, device=key.device)[None]
    stream_M1, uid_M1 = stream_M.long()[:, None], uid_M.long()[:, None]
    w0, w1, w2, w3 = philox4x32((block_1B, purpose, stream_M1, uid_M1), (seed, iteration))
    z_MB4 = torch.stack((*box_muller(w0, w1, dtype), *box_muller(w2, w3, dtype)), dim=2)
    # a draw that nobody reads costs less than asking the device which rows are live
    return torch.where(stream_M1 == NO_STREAM, 0.0, z_MB4.flatten(1)[:, :num_elements])


def philox_normal(noise: Noise, num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw (M, D) mixed normals; bfloat16 is rounded from float32."""
    own_M, shared_M, uid_M = noise.counter.unbind(1)
    mix_M2 = noise.mix.to(wide(dtype))
    own_MD = stream_normal(noise.key, own_M, uid_M, num_elements, wide(dtype))
    shared_MD = stream_normal(noise.key, shared_M, uid_M, num_elements, wide(dtype))
    return (mix_M2[:, :1] * own_MD + mix_M2[:, 1:] * shared_MD).to(dtype)


def silence(noise: Noise, mute_M: Tensor) -> Noise:
    """Name no stream where `mute_M` is true."""
    streams_M2 = noise.counter[:, :2].masked_fill(mute_M[:, None], NO_STREAM)
    return noise._replace(counter=torch.cat((streams_M2, noise.counter[:, 2:]), dim=1))
