"""BranchGRPO, Fredreic1849/BranchGRPO at ffc3c90: `fastvideo/train_branchgrpo_flux.py`.

Seam: `flux_step_with_split`, with the host's arguments and results. Training edges are scored with
`one_step_log_prob` here, constants included as the host has them; the loss is
`dance_grpo.policy_loss`.

Differs from the host:
- model outputs in bf16 are multiplied in fp32; there `dsigma * model_output` rounds to bf16.
Its released bugs are kept unless asked otherwise by keywords of ours:
- `stored`: the host scores a child in fp32 and stores it in bf16, so that the ratio is not 1 in
  training (about -1e-3 in early steps). `stored=torch.bfloat16` rounds before scoring.
- `scored="drawn"`: split noise is `split_noise_scale` times too large and scored with the std of
  scale 1. "drawn" scores it with the std that it has.
- the paper's correlated children are `steps` and `recipes.branch_grpo` of the engine.

Not supported: gradients to latents; eta 0; `run_tree_sample_step` and credit, which the engine's
`recipes.branch_grpo` replaces.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from branchcore import steps
from branchcore.hosts import _seam

VERSION = "ffc3c90"
SMALLEST_STD = 1e-8


@_seam.host("BranchGRPO", VERSION)
def flux_step_with_split(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: Any,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    num_splits: int = 1,
    split_noise_scale: float = 1.0,
    *,
    stored: torch.dtype | None = None,
    scored: Literal["released", "drawn"] = "released",
) -> tuple[Tensor, ...]:
    """Takes one step of Dance-SDE to one child or several, and scores them.

    Args:
        model_output: (B, ...) fp32 or bf16, velocity; the only differentiable input.
        latents: (B, ...) fp32, the states of the parents.
        eta: diffusion, 0.3.
        sigmas: (T + 1,) schedule.
        index: step, an int or a tensor of one.
        prev_sample: (B, ...) the child to score; None draws.
        grpo: False gives the mean only.
        sde_solver: False takes Euler's mean and keeps the noise.
        num_splits: K children; more than 1 amplifies their noise.
        split_noise_scale: factor of that noise; 4 in the host's script.
        stored: dtype that children are rounded to before they are scored; None = as drawn.
        scored: with which std amplified children are scored.

    Returns:
        prev_sample (K B, ...) ordered by child, pred_original_sample (K B, ...), log_prob (K B,);
        with grpo False the mean and pred_original_sample, (B, ...).

    Source: BranchGRPO, arXiv 2509.06040, released code.
    """
    op = "branch_grpo.flux_step_with_split"
    _seam.chosen(op, "scored", scored, ("released", "drawn"))
    if num_splits < 1 or not split_noise_scale > 0.0:
        raise ValueError(
            f"{op}: num_splits must be at least 1 and split_noise_scale positive, got "
            f"{num_splits} and {split_noise_scale}"
        )
    x, v = _seam.states(op, latents=latents, model_output=model_output)
    sigma, after, _ = _seam.levels(op, sigmas, index)
    rows, shape = _rows(x, eta, sigma, after, sde_solver), latents.shape
    original = _seam.read_out(x, v, sigma).view(shape)
    if not grpo:
        return _seam.child(x, v, rows).view(shape), original
    if prev_sample is not None:
        y = _seam.states(op, latents=latents, prev_sample=prev_sample)[1]
        return prev_sample, original, _seam.gaussian(_seam.miss(x, v, y, rows), rows)
    count, scale = (num_splits, split_noise_scale) if num_splits > 1 else (1, 1.0)
    grown, wide = (count * shape[0], *shape[1:]), _scaled(rows, scale).repeat(count, 1)
    mean, first = _seam.child(x, v, rows), wide[: len(x)]
    y = torch.cat([_seam.drawn(mean, first, shape) for _ in range(count)])
    y = y if stored is None else y.to(stored)
    rows = wide if scored == "drawn" else rows.repeat(count, 1)
    missed = _seam.miss(x.repeat(count, 1), v.repeat(count, 1), y, rows)
    original = original.repeat(count, *[1] * (len(shape) - 1))
    return y.view(grown), original, _seam.gaussian(missed, rows)


def one_step_log_prob(
    args: Any,
    pred: Tensor,
    latents: Tensor,
    pre_latents: Tensor,
    i: Any,
    sigma_schedule: Tensor,
    *,
    noise_scale: float = 1.0,
) -> Tensor:
    """Scores stored children as the host's training pass does, constants included.

    Args:
        args: the host's; `eta` is read.
        pred: (B, ...) velocity, differentiable.
        latents: (B, ...) parents.
        pre_latents: (B, ...) children, as the rollout stored them.
        i: step of the parents.
        sigma_schedule: (T + 1,).
        noise_scale: `split_noise_scale` for children that were `scored="drawn"` at a split.

    Returns:
        (B,) log-probabilities, equal in every bit to the step's on the same tensors.
    """
    op = "branch_grpo.one_step_log_prob"
    x, v, y = _seam.states(op, latents=latents, pred=pred, pre_latents=pre_latents)
    sigma, after, _ = _seam.levels(op, sigma_schedule, i)
    rows = _scaled(_rows(x, _seam.field(op, args, "eta"), sigma, after, True), noise_scale)
    return _seam.gaussian(_seam.miss(x, v, y, rows), rows)


def _rows(x: Tensor, eta: float, sigma: float, after: float, sde_solver: bool) -> Tensor:
    row = steps.dance_sde(eta)((), sigma, after)
    if not sde_solver:
        row = steps.euler((), sigma, after)._replace(s=row.s)
    return _seam.rows([row._replace(s=max(row.s, SMALLEST_STD))], x)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return torch.cat((rows[:, :3], rows[:, 3:] * scale), dim=1)


__all__ = ["VERSION", "flux_step_with_split", "one_step_log_prob"]
