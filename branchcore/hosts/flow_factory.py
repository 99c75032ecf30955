"""Flow-Factory, X-GenGroup/Flow-Factory at 316aaa0: `FlowMatchEulerDiscreteSDEScheduler.step`.

Seam: `step(scheduler, ...)`, the method's arguments and results with the scheduler in front. The
advantage processor is in `flow_factory_advantage`.

Differs from the host:
- the log-probability of a step without noise is 0; there 0 / 0 gives NaN ("Flow-SDE" and
  "Dance-SDE" at noise level 0, at steps outside `sde_steps` or while `is_eval`).
- a step's sigmas are read in float64; there `1 - sigma` and `1 / sigma` round in fp32.
- `return_dict=True` returns `StepOutput`, with the fields of the host's `SDESchedulerOutput`.
As there, `std_dev_t` of "Flow-SDE" is g, not g sqrt(dt), and "CPS" is -(y - mean)^2.

Not supported: gradients to latents; UniPC's scheduler; schedules that rise (`invert_sigmas`);
`stochastic_sampling`; integer timesteps, which the host takes for indices with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from branchcore import steps
from branchcore.hosts import _seam
from branchcore.noise import Noise
from branchcore.steps import Row

VERSION = "316aaa0"
KINDS = ("Flow-SDE", "Dance-SDE", "CPS", "ODE")
KEYS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")


class Scheduler(Protocol):
    """What is read of the host's scheduler."""

    sigmas: Tensor
    timesteps: Tensor
    dynamics_type: str
    is_eval: bool

    def index_for_timestep(self, timestep: Any) -> int:
        """Returns the step of a timestep."""
        ...

    def get_noise_level_for_sigma(self, sigma: Any) -> Any:
        """Returns the noise level at a sigma or several: 0 outside the trained steps."""
        ...


