"""What the seams share: a host's step as one row, its fused squared miss, its layouts checked.

Every host's log-probability is a function of q = mean((y - mean)^2), y the next state:

    SDE   -q / (2 s^2) - log s - log(2 pi) / 2        (DanceGRPO: without the constants)
    CPS   -q

q is `ops.sde_log_prob` of the step with s = 1 / sqrt(2 pi), whose constants cancel: that is -pi q.
So q keeps its fp32 digits whatever s is, 0 included, has the same bits in a batch of any size, and
equal model outputs give a ratio of exactly 1. (The kernels add the constants in float64; the fp32
reference of a checkout that is not built leaves an error of 2e-8 in q.)
Letters: B samples, D latent elements.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from branchcore import ops
from branchcore.noise import NO_STREAM, Noise
from branchcore.reference import RatioLoss
from branchcore.reference.branch_step import HALF_LOG_2PI
from branchcore.reference.edges import wide
from branchcore.steps import Row, euler

Generators = torch.Generator | Sequence[torch.Generator] | None
_UNIT = 1.0 / math.sqrt(2.0 * math.pi)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def host(name: str, version: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Marks a function as a host's, so that a call of another version says so.

    Args:
        name: the host.
        version: commit whose signature it has.
    """

    def mark(function: Callable[_P, _R]) -> Callable[_P, _R]:
        known = inspect.signature(function).parameters
        places = sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in known.values())
        op = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            unknown = [repr(key) for key in kwargs if key not in known]
            if unknown or len(args) > places:
                got = ", ".join(unknown) or f"{len(args)} positional arguments"
                raise TypeError(
                    f"{op}: arguments must be those of {name} {version}, ({', '.join(known)}), "
                    f"got {got}; try leaving out what that version does not know"
                )
            return function(*args, **kwargs)

        return call

    return mark


def field(op: str, holder: object, name: str) -> Any:
    """Returns an attribute that a host's object must have."""
    if not hasattr(holder, name):
        raise ValueError(
            f"{op}: {type(holder).__name__} must have the field {name}, got none; "
            "try the version of the host that this file names"
        )
    return getattr(holder, name)


def chosen(op: str, name: str, value: object, known: Sequence[str]) -> None:
    """Checks a host's option against those that are known."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")


def states(op: str, **named: Tensor) -> list[Tensor]:
    """Checks a host's (B, ...) states, all like the first, and returns them as (B, D).

    Half precision other than bf16 becomes fp32, and what goes with fp64 states fp64.
    """
    (lead, first), *others = named.items()
    if first.dim() < 2 or not first.is_floating_point():
        raise ValueError(
            f"{op}: {lead} must be floats (B, ...), got {first.dtype} {tuple(first.shape)}"
        )
    if first.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: {lead} must not require a gradient, only the model's output may; "
            f"try {lead}.detach()"
        )
    for name, value in others:
        if value.shape != first.shape:
            raise ValueError(
                f"{op}: {name} must have the shape of {lead}, {tuple(first.shape)}, "
                f"got {tuple(value.shape)}"
            )
    dtype = wide(first.dtype)
    kept = (torch.bfloat16, torch.float32) if dtype == torch.float32 else (dtype,)
    flat = (value.reshape(len(value), -1) for value in named.values())
    return [value if value.dtype in kept else value.to(dtype) for value in flat]


def single(value: Tensor) -> Tensor:
    """Returns fp32 as the hosts cast it; fp64 stays, for tests."""
    return value if value.dtype == torch.float64 else value.float()


def per_sample(op: str, like: Tensor, name: str, **vectors: Tensor) -> None:
    """Checks that vectors of numbers are (B,) like the first."""
    if like.dim() != 1:
        raise ValueError(f"{op}: {name} must be (B,), one per sample, got {tuple(like.shape)}")
    for other, value in vectors.items():
        if value.shape != like.shape:
            raise ValueError(
                f"{op}: {other} must be ({len(like)},) like {name}, got {tuple(value.shape)}"
            )


def levels(op: str, sigmas: Tensor, index: Any) -> tuple[float, float, float]:
    """Returns sigma here, sigma next and the schedule's second sigma, as floats.

    Args:
        op: whose error it is.
        sigmas: (T + 1,) schedule; read by the host, so one on a GPU costs a copy.
        index: step, 0 <= index < T; an int or a tensor of one.
    """
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"{op}: sigmas must be (T + 1,), T > 0, got {tuple(sigmas.shape)}")
    step, table = int(index), sigmas.tolist()
    if not 0 <= step < len(table) - 1:
        raise ValueError(f"{op}: index must be in [0, {len(table) - 1}), got {step}")
    falling(op, table[step], table[step + 1])
    return table[step], table[step + 1], table[1]


def falling(op: str, sigma: float, after: float) -> None:
    """Checks one step of a schedule."""
    if not 1.0 >= sigma > after >= 0.0:
        raise ValueError(
            f"{op}: sigmas must fall inside [0, 1], got {sigma:.6g} before {after:.6g}; try a "
            "flow-matching schedule, not inverted, not of timesteps"
        )


def rows(steps: Sequence[Row], latents_BD: Tensor) -> Tensor:
    """Returns (B, 4) fp64 rows; one step serves the whole batch."""
    table = [(row.a, row.b, row.c, row.s) for row in steps]
    rows_B4 = torch.tensor(table, dtype=torch.float64, device=latents_BD.device)
    return rows_B4.expand(len(latents_BD), 4).contiguous()


def child(x_BD: Tensor, v_BD: Tensor, rows_B4: Tensor, noise: Noise | None = None) -> Tensor:
    """Returns the next states, (B, D): the means without noise, else with draws by their names."""
    if noise is None:
        rows_B4 = torch.cat((rows_B4[:, :3], torch.zeros_like(rows_B4[:, 3:])), dim=1)
        noise = Noise(
            torch.zeros(3, dtype=torch.int64, device=x_BD.device),
            torch.full((len(x_BD), 3), NO_STREAM, dtype=torch.int32, device=x_BD.device),
            torch.zeros((len(x_BD), 2), dtype=torch.float64, device=x_BD.device),
        )
    return ops.branch_step(x_BD, v_BD, rows_B4, _starts(x_BD), noise).y_MD


def drawn(
    mean_BD: Tensor, rows_B4: Tensor, shape: Sequence[int], generator: Generators = None
) -> Tensor:
    """Returns means + s eps, (B, D), eps from torch's generator in the host's shape and order."""
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, Sequence):
        if len(generator) != len(mean_BD):
            raise ValueError(
                f"generator must be one or {len(mean_BD)}, one per latent, got {len(generator)}"
            )
        parts = [_normal((1, *shape[1:]), mean_BD, source) for source in generator]
        eps = torch.cat(parts)
    else:
        eps = _normal(shape, mean_BD, generator)
    return mean_BD + rows_B4[:, 3:].to(mean_BD.dtype) * eps.reshape(mean_BD.shape)


def _normal(shape: Sequence[int], like: Tensor, source: torch.Generator | None) -> Tensor:
    device = like.device if source is None else source.device
    eps = torch.randn(tuple(shape), generator=source, dtype=like.dtype, device=device)
    return eps.to(like.device)


def next_states(
    x_BD: Tensor,
    v_BD: Tensor,
    rows_B4: Tensor,
    shape: Sequence[int],
    noise: Noise | None,
    generator: Generators = None,
) -> Tensor:
    """Returns drawn states, (B, D): fused with named noise, else with torch's generator."""
    if noise is not None:
        return child(x_BD, v_BD, rows_B4, noise)
    return drawn(child(x_BD, v_BD, rows_B4), rows_B4, shape, generator)


