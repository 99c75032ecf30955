"""DiffusionNFT, NVlabs/DiffusionNFT at 24af555: `scripts/train_nft_sd3.py`, of Flow-GRPO.

Seam: `policy_loss`, the lines from the three predictions to the loss, with the script's names; the
same loss is verl-omni's `DiffusionNFTLoss` for `reward_prob=`.

Differs from the host:
- squares are fp32, added in float64, without x0 predictions in memory: each term is one fused
  pass, and one in the backward. The adaptive weight is a float64 mean of fp32 distances, there of
  float64 ones.
As there, a weight of at least 1e-5 divides each term, outside the gradient.

Not supported: gradients to `x0`, `xt` or `old_prediction`; the script's logging terms other than
those returned. The whole method is `recipes.diffusion_nft` of the engine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from branchcore.hosts import _seam

VERSION = "24af555"
SMALLEST_WEIGHT = 1e-5
ADV_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")
_host = _seam.host("DiffusionNFT", VERSION)


class NFTLoss(NamedTuple):
    """The loss and its parts, 0-d."""

    loss: Tensor
    """policy_loss + kl_weight * kl_div_loss."""
    policy_loss: Tensor
    """adv_clip_max / beta * mean(r positive + (1 - r) negative)."""
    kl_div_loss: Tensor
    """mean |v - v_ref|^2; 0 without a reference."""


@_host
def reward_probability(advantages: Tensor, *, adv_clip_max: float, adv_mode: str = "all") -> Tensor:
    """Returns r = clip(A / (2 adv_clip_max) + 1/2, 0, 1), the share of the positive term.

    Args:
        advantages: (B,).
        adv_clip_max: advantages are clipped to it before; 5.
        adv_mode: "all"; "positive_only" and "negative_only" clip the other sign to 0; "one_only"
            takes 1 for positive ones, else 0; "binary" takes the sign.
    """
    _seam.chosen("diffusion_nft.reward_probability", "adv_mode", adv_mode, ADV_MODES)
    low = 0.0 if adv_mode == "positive_only" else -adv_clip_max
    high = 0.0 if adv_mode == "negative_only" else adv_clip_max
    clipped = advantages.clamp(low, high)
    if adv_mode == "one_only":
        clipped = (clipped > 0).to(clipped.dtype)
    if adv_mode == "binary":
        clipped = clipped.sign()
    return (clipped / (2.0 * adv_clip_max) + 0.5).clamp(0.0, 1.0)


@_host
def policy_loss(
    forward_prediction: Tensor,
    old_prediction: Tensor,
    ref_forward_prediction: Tensor | None,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    beta: float,
    adv_clip_max: float,
    kl_weight: float,
) -> NFTLoss:
    """Contrasts v_old + beta D with v_old - beta D, D = v - v_old, as x0 predictions.

    Args:
        forward_prediction: (B, ...) velocities v, differentiable.
        old_prediction: (B, ...) of the policy that sampled.
        ref_forward_prediction: (B, ...) of the frozen policy; None only with kl_weight 0.
        x0: (B, ...) images.
        xt: (B, ...) noisy states at t.
        t: (B,) or (B, 1, ...) times in [0, 1], the script's `t_expanded`.
        r: (B,) from `reward_probability`.
        beta: `config.beta`: 1, or 0.1 for several rewards.
        adv_clip_max: 5.
        kl_weight: `config.train.beta`, 1e-4.

    Source: DiffusionNFT, arXiv 2509.16117.
    """
    op = "diffusion_nft.policy_loss"
    clean, v, old, noisy = _seam.states(
        op, x0=x0, forward_prediction=forward_prediction, old_prediction=old_prediction, xt=xt
    )
    if t.numel() != len(clean) or r.shape != (len(clean),):
        raise ValueError(
            f"{op}: t and r must be ({len(clean)},), one per sample, got {tuple(t.shape)} and "
            f"{tuple(r.shape)}"
        )
    if not beta > 0.0:
        raise ValueError(f"{op}: beta must be positive, got {beta}")
    old, t_B = old.detach(), t.detach().reshape(-1).double()
    total = torch.zeros_like(t_B)
    for sign, share in ((1.0, r), (-1.0, 1.0 - r)):
        total = total + share.detach().double() * _term(clean, v, old, noisy, t_B, sign * beta)
    policy = (adv_clip_max / beta * total.mean()).to(_seam.single(v).dtype)
    kl = torch.zeros_like(policy)
    if ref_forward_prediction is not None:
        _, base = _seam.states(op, x0=x0, ref_forward_prediction=ref_forward_prediction.detach())
        kl = _seam.distance(v, base).mean()
    elif kl_weight:
        raise ValueError(
            f"{op}: ref_forward_prediction must be given for kl_weight {kl_weight:g}, got None"
        )
    return NFTLoss(policy + kl_weight * kl, policy.detach(), kl.detach())


def _term(x0: Tensor, v: Tensor, old: Tensor, xt: Tensor, t_B: Tensor, beta: float) -> Tensor:
    """Returns (B,) mean (x0_hat - x0)^2 / w at v_old + beta D, x0_hat = x_t - t (that)."""
    with torch.no_grad():
        t = t_B[:, None].to(_seam.single(x0).dtype)
        away = xt - t * torch.lerp(_seam.single(old), _seam.single(v), beta) - x0
        weight_B = away.abs().mean(1, dtype=torch.float64).clamp(min=SMALLEST_WEIGHT)
    one, none = torch.ones_like(t_B), torch.zeros_like(t_B)
    rows_B4 = torch.stack((one, t_B * beta, t_B * (1.0 - beta), none), dim=1)
    return _seam.miss(x0, v, xt, rows_B4, old).double() / weight_B


__all__ = ["VERSION", "NFTLoss", "policy_loss", "reward_probability"]
