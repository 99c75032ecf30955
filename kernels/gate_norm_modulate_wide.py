"""The backward of gate_norm_modulate for wide tokens, whose sums leave no room for a whole one.

A token is read as two blocks, LOW and HIGH: 4,096 channels and a power of two that holds the rest,
so that at 5,120 or 6,144 channels a thread has 10 or 12 elements instead of 16.
"""

import triton
import triton.language as tl
from branchcore.kernels.modulation import load_once, means, row_factor, table_row, terms
from branchcore.kernels.rounding import cast


@triton.jit
def _zeros(BLOCK: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return zero, zero, zero


@triton.jit
def _write(n, p, rstd, slope, level, q, y_c, gate_c, dx_at, dy_at, channel, inside, sum_y):
    """Write dx and dy of a block; give what it adds to the sum of dr y."""
    dr = p * rstd - level - n * slope
    if q is not None:
        dr += q.to(tl.float32)
    tl.store(dx_at + channel, cast(dr, dx_at.dtype.element_ty), mask=inside)
    if gate_c is not None:
        tl.store(dy_at + channel, cast(dr * gate_c, dy_at.dtype.element_ty), mask=inside)
    if y_c is not None:
        sum_y += dr * y_c.to(tl.float32)
    return sum_y


@triton.jit
def _store_sums(at, num_channels, channel, inside, sum_gn, sum_g, sum_y, WITH_Y: tl.constexpr):
    tl.store(at + channel, sum_gn, mask=inside)
    tl.store(at + num_channels + channel, sum_g, mask=inside)
    if WITH_Y:
        tl.store(at + 2 * num_channels + channel, sum_y, mask=inside)


@triton.jit
def _gate_norm_modulate_bwd_wide_kernel(
    grad_out,
    grad_residual,
    residual,
    y,
    moments,
    scale,
    row,
    gate,
    weight,
    dx,
    dy,
    partials,
    g_sample,
    g_token,
    q_sample,
    q_token,
    r_sample,
    r_token,
    y_sample,
    y_token,
    scale_row,
    gate_row,
    num_tokens,
    num_channels,
    num_all,
    CENTRED: tl.constexpr,
    TOKENS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Grid: (B ceil(S / TOKENS),); a program walks over TOKENS tokens of a sample.

    Moves what the kernel for narrow tokens does. One program fills a multiprocessor: all of a
    token is in flight at once, 41 KB of Wan 14B's 5,120 channels in bf16.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(num_tokens, TOKENS)
    sample = program // tiles
    first = (program % tiles) * TOKENS
    count = tl.minimum(num_tokens - first, TOKENS).to(tl.int32)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    in_low, in_high = low < num_channels, high < num_channels
    index = tl.load(row + sample)
    low_gn, low_g, low_y = _zeros(LOW)
    high_gn, high_g, high_y = _zeros(HIGH)

    g_row = grad_out + sample * g_sample + first * g_token
    r_row = residual + sample * r_sample + first * r_token
    if grad_residual is not None:
        q_row = grad_residual + sample * q_sample + first * q_token
    if y is not None:
        y_row = y + sample * y_sample + first * y_token
    place = moments + sample * num_tokens + first
    target = (sample * num_tokens + first) * num_channels
    for _step in range(0, count):
        mean, rstd = tl.load(place), tl.load(place + num_all)
        g_l, r_l = load_once(g_row + low, in_low), load_once(r_row + low, in_low)
        g_h, r_h = load_once(g_row + high, in_high), load_once(r_row + high, in_high)
        q_l, q_h, y_l, y_h = None, None, None, None
        if grad_residual is not None:
            q_l, q_h = load_once(q_row + low, in_low), load_once(q_row + high, in_high)
            q_row += q_token
        if y is not None:
            y_l, y_h = load_once(y_row + low, in_low), load_once(y_row + high, in_high)
            y_row += y_token
        f_l = row_factor(scale, weight, index, scale_row, low, in_low)
        f_h = row_factor(scale, weight, index, scale_row, high, in_high)
        g_l, n_l, p_l = terms(g_l, r_l, mean, rstd, f_l)
        g_h, n_h, p_h = terms(g_h, r_h, mean, rstd, f_h)
        if partials is not None:
            low_gn += g_l * n_l
            low_g += g_l
            high_gn += g_h * n_h
            high_g += g_h
        slope_l, level_l = means(p_l * n_l, p_l, rstd / num_channels, CENTRED)
        slope_h, level_h = means(p_h * n_h, p_h, rstd / num_channels, CENTRED)
        slope, level = slope_l + slope_h, level_l + level_h
        dx_at, dy_at, gate_l, gate_h = dx + target, None, None, None
        if gate is not None:
            dy_at = dy + target
            gate_l = table_row(gate, index, gate_row, low, in_low)
            gate_h = table_row(gate, index, gate_row, high, in_high)
        low_y = _write(
            n_l, p_l, rstd, slope, level, q_l, y_l, gate_l, dx_at, dy_at, low, in_low, low_y
        )
        high_y = _write(
            n_h, p_h, rstd, slope, level, q_h, y_h, gate_h, dx_at, dy_at, high, in_high, high_y
        )
        g_row += g_token
        r_row += r_token
        place += 1
        target += num_channels

    if partials is not None:
        at = partials + program * (2 if y is None else 3) * num_channels
        _store_sums(at, num_channels, low, in_low, low_gn, low_g, low_y, y is not None)
        _store_sums(at, num_channels, high, in_high, high_gn, high_g, high_y, y is not None)
