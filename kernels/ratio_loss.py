"""The clipped ratio loss of all trained edges, its gradient and its statistics.

Letters: N nodes, E trained edges.
"""

import triton.language as tl
from branchcore.kernels.build import Build
from branchcore.kernels.launch import launch_grid
from branchcore.kernels.tile import one_variant
from torch import Tensor

BLOCK = 128
NUM_WARPS = 4


@one_variant
def _ratio_loss_fwd_kernel(
    p,
    q,
    child_start,
    exponent,
    advantage,
    weight,
    loss,
    stats,
    grad_p,
    grad_q,
    lower: tl.float64,
    upper: tl.float64,
    num_nodes,
    BLOCK: tl.constexpr,
):
    """Grid: (1,); a thread takes every 128th node with its edges, in float64.

    Sums of threads are added in a fixed order. A few thousand edges, 45 bytes each, are in cache.
    """
    zero = tl.zeros([BLOCK], tl.float64)
    total, edges, num_low, num_high = zero, zero, zero, zero
    sum_dev, max_dev, sum_square, sum_log = zero, zero, zero, zero
    for start in range(0, num_nodes, BLOCK):
        n = start + tl.arange(0, BLOCK)
        first = tl.load(child_start + n, mask=n < num_nodes, other=0)
        count = tl.load(child_start + n + 1, mask=n < num_nodes, other=0) - first
        q_n = tl.load(q + n, mask=n < num_nodes, other=0.0).to(tl.float64)
        grad_q_n = zero
        for k in range(0, tl.max(count, axis=0).to(tl.int32)):
            e = first + k
            w = tl.load(weight + e, mask=k < count, other=0.0).to(tl.float64)
            live = w != 0.0
            p_e = tl.load(p + e, mask=live, other=0.0).to(tl.float64)
            lin = tl.load(exponent + 2 * e, mask=live, other=0.0)
            quad = tl.load(exponent + 2 * e + 1, mask=live, other=0.0)
            plus = tl.load(advantage + 2 * e, mask=live, other=0.0).to(tl.float64)
            minus = tl.load(advantage + 2 * e + 1, mask=live, other=0.0).to(tl.float64)
            log_ratio = tl.where(live, lin * p_e - quad * q_n, 0.0)
            ratio = tl.exp(log_ratio)
            low = (minus > 0.0) & (ratio < lower)
            high = (plus > 0.0) & (ratio > upper)
            gain = tl.where(plus > 0.0, plus * tl.where(high, upper, ratio), 0.0)
            pain = tl.where(minus > 0.0, minus * tl.where(low, lower, ratio), 0.0)
            total += w * (pain - gain)
            slope = tl.where((minus > 0.0) & (ratio >= lower), minus * ratio, 0.0)
            slope -= tl.where((plus > 0.0) & (ratio <= upper), plus * ratio, 0.0)
            tl.store(grad_p + e, (w * slope * lin).to(tl.float32), mask=k < count)
            grad_q_n -= w * slope * quad
            dev = tl.abs(ratio - 1.0)
            edges += live.to(tl.float64)
            num_low += low.to(tl.float64)
            num_high += high.to(tl.float64)
            sum_dev += dev
            max_dev = tl.maximum(max_dev, dev)
            sum_square += log_ratio * log_ratio
            sum_log += log_ratio
        tl.store(grad_q + n, grad_q_n.to(tl.float32), mask=n < num_nodes)
    tl.store(loss, tl.sum(total, axis=0).to(tl.float32))
    tl.store(stats, tl.sum(edges, axis=0).to(tl.float32))
    tl.store(stats + 1, tl.sum(num_low, axis=0).to(tl.float32))
    tl.store(stats + 2, tl.sum(num_high, axis=0).to(tl.float32))
    dev = tl.sum(sum_dev, axis=0)
    tl.store(stats + 3, dev.to(tl.float32))
    # a maximum drops a NaN, a sum keeps it
    largest = tl.where(dev == dev, tl.max(max_dev, axis=0), dev)
    tl.store(stats + 4, largest.to(tl.float32))
    tl.store(stats + 5, tl.sum(sum_square, axis=0).to(tl.float32))
    tl.store(stats + 6, tl.sum(sum_log, axis=0).to(tl.float32))


def ratio_loss_fwd(
    p_E: Tensor,
    q_N: Tensor,
    child_start: Tensor,
    exponent_E2: Tensor,
    advantage_E2: Tensor,
    weight_E: Tensor,
    low: float,
    high: float,
    loss: Tensor,
    stats: Tensor,
    grad_p_E: Tensor,
    grad_q_N: Tensor,
) -> None:
    """Fill the loss, its statistics in the order of `RatioStats`, and its gradients."""
    edges = (exponent_E2, advantage_E2, weight_E)
    outputs, bounds = (loss, stats, grad_p_E, grad_q_N), (1.0 - low, 1.0 + high)
    vectors = (p_E, q_N, child_start, *edges, *outputs)
    sizes = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    launch_grid(_ratio_loss_fwd_kernel, 1, *vectors, *bounds, len(q_N), **sizes)


_TYPES = {
    "p": "*fp32",
    "q": "*fp32",
    "child_start": "*i64",
    "exponent": "*fp64",
    "advantage": "*fp64",
    "weight": "*fp64",
    "loss": "*fp32",
    "stats": "*fp32",
    "grad_p": "*fp32",
    "grad_q": "*fp32",
    "lower": "fp64",
    "upper": "fp64",
    "num_nodes": "i32",
}
_FP32 = {"advantage": "*fp32", "weight": "*fp32"}

BUILDS = (
    Build(_ratio_loss_fwd_kernel, _TYPES, {"BLOCK": BLOCK}, num_warps=NUM_WARPS, streams=False),
    Build(
        _ratio_loss_fwd_kernel, _TYPES | _FP32, {"BLOCK": BLOCK}, num_warps=NUM_WARPS, streams=False
    ),
)
