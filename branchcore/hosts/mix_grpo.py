"""MixGRPO, Tencent-Hunyuan/MixGRPO at d270daf: `fastvideo/utils/sampling_utils.py`.

Seam: `flow_grpo_step` and `dance_grpo_step`, with the host's arguments (its spelling `determistic`
included) and results; `one_step_log_prob`, what `grpo_one_step` does after the transformer. The
loss is `dance_grpo.policy_loss` with `kl_coeff`.

Differs from the host:
- model outputs in bf16 are multiplied in fp32; the noise that torch draws is fp32, where
  `flow_grpo_step` draws it in the model's dtype. `noise` names draws instead.
- `sqrt(sigma'^2 - s^2)` of CPS is its closed form, sigma' cos(level pi / 2).
As there, `dance_grpo_step` leaves the constants out of the log-probability, `flow_grpo_step` does
not, and CPS is -(y - mean)^2 without 1 / (2 s^2): its clip ranges mean something else.

Not supported: gradients to latents; `dpm_apply_strategy` "all", whose training log-probabilities
are about fresh noise; noise level 0. `dpm_step` of the tail is `steps.dpmpp` in the engine.
The host's licence is for academic use; this file has formulas, none of its code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from branchcore import steps
from branchcore.hosts import _seam
from branchcore.noise import Noise

VERSION = "d270daf"
CPS_LEVEL = 0.8
_host = _seam.host("MixGRPO", VERSION)
_KINDS = ("sde", "cps")


@_host
def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: Any,
    prev_sample: Tensor | None,
    generator: _seam.Generators = None,
    determistic: bool = False,
    sde_type: str = "sde",
    noise_level: float | None = None,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes one step of Flow-SDE or CPS and scores it.

    Args:
        model_output: (B, ...) fp32 or bf16, velocity; the only differentiable input.
        latents: (B, ...) fp32, the state.
        eta: noise level of "sde" where `noise_level` is None; 0.7.
        sigmas: (T + 1,) schedule.
        index: step, an int or a tensor of one.
        prev_sample: (B, ...) the next state to score; None draws it.
        generator: torch's, for the draw; with prev_sample an error, as there.
        determistic: take Euler's step instead; the score is about the SDE's mean, as there.
        sde_type: "sde" or "cps".
        noise_level: None = eta, for "cps" 0.8.
        noise: branchcore's own: names of B draws, instead of torch's generator.

    Returns:
        prev_sample, pred_original_sample, log_prob (B,), prev_sample_mean, std () of the step.
    """
    op = "mix_grpo.flow_grpo_step"
    if prev_sample is not None and generator is not None:
        raise ValueError(f"{op}: generator must be None where prev_sample is given, got both")
    x, v = _seam.states(op, latents=latents, model_output=model_output)
    sigma, after, second = _seam.levels(op, sigmas, index)
    level = _level(op, sde_type, eta, noise_level)
    kind = steps.flow_sde(level, second) if sde_type == "sde" else steps.cps(level)
    rows = _seam.rows([kind((), sigma, after)], x)
    mean = _seam.child(x, v, rows)
    if determistic:
        y = _seam.child(x, v, _seam.rows([steps.euler((), sigma, after)], x))
    elif prev_sample is None and noise is None:
        y = _seam.drawn(mean, rows, latents.shape, generator)
    elif prev_sample is None:
        y = _seam.next_states(x, v, rows, latents.shape, noise)
    else:
        y = _seam.states(op, latents=latents, prev_sample=prev_sample)[1]
    shape = latents.shape
    original, std = _seam.read_out(x, v, sigma).view(shape), rows[0, 3].to(mean.dtype)
    return y.view(shape), original, _score(x, v, y, rows, sde_type, True), mean.view(shape), std