def read_out(x_BD: Tensor, v_BD: Tensor, sigma: float) -> Tensor:
    """Returns x - sigma v, (B, D), the hosts' `pred_original_sample`."""
    return child(x_BD, v_BD, rows([euler((), sigma, 0.0)], x_BD))


def miss(
    x_BD: Tensor, v_BD: Tensor, y_BD: Tensor, rows_B4: Tensor, h_BD: Tensor | None = None
) -> Tensor:
    """Returns (B,) mean((y - a x - b v - c h)^2); only v has a gradient."""
    unit = torch.full_like(rows_B4[:, 3:], _UNIT)
    unit_B4 = torch.cat((rows_B4[:, :3], unit), dim=1)
    y_BD = y_BD.detach().to(wide(x_BD.dtype))
    return ops.sde_log_prob(x_BD, v_BD, y_BD, unit_B4, _starts(x_BD), h_BD) / -math.pi


def distance(v_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Returns (B,) mean((v - other)^2), with a gradient to v."""
    return ops.edge_dots(v_BD, other_BD).q_N


def gaussian(miss_B: Tensor, rows_B4: Tensor, *, constants: bool = True) -> Tensor:
    """Returns (B,) log-probabilities per latent element; 0 where s = 0."""
    s_B = rows_B4[:, 3]
    safe_B = torch.where(s_B > 0.0, s_B, 1.0)
    value_B = -miss_B.double() / (2.0 * safe_B.square())
    if constants:
        value_B = value_B - safe_B.log() - HALF_LOG_2PI
    return torch.where(s_B > 0.0, value_B, 0.0).to(miss_B.dtype)


def clipped(
    log_ratio_B: Tensor,
    advantage_B: Tensor,
    clip_range: float,
    adv_clip_max: float,
    weight_B: Tensor | None = None,
) -> RatioLoss:
    """Returns the batch mean of max(-A r, -A clip(r)), with A bounded by adv_clip_max.

    Args:
        log_ratio_B: (B,) log r, differentiable.
        advantage_B: (B,).
        clip_range: one distance for both sides.
        adv_clip_max: bound on |A|.
        weight_B: (B,) weights of the terms; None = 1 each.
    """
    size, device = len(log_ratio_B), log_ratio_B.device
    bounded_B = advantage_B.detach().to(log_ratio_B.dtype).clamp(-adv_clip_max, adv_clip_max)
    linear_2 = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    weight_B = torch.ones_like(bounded_B) if weight_B is None else weight_B.detach()
    return ops.ratio_loss(
        log_ratio_B,
        torch.zeros_like(bounded_B),
        _starts(log_ratio_B),
        linear_2.expand(size, 2).contiguous(),
        torch.stack((bounded_B.clamp(min=0.0), (-bounded_B).clamp(min=0.0)), dim=1),
        weight_B.to(torch.float64) / max(size, 1),
        (clip_range, clip_range),
    )


def _starts(like_B: Tensor) -> Tensor:
    return torch.arange(len(like_B) + 1, device=like_B.device)
