"""The clipped ratio loss of all trained edges, its gradient and statistics in one launch."""

import math
from typing import Any

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.reference import RatioLoss, RatioStats

_COUNTED = len(RatioStats._fields) - 1
"""Statistics of one launch: all but `clipped_noise`."""


def ratio_loss(
    p_E: Tensor,
    q_N: Tensor,
    child_start: Tensor,
    exponent_E2: Tensor,
    advantage_E2: Tensor,
    weight_E: Tensor,
    clip: tuple[float, float],
    floor: float = 0.0,
) -> RatioLoss:
    """Sum the clipped policy-gradient loss over trained edges.

    l = lin p - quad q, r = exp(l), and with clip r to [1 - low, 1 + high]
    loss = sum w (-A+ min(r, clip r) + A- max(r, clip r)).

    Args:
        p_E: (E,) fp32, from `edge_dots`; differentiable, like q_N.
        q_N: (N,) fp32, from `edge_dots`.
        child_start: (N + 1,) int64, trained edges of n are child_start[n]:child_start[n + 1].
        exponent_E2: (E, 2) fp64, (lin, quad): (k, k^2 / 2) for PPO with k = b / s.
        advantage_E2: (E, 2) fp32 or fp64, (A+, A-), both >= 0.
        weight_E: (E,) fp32 or fp64; an edge of weight 0 is pruned: it enters nothing at all.
        clip: (low, high) distances from 1, each may be inf.
        floor: by how much l is uncertain; what the bounds cut by less is counted, at the price of
            a second launch. 0 = not.

    Returns:
        `RatioLoss` of the loss (), fp32, and `RatioStats` of 0-d sums over the edges of non-zero
        weight. Gradients are those of the loss; at the clip bound itself the gradient passes.

    Numerics: float64 inside, sums in the order of the edges.
    Source: PPO eq. 7 with one column per sign of the advantage, so that separate clipped losses
        of several rewards (DanceGRPO) add up to one.
    """
    op = "ratio_loss"
    num_edges, num_nodes = _check.length(op, "p_E", p_E), _check.length(op, "q_N", q_N)
    device = p_E.device
    _check.tensor(op, "p_E", p_E, (num_edges,), _check.SCALAR, device)
    _check.tensor(op, "q_N", q_N, (num_nodes,), (p_E.dtype,), device)
    _check.tensor(op, "child_start", child_start, (num_nodes + 1,), _check.INDEX, device)
    _check.tensor(op, "exponent_E2", exponent_E2, (num_edges, 2), _check.ROW, device)
    _check.tensor(op, "advantage_E2", advantage_E2, (num_edges, 2), _check.SCALAR, device)
    _check.tensor(op, "weight_E", weight_E, (num_edges,), _check.SCALAR, device)
    if len(clip) != 2 or not min(clip) >= 0:
        raise ValueError(f"{op}: clip must be two distances >= 0, got {clip}")
    if not (floor >= 0.0 and math.isfinite(floor)):
        raise ValueError(f"{op}: floor must be finite and >= 0, got {floor}")
    low, high = clip
    edges = (child_start, exponent_E2, advantage_E2, weight_E)
    loss, stats, _, _ = _forward(p_E, q_N, *edges, low, high)
    noise = torch.zeros_like(stats[0])
    if floor > 0.0:
        # bounds that are wider by the floor cut the others
        wide = 1.0 - (1.0 - low) * math.exp(-floor), (1.0 + high) * math.exp(floor) - 1.0
        beyond = _forward(p_E.detach(), q_N.detach(), *edges, *wide)[1]
        noise = (stats[1:3] - beyond[1:3]).sum()
    return RatioLoss(loss, RatioStats(*[*stats.unbind(), noise]))