@_host
def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: Any,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    sde_type: str = "sde",
    noise_level: float | None = None,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor, ...]:
    """Takes one step of Dance-SDE or CPS and scores it; without the solver there is no noise.

    Args:
        model_output: (B, ...) fp32 or bf16, velocity; the only differentiable input.
        latents: (B, ...) fp32, the state.
        eta: diffusion of "sde" where `noise_level` is None.
        sigmas: (T + 1,) schedule.
        index: step, an int or a tensor of one.
        prev_sample: (B, ...) the next state to score; None draws it.
        grpo: False gives the mean only.
        sde_solver: False draws nothing: "sde" takes Euler's mean, "cps" its own.
        sde_type: "sde" or "cps".
        noise_level: None = eta, for "cps" 0.8.
        noise: branchcore's own: names of B draws, instead of torch's generator.

    Returns:
        prev_sample, pred_original_sample, log_prob (B,); with grpo False the mean and
        pred_original_sample.
    """
    op = "mix_grpo.dance_grpo_step"
    x, v = _seam.states(op, latents=latents, model_output=model_output)
    sigma, after, _ = _seam.levels(op, sigmas, index)
    rows = _dance_rows(op, x, eta, (sigma, after), sde_solver, sde_type, noise_level)
    original = _seam.read_out(x, v, sigma).view(latents.shape)
    if not grpo:
        return _seam.child(x, v, rows).view(latents.shape), original
    if prev_sample is not None:
        y = _seam.states(op, latents=latents, prev_sample=prev_sample)[1]
    elif sde_solver:
        y = _seam.next_states(x, v, rows, latents.shape, noise)
    else:
        y = _seam.child(x, v, rows)
    return y.view(latents.shape), original, _score(x, v, y, rows, sde_type, False)


def one_step_log_prob(
    args: Any, pred: Tensor, latents: Tensor, pre_latents: Tensor, i: Any, sigma_schedule: Tensor
) -> Tensor:
    """Scores stored states as `grpo_one_step` does once the transformer has given `pred`.

    Args:
        args: the host's; reads dpm_algorithm_type, flow_grpo_sampling, sde_type, noise_level, eta.
        pred: (B, ...) velocity, differentiable.
        latents: (B, ...) states before the step.
        pre_latents: (B, ...) states after it, as the rollout stored them.
        i: step.
        sigma_schedule: (T + 1,).

    Returns:
        (B,) log-probabilities, equal in every bit to the step's on the same tensors.
    """
    op = "mix_grpo.one_step_log_prob"
    names = ("dpm_algorithm_type", "flow_grpo_sampling", "sde_type", "noise_level", "eta")
    solver, flow, sde_type, noise_level, eta = (_seam.field(op, args, name) for name in names)
    if solver != "null" and _seam.field(op, args, "dpm_apply_strategy") != "post":
        raise NotImplementedError(
            f"{op}: dpm_apply_strategy must be post, got {args.dpm_apply_strategy!r}; the host "
            "scores fresh noise there"
        )
    x, v, y = _seam.states(op, latents=latents, pred=pred, pre_latents=pre_latents)
    sigma, after, second = _seam.levels(op, sigma_schedule, i)
    if flow and sde_type == "sde":
        level = _level(op, sde_type, eta, noise_level)
        rows = _seam.rows([steps.flow_sde(level, second)((), sigma, after)], x)
    else:
        rows = _dance_rows(op, x, eta, (sigma, after), True, sde_type, noise_level)
    return _score(x, v, y, rows, sde_type, bool(flow))


def _level(op: str, sde_type: str, eta: float, noise_level: float | None) -> float:
    _seam.chosen(op, "sde_type", sde_type, _KINDS)
    default = eta if sde_type == "sde" else CPS_LEVEL
    return default if noise_level is None else noise_level


def _dance_rows(
    op: str,
    x: Tensor,
    eta: float,
    levels: tuple[float, float],
    sde_solver: bool,
    sde_type: str,
    noise_level: float | None,
) -> Tensor:
    level = _level(op, sde_type, eta, noise_level)
    kind = steps.dance_sde(level) if sde_type == "sde" else steps.cps(level)
    row = kind((), *levels)
    if sde_type == "sde" and not sde_solver:
        row = steps.euler((), *levels)._replace(s=row.s)
    return _seam.rows([row], x)


def _score(x: Tensor, v: Tensor, y: Tensor, rows: Tensor, sde_type: str, constants: bool) -> Tensor:
    missed = _seam.miss(x, v, y, rows)
    return -missed if sde_type == "cps" else _seam.gaussian(missed, rows, constants=constants)


__all__ = ["VERSION", "dance_grpo_step", "flow_grpo_step", "one_step_log_prob"]
