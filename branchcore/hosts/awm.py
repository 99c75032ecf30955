"""AWM, scxue/advantage_weighted_matching at 12b1397: `scripts/train_sd3_awm.py`, of Flow-GRPO.

Seam: `log_prob_awm`, what `compute_log_prob_awm` does after the transformer; `velocity_kl`, its
terms against the reference and the EMA policy; `policy_loss`, the lines from the ratio to the loss.

Differs from the host:
- squares are fp32, added in float64; there everything is float64. All-float64 input computes in it.
- with `beta` 0 the script stops on an undefined `log_prob_ref`; here the KL is the caller's to add.

Not supported: gradients to latents or noise. The whole method is `recipes.awm` of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from branchcore.hosts import _seam
from branchcore.reference import RatioLoss

VERSION = "12b1397"
WEIGHTINGS = ("Uniform", "t", "t**2", "huber", "ghuber")
KL_WEIGHTS = ("Uniform", "ELBO")
LOSS_TYPES = ("sum_first", "exp_first")
FLOOR = 1e-10
ELBO_LEVEL, ELBO_LAST = 0.7, 0.99
_host = _seam.host("AWM", VERSION)


@_host
def log_prob_awm(
    model_output: Tensor,
    timestep: Tensor,
    clean_latents: Tensor,
    random_noise: Tensor,
    weighting: str = "Uniform",
    ghuber_power: float = 0.25,
) -> Tensor:
    """Scores velocities by how far they are from the flow-matching target, -w(t) mean (v - u)^2.

    Args:
        model_output: (N, ...) velocities at (1 - t) clean + t noise; the differentiable input.
        timestep: (N,) or (N, 1, ...) times t in [0, 1].
        clean_latents: (N, ...) images.
        random_noise: (N, ...); u = noise - clean.
        weighting: w = 1, t, t^2; or -t (sqrt(m + 1e-10) - 1e-5), or with h = ghuber_power
            -t/h ((m + 1e-10)^h - 1e-10^h), of m = mean (v - u)^2.
        ghuber_power: h of "ghuber".

    Returns:
        (N,) fp32.

    Source: Advantage Weighted Matching, arXiv 2509.25050, and its repository's weightings.
    """
    op = "awm.log_prob_awm"
    _seam.chosen(op, "weighting", weighting, WEIGHTINGS)
    clean, v, noise = _seam.states(
        op, clean_latents=clean_latents, model_output=model_output, random_noise=random_noise
    )
    if timestep.numel() != len(clean):
        raise ValueError(
            f"{op}: timestep must be ({len(clean)},), one per sample, got {tuple(timestep.shape)}"
        )
    sums = clean.new_tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(len(clean), 4)
    # noise - clean - v is what the row y = x + v misses
    m, t = _seam.miss(clean, v, noise, sums), timestep.reshape(-1).to(clean.device)
    t = t.to(m.dtype)
    if weighting == "huber":
        return -((m + FLOOR).sqrt() - FLOOR**0.5) * t
    if weighting == "ghuber":
        return -((m + FLOOR) ** ghuber_power - FLOOR**ghuber_power) * t / ghuber_power
    return -m * {"Uniform": torch.ones_like(t), "t": t, "t**2": t.square()}[weighting]


@_host
def velocity_kl(
    model_output: Tensor,
    other: Tensor,
    kl_weight: str = "Uniform",
    timestep: Tensor | None = None,
) -> Tensor:
    """Returns the mean of |v - v_other|^2 over elements and samples, the host's `kl_loss`.

    Args:
        model_output: (N, ...) velocities, differentiable.
        other: (N, ...) of the reference or the EMA policy.
        kl_weight: "Uniform", or "ELBO": each over 2 g^2, g = 0.7 sqrt(t / (1 - min(t, 0.99))).
        timestep: (N,) or (N, 1, ...) times, for "ELBO".
    """
    op = "awm.velocity_kl"
    _seam.chosen(op, "kl_weight", kl_weight, KL_WEIGHTS)
    base, v = _seam.states(op, other=other.detach(), model_output=model_output)
    kl = _seam.distance(v, base)
    if kl_weight == "Uniform":
        return kl.mean()
    if timestep is None or timestep.numel() != len(base):
        raise ValueError(f"{op}: timestep must be ({len(base)},) for kl_weight ELBO")
    t = timestep.reshape(-1).to(kl)
    g2 = ELBO_LEVEL**2 * t / (1.0 - t.clamp(0.0, ELBO_LAST))
    return (kl / (2.0 * g2)).mean()


@_host
def policy_loss(
    config: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor
) -> RatioLoss:
    """Returns the clipped loss of the matching ratio.

    Args:
        config: the host's; reads train.adv_clip_max, .advantage_max, .clip_range and .loss_type.
        log_probs: (T, B) of the T train times of each sample, differentiable.
        old_log_probs: (T, B).
        advantages: (B,).

    Returns:
        `RatioLoss` of the mean loss, over B ratios of mean log-probabilities ("sum_first") or T B
        ratios ("exp_first").
    """
    op = "awm.policy_loss"
    train = _seam.field(op, config, "train")
    names = ("adv_clip_max", "advantage_max", "clip_range", "loss_type")
    bound, top, clip, loss_type = (_seam.field(op, train, name) for name in names)
    _seam.chosen(op, "config.train.loss_type", loss_type, LOSS_TYPES)
    if log_probs.dim() != 2 or old_log_probs.shape != log_probs.shape:
        raise ValueError(
            f"{op}: log_probs and old_log_probs must be (T, B), got {tuple(log_probs.shape)} and "
            f"{tuple(old_log_probs.shape)}"
        )
    _seam.per_sample(op, log_probs[0], "log_probs[0]", advantages=advantages)
    advantages = advantages.clamp(-bound, bound)
    if top is not None:
        advantages = advantages / bound * top
    log_ratio = log_probs - old_log_probs.detach()
    if loss_type == "sum_first":
        return _seam.clipped(log_ratio.mean(0), advantages, clip, float("inf"))
    every = advantages.expand(log_ratio.shape).reshape(-1)
    return _seam.clipped(log_ratio.reshape(-1), every, clip, float("inf"))


__all__ = ["VERSION", "log_prob_awm", "policy_loss", "velocity_kl"]
