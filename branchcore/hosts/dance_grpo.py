"""DanceGRPO, XueZeyue/DanceGRPO at 22b85ef: `fastvideo/train_grpo_flux.py`.

Seam: `flux_step`, with the host's arguments and results; `one_step_log_prob`, what `grpo_one_step`
does after the transformer; `policy_loss`, the lines from the ratio to the loss.

Differs from the host:
- model outputs in bf16 are multiplied in fp32; there `dsigma * model_output` rounds to bf16.
- the noise that torch draws is fp32 whatever the model's dtype; `noise` names draws instead.
As there, the log-probability lacks `-log s - log(2 pi) / 2`: the statement that subtracts them is
split over two lines and has no effect. They cancel in every ratio.

Not supported: gradients to latents; `grpo=True` with eta 0, where the host divides 0 by 0; the
Hunyuan, SD and Qwen scripts, whose loops differ (the step is the same).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from branchcore import steps
from branchcore.hosts import _seam
from branchcore.noise import Noise
from branchcore.reference import RatioLoss

VERSION = "22b85ef"
_host = _seam.host("DanceGRPO", VERSION)


@_host
def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: Any,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor, ...]:
    """Takes one step of Dance-SDE and scores it.

    Args:
        model_output: (B, ...) fp32 or bf16, velocity; the only differentiable input.
        latents: (B, ...) fp32, the state.
        eta: diffusion, 0.3 for FLUX.
        sigmas: (T + 1,) schedule.
        index: step, an int or a tensor of one.
        prev_sample: (B, ...) the next state to score; None draws it.
        grpo: False gives the mean only.
        sde_solver: False takes Euler's mean and keeps the noise.
        noise: branchcore's own: names of B draws, instead of torch's generator.

    Returns:
        prev_sample (B, ...), pred_original_sample (B, ...) = x - sigma v, log_prob (B,) in nats per
        latent element without constants; with grpo False the mean and pred_original_sample.

    Source: DanceGRPO, arXiv 2505.07818, `flux_step`.
    """
    op = "dance_grpo.flux_step"
    x, v = _seam.states(op, latents=latents, model_output=model_output)
    sigma, after, _ = _seam.levels(op, sigmas, index)
    original = _seam.read_out(x, v, sigma).view(latents.shape)
    if not grpo:
        rows = _rows(x, eta, sigma, after, sde_solver) if eta else _euler_rows(x, sigma, after)
        return _seam.child(x, v, rows).view(latents.shape), original
    rows = _rows(x, eta, sigma, after, sde_solver)
    if prev_sample is None:
        y = _seam.next_states(x, v, rows, latents.shape, noise)
    else:
        y = _seam.states(op, latents=latents, prev_sample=prev_sample)[1]
    sample = y.view(latents.shape) if prev_sample is None else prev_sample
    return sample, original, _seam.gaussian(_seam.miss(x, v, y, rows), rows, constants=False)


def one_step_log_prob(
    args: Any, pred: Tensor, latents: Tensor, pre_latents: Tensor, i: Any, sigma_schedule: Tensor
) -> Tensor:
    """Scores stored states as `grpo_one_step` does once the transformer has given `pred`.

    One fused pass forward and one backward; nothing else of the step is computed.

    Args:
        args: the host's; `eta` is read.
        pred: (B, ...) velocity, differentiable.
        latents: (B, ...) states before the step.
        pre_latents: (B, ...) states after it, as the rollout stored them.
        i: step.
        sigma_schedule: (T + 1,).

    Returns:
        (B,) log-probabilities, equal in every bit to `flux_step`'s on the same tensors.
    """
    op = "dance_grpo.one_step_log_prob"
    x, v, y = _seam.states(op, latents=latents, pred=pred, pre_latents=pre_latents)
    sigma, after, _ = _seam.levels(op, sigma_schedule, i)
    rows = _rows(x, _seam.field(op, args, "eta"), sigma, after, True)
    return _seam.gaussian(_seam.miss(x, v, y, rows), rows, constants=False)


def policy_loss(
    new_log_probs: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float,
    kl_coeff: float = 0.0,
) -> RatioLoss:
    """Returns the clipped loss; the caller divides by accumulation and trained steps, as there.

    Args:
        new_log_probs: (B,) differentiable.
        log_probs: (B,) of the rollout.
        advantages: (B,).
        clip_range: 1e-4 in DanceGRPO and MixGRPO, 1e-3 in BranchGRPO.
        adv_clip_max: bound on |advantage|, 5.
        kl_coeff: weight of half the squared log ratio, MixGRPO's; 0 elsewhere.

    Returns:
        `RatioLoss` of the mean loss and the statistics of its ratios.
    """
    op = "dance_grpo.policy_loss"
    _seam.per_sample(op, new_log_probs, "new_log_probs", log_probs=log_probs, advantages=advantages)
    log_ratio = new_log_probs - log_probs.detach()
    result = _seam.clipped(log_ratio, advantages, clip_range, adv_clip_max)
    if not kl_coeff:
        return result
    return RatioLoss(result.loss + kl_coeff * 0.5 * log_ratio.square().mean(), result.stats)


def _euler_rows(x: Tensor, sigma: float, after: float) -> Tensor:
    """Returns (B, 4) rows of the ODE."""
    return _seam.rows([steps.euler((), sigma, after)], x)


def _rows(x: Tensor, eta: float, sigma: float, after: float, sde_solver: bool) -> Tensor:
    row = steps.dance_sde(eta)((), sigma, after)
    return _seam.rows([row if sde_solver else steps.euler((), sigma, after)._replace(s=row.s)], x)


__all__ = ["VERSION", "flux_step", "one_step_log_prob", "policy_loss"]