def _cpp(p_E: Tensor, q_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *edges, low, high = rest
    outputs = _fake(p_E, q_N)
    _dispatch.native().ratio_loss(p_E, q_N, *edges, low, high, *outputs)
    return outputs


def _cuda(p_E: Tensor, q_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *edges, low, high = rest
    outputs = _fake(p_E, q_N)
    inputs = (value.contiguous() for value in (p_E, q_N, *edges))
    _dispatch.cuda().ratio_loss(*inputs, low, high, *outputs, *_dispatch.stream(p_E))
    return outputs


def _triton(p_E: Tensor, q_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *edges, low, high = rest
    outputs = _fake(p_E, q_N)
    inputs = (value.contiguous() for value in (p_E, q_N, *edges))
    _dispatch.triton_kernels("ratio_loss").ratio_loss_fwd(*inputs, low, high, *outputs)
    return outputs


def _reference(p_E: Tensor, q_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *edges, low, high = rest
    inputs: Any = (p_E, q_N, *edges, (low, high))
    loss, stats = reference.ratio_loss(*inputs)
    grads = reference.ratio_loss_backward(*inputs)
    return loss, torch.stack(stats[:_COUNTED]), *grads


def _fake(p_E: Tensor, q_N: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        p_E.new_empty(()),
        p_E.new_empty(_COUNTED),
        p_E.new_empty(len(p_E)),
        p_E.new_empty(len(q_N)),
    )


_forward = _dispatch.define(
    "ratio_loss(Tensor p, Tensor q, Tensor child_start, Tensor exponent, Tensor advantage,"
    " Tensor weight, float low, float high) -> (Tensor, Tensor, Tensor, Tensor)",
    {"cuda": _cuda, "triton": _triton, "cpp": _cpp, "reference": _reference},
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    _, stats, grad_p_E, grad_q_N = output
    ctx.mark_non_differentiable(stats, grad_p_E, grad_q_N)
    ctx.save_for_backward(grad_p_E, grad_q_N)


def _autograd(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_p_E, grad_q_N = ctx.saved_tensors
    return (grad_loss * grad_p_E, grad_loss * grad_q_N, *[None] * 6)


_dispatch.register_autograd("ratio_loss", _autograd, _setup_context)


def _build(
    counts: tuple[int, ...] = (2, 0, 6, 1),
    scale: float = 1e-2,
    clip: tuple[float, float] = (1e-2, 2e-2),
    scalar: torch.dtype = torch.float32,
    floor: float = 0.0,
) -> testing.Inputs:
    num_edges = sum(counts)
    k_E = 2.0 + testing.normal((num_edges,), torch.float64, 0).abs()
    # every third edge is pruned, the others have a reward of either sign or of both
    weight_E = torch.tensor([1.0, 0.5, 0.0]).to(scalar)[torch.arange(num_edges) % 3]
    advantage_E2 = testing.normal((num_edges, 2), scalar, 1).clamp(min=0.0)
    return {
        "p_E": scale * testing.normal((num_edges,), seed=2),
        "q_N": (scale * testing.normal((len(counts),), seed=3)).square(),
        "child_start": testing.child_starts(counts),
        "exponent_E2": torch.stack((k_E, k_E.square() / 2), dim=1),
        "advantage_E2": advantage_E2,
        "weight_E": weight_E,
        "clip": clip,
        **({"floor": floor} if floor else {}),
    }


INFINITE = (float("inf"), float("inf"))

SPEC = testing.OpSpec(
    name="ratio_loss",
    op=ratio_loss,
    reference=reference.ratio_loss,
    build=_build,
    cases=(
        testing.Case("edges on both sides of both bounds", {"counts": (4,) * 40 + (0, 7)}),
        testing.Case("no clip", {"clip": INFINITE}),
        testing.Case("a noise floor as wide as the clip", {"counts": (4,) * 40, "floor": 1e-2}),
        testing.Case("a noise floor without a clip", {"clip": INFINITE, "floor": 1e-2}),
        testing.Case("clip of BranchGRPO, ratios near 1", {"clip": (1e-5, 1e-5), "scale": 1e-5}),
        testing.Case("on policy: the ratio is exactly 1", {"scale": 0.0}),
        testing.Case("float64 advantages and weights", {"scalar": torch.float64}),
        testing.Case("one edge", {"counts": (1,)}),
        testing.Case("no edges", {"counts": (0, 0)}),
        testing.Case("no nodes", {"counts": ()}),
    ),
    num_bytes=lambda inputs: testing.num_bytes(*inputs.values(), inputs["p_E"], inputs["q_N"]),
    differentiable=("p_E", "q_N"),
    large={"counts": (4,) * 1000},
)