class StepOutput(NamedTuple):
    """Fields of the host's `SDESchedulerOutput`; None where not asked for."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None


@_seam.host("Flow-Factory", VERSION)
def step(
    scheduler: Scheduler,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: _seam.Generators = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = KEYS,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
    *,
    noise: Noise | None = None,
) -> StepOutput | tuple[Tensor | None, ...]:
    """Takes one step from every sample's own timestep and scores it.

    Args:
        scheduler: the host's; see `Scheduler`.
        noise_pred: (B, ...) velocity; the only differentiable input.
        timestep: a float, () or (B,), in the scheduler's timesteps.
        latents: (B, ...) states.
        next_latents: (B, ...) the next states to score; None draws them.
        timestep_next: like timestep; None = the scheduler's next. Given, sigma = timestep / 1000.
        generator: torch's, one or one per sample, for the draw.
        noise_level: a number or (B,); None asks the scheduler.
        compute_log_prob: False saves it and returns None.
        return_dict: False returns the tuple next_latents, next_latents_mean, noise_pred, log_prob,
            std_dev_t, dt.
        return_kwargs: which fields of `StepOutput` to fill.
        dynamics_type: "Flow-SDE", "Dance-SDE", "CPS" or "ODE"; None = the scheduler's.
        sigma_max: what stands for sigma 1 inside Flow-SDE's root; None = the second sigma.
        noise: branchcore's own: names of B draws, instead of torch's generator.

    Returns:
        Latents (B, ...), log_prob (B,) fp32, std_dev_t and dt (S, 1, ...) with S = B or 1.
    """
    op = "flow_factory.step"
    _check_scheduler(op, scheduler)
    for key in return_kwargs:
        _seam.chosen(op, "return_kwargs", key, KEYS)
    kind = dynamics_type or scheduler.dynamics_type
    _seam.chosen(op, "dynamics_type", kind, KINDS)
    pairs = _pairs(op, scheduler, timestep, timestep_next, len(latents))
    noise_levels = _noise_levels(op, scheduler, noise_level, kind, pairs, len(latents))
    second = float(scheduler.sigmas[1]) if not sigma_max else float(sigma_max)
    moves = _moves(kind, pairs, noise_levels, second)
    x, v = _seam.states(op, latents=_seam.single(latents), noise_pred=_seam.single(noise_pred))
    rows = _seam.rows(moves, x)
    mean = _seam.child(x, v, rows)
    if next_latents is not None:
        y = _seam.states(op, latents=latents, next_latents=next_latents)[1]
    elif noise is not None:
        y = _seam.child(x, v, rows, noise)
    else:
        y = mean if kind == "ODE" else _seam.drawn(mean, rows, latents.shape, generator)
    log_prob = _log_prob(x, v, y, rows, kind) if compute_log_prob else None
    std, dt = _std_and_dt(kind, moves, pairs, latents)
    shape = latents.shape
    found = (y.view(shape), mean.view(shape), _seam.single(noise_pred), log_prob, std, dt)
    if not return_dict:
        return found
    names = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    filled: dict[str, Tensor | None] = dict(zip(names, found, strict=True))
    return StepOutput(**{key: filled[key] for key in return_kwargs})


def _check_scheduler(op: str, scheduler: Any) -> None:
    for name in ("sigmas", "timesteps", "dynamics_type", "is_eval", "index_for_timestep"):
        _seam.field(op, scheduler, name)
    _seam.field(op, scheduler, "get_noise_level_for_sigma")
    config = getattr(scheduler, "config", None)
    for name in ("stochastic_sampling", "invert_sigmas", "solver_order"):
        if getattr(config, name, None):
            raise NotImplementedError(
                f"{op}: scheduler.config.{name} must be unset, got {getattr(config, name)!r}; "
                "try the host's own step"
            )


def _pairs(
    op: str,
    scheduler: Scheduler,
    timestep: float | Tensor,
    timestep_next: float | Tensor | None,
    size: int,
) -> list[tuple[float, float]]:
    times = _numbers(op, "timestep", timestep, size)
    if timestep_next is None:
        whole = isinstance(timestep, Tensor) and not timestep.is_floating_point()
        if whole or isinstance(timestep, int):
            raise NotImplementedError(
                f"{op}: timestep must be a float from scheduler.timesteps, got {timestep!r}; "
                "try scheduler.timesteps[i]"
            )
        given, table = torch.as_tensor(timestep).reshape(-1), scheduler.sigmas.tolist()
        where = [int(scheduler.index_for_timestep(t)) for t in given]
        pairs = [(table[i], table[i + 1]) for i in where]
    else:
        after = _numbers(op, "timestep_next", timestep_next, size)
        many = range(max(len(times), len(after)))
        pairs = [(times[i % len(times)] / 1000, after[i % len(after)] / 1000) for i in many]
    for pair in pairs:
        _seam.falling(op, *pair)
    return pairs


def _numbers(op: str, name: str, value: Any, size: int) -> list[float]:
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.dim() > 1 or numbers.numel() not in (1, size):
        raise ValueError(f"{op}: {name} must be a number or ({size},), got {tuple(numbers.shape)}")
    return numbers.reshape(-1).tolist()


def _noise_levels(
    op: str,
    scheduler: Scheduler,
    noise_level: float | Tensor | None,
    kind: str,
    pairs: Sequence[tuple[float, float]],
    size: int,
) -> list[float]:
    if scheduler.is_eval or kind == "ODE":
        return [0.0]
    if noise_level is None:
        sigmas = torch.tensor([sigma for sigma, _ in pairs], dtype=scheduler.sigmas.dtype)
        noise_level = scheduler.get_noise_level_for_sigma(sigmas.to(scheduler.sigmas.device))
    return _numbers(op, "noise_level", noise_level, size)


def _moves(
    kind: str, pairs: Sequence[tuple[float, float]], noise_levels: Sequence[float], second: float
) -> list[Row]:
    many = max(len(pairs), len(noise_levels))
    moves: list[Row] = []
    for i in range(many):
        level, pair = noise_levels[i % len(noise_levels)], pairs[i % len(pairs)]
        moves.append(_step(kind, level, second)((), *pair))
    return moves


def _step(kind: str, level: float, second: float) -> steps.Step:
    if kind == "ODE" or level == 0.0:
        return steps.euler
    if kind == "CPS":
        return steps.cps(level)
    return steps.dance_sde(level) if kind == "Dance-SDE" else steps.flow_sde(level, second)


def _log_prob(x: Tensor, v: Tensor, y: Tensor, rows: Tensor, kind: str) -> Tensor:
    missed = _seam.miss(x, v, y, rows)
    return -missed if kind == "CPS" else _seam.gaussian(missed, rows)


def _std_and_dt(
    kind: str, moves: Sequence[Row], pairs: Sequence[tuple[float, float]], latents: Tensor
) -> tuple[Tensor, Tensor]:
    dt = [after - sigma for sigma, after in pairs]
    std = [
        row.s / (-dt[i % len(dt)]) ** 0.5 if kind == "Flow-SDE" else row.s
        for i, row in enumerate(moves)
    ]
    like: dict[str, Any] = {"dtype": torch.float32, "device": latents.device}
    ones = [1] * (latents.dim() - 1)
    return torch.tensor(std, **like).view(-1, *ones), torch.tensor(dt, **like).view(-1, *ones)
