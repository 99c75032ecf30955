"""Add a gated branch, normalise and modulate, in one pass.

Letters: B samples, S tokens, C channels, R modulation rows.
"""

import triton
import triton.language as tl
from branchcore.kernels import gate_norm_modulate_bwd as backward
from branchcore.kernels.build import Build
from branchcore.kernels.gate_norm_modulate_bwd import gate_norm_modulate_bwd
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.modulation import SITES, Site, block_of, load_once, strides, table_row
from branchcore.kernels.rounding import cast
from torch import Tensor

__all__ = ["BUILDS", "gate_norm_modulate_bwd", "gate_norm_modulate_fwd"]


@triton.jit
def _gate_norm_modulate_fwd_kernel(
    x,
    scale,
    shift,
    row,
    y,
    gate,
    weight,
    bias,
    residual,
    out,
    moments,
    x_sample,
    x_token,
    y_sample,
    y_token,
    scale_row,
    shift_row,
    gate_row,
    num_tokens,
    num_channels,
    num_all,
    eps,
    CENTRED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (B ceil(S / TOKENS),); a program owns TOKENS whole tokens of a sample.

    Moves 8 bytes per element in bf16 with a branch (x, y in; r, out back), 4 without. One token at
    real widths, 16 elements per thread: small programs, so that many are in flight on a
    multiprocessor and their tables come from its L1.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(num_tokens, TOKENS)
    sample = program // tiles
    token = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, BLOCK)[None, :]
    exists = channel < num_channels
    inside = (token < num_tokens)[:, None] & exists
    index = tl.load(row + sample)

    at = x + sample * x_sample + token[:, None] * x_token + channel
    r = load_once(at, inside).to(tl.float32)
    target = (sample * num_tokens + token)[:, None] * num_channels + channel
    if y is not None:
        at = y + sample * y_sample + token[:, None] * y_token + channel
        gated = load_once(at, inside).to(tl.float32)
        if gate is not None:
            gated *= table_row(gate, index, gate_row, channel, exists)
        rounded = cast(r + gated, residual.dtype.element_ty)
        tl.store(residual + target, rounded, mask=inside)
        r = rounded.to(tl.float32)

    mean = tl.zeros([TOKENS], tl.float32)
    if CENTRED:
        mean = tl.sum(r, axis=1) / num_channels
        r = tl.where(exists, r - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(r * r, axis=1) / num_channels + eps)
    place = moments + sample * num_tokens + token
    tl.store(place, mean, mask=token < num_tokens)
    tl.store(place + num_all, rstd, mask=token < num_tokens)

    r *= rstd[:, None]
    if weight is not None:
        r *= table_row(weight, 0, 0, channel, exists)
    if bias is not None:
        r += table_row(bias, 0, 0, channel, exists)
    if scale is not None:
        r *= 1.0 + table_row(scale, index, scale_row, channel, exists)
    if shift is not None:
        r += table_row(shift, index, shift_row, channel, exists)
    tl.store(out + target, cast(r, out.dtype.element_ty), mask=inside)


def gate_norm_modulate_fwd(
    x_BSC: Tensor,
    scale_RC: Tensor | None,
    shift_RC: Tensor | None,
    row_B: Tensor,
    y_BSC: Tensor | None,
    gate_RC: Tensor | None,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    centred: bool,
    eps: float,
    residual_BSC: Tensor | None,
    out_BSC: Tensor,
    moments_2BS: Tensor,
) -> None:
    """Write r if there is a branch, out, and every token's mean and 1 / sqrt(variance + eps)."""
    num_samples, num_tokens, num_channels = x_BSC.shape
    block = block_of(num_channels)
    if x_BSC.numel() == 0:
        return
    tokens, num_warps = _shape(block)
    launch_grid(
        _gate_norm_modulate_fwd_kernel,
        num_samples * triton.cdiv(num_tokens, tokens),
        *(x_BSC, scale_RC, shift_RC, row_B, y_BSC, gate_RC, weight_C, bias_C),
        *(residual_BSC, out_BSC, moments_2BS),
        *strides(2, x_BSC, y_BSC),
        *strides(1, scale_RC, shift_RC, gate_RC),
        *(num_tokens, num_channels, num_samples * num_tokens, eps),
        CENTRED=centred,
        TOKENS=tokens,
        BLOCK=block,
        num_warps=num_warps,
    )


def _shape(block: int) -> tuple[int, int]:
    """Give tokens and warps of a program: narrow tokens share one, a thread has 16 elements."""
    tokens = max(1, min(16, 2048 // block))
    return tokens, max(1, min(16, tokens * block // 512))


def _build(site: Site) -> Build:
    block = block_of(site.num_channels)
    tokens, num_warps = _shape(block)
    constants = {"CENTRED": site.centred, "TOKENS": tokens, "BLOCK": block}
    return site.build(_gate_norm_modulate_fwd_kernel, num_warps, constants)


BUILDS = (*(_build(site) for site in SITES), *backward.BUILDS)
