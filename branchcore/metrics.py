"""What an iteration reports: rewards, their spread, ratios, clipping, work. One device sync."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from branchcore.credit import Floats, pooled_std
from branchcore.gradient import Statistics
from branchcore.leaf_weights import LeafWeight
from branchcore.rewards import component_weights
from branchcore.stages import Batch

ZERO_STD = 1e-6


def iteration_metrics(
    batches: Sequence[Batch], total: Statistics, reward_weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Returns the metrics of one iteration.

    Args:
        batches: of all rounds.
        total: statistics of all updates; read here, the iteration's only sync besides the rewards.
        reward_weights: per component, for the total reward.

    Returns:
        `reward` (weighted sum), `reward/<name>` means, `reward_std/<name>` mean std within a
        prompt, `zero_std_share` of (prompt, component) groups without spread, `ratio_dev_mean`,
        `ratio_dev_max` of |ratio - 1|, `clip_share` of trained edges, `loss`, `kl`, and the counts
        `leaves`, `edges`, `parents`, `model_calls`. Where branches may be stopped, `stopped_share`
        of the planned leaves; the others are what `leaves` counts, and rewards and their spread are
        means weighted by `Batch.leaf_weight`: plain means of survivors would be too good. They are
        NaN if no leaf is left.
    """
    names = batches[0].scores.names
    values, mean = _known(batches)
    weight = component_weights(names, reward_weights)
    spread = np.concatenate([_spread(b) for b in batches])
    spread = spread if len(spread) else np.full((1, len(names)), np.nan)
    planned = sum(len(b.scores.values) for b in batches)
    stopped = any(b.leaf_weight is not None for b in batches)
    ratio = torch.stack([t.double() for t in (*total.ratio, total.loss, total.kl)]).tolist()
    numbers = dict(zip((*total.ratio._fields, "loss", "kl"), ratio, strict=True))
    edges = max(numbers["edges"], 1.0)
    metrics = {"reward": float(mean(values @ weight))}
    metrics |= {f"reward/{n}": float(v) for n, v in zip(names, mean(values), strict=True)}
    metrics |= {f"reward_std/{n}": float(v) for n, v in zip(names, spread.mean(0), strict=True)}
    return metrics | {
        "zero_std_share": float((spread < ZERO_STD).mean()),
        "ratio_dev_mean": numbers["sum_abs_dev"] / edges,
        "ratio_dev_max": numbers["max_abs_dev"],
        "clip_share": (numbers["clipped_low"] + numbers["clipped_high"]) / edges,
        "loss": numbers["loss"],
        "kl": numbers["kl"],
        "leaves": len(values),
        **({"stopped_share": 1.0 - len(values) / planned} if stopped else {}),
        "edges": int(numbers["edges"]),
        "parents": total.parents,
        "model_calls": sum(b.forest.calls for b in batches),
    }


def _known(batches: Sequence[Batch]) -> tuple[Floats, Callable[[Floats], Floats]]:
    """Returns the (n, R) rewards of leaves that have any, and the mean over these leaves."""
    values = np.concatenate([b.scores.values for b in batches])
    if all(b.leaf_weight is None for b in batches):
        return values, lambda x: x.mean(0)
    weight = np.concatenate([_weight(b.leaf_weight, len(b.scores.values)) for b in batches])
    there = weight > 0.0
    if not there.any():
        return values[there], lambda x: np.full(x.shape[1:], np.nan)
    return values[there], lambda x: weight[there] @ x / weight.sum()


def _weight(leaf_weight: LeafWeight, count: int) -> Floats:
    return np.ones(count) if leaf_weight is None else leaf_weight


def _spread(batch: Batch) -> Floats:
    """(prompts, R) std of the rewards within each prompt, of those that have leaves left."""
    plan, weight = batch.forest.plan, batch.leaf_weight
    owner, values = plan.prompt[plan.leaf], batch.scores.values
    if weight is None:
        return np.stack([values[owner == p].std(0) for p in range(plan.num_prompts)])
    left = [p for p in range(plan.num_prompts) if weight[owner == p].any()]
    spread = [pooled_std(values[owner == p], 0, weight[owner == p]) for p in left]
    return np.reshape(spread, (len(left), values.shape[1]))


def bar_text(metrics: Mapping[str, float]) -> str:
    """Returns what the progress bar shows of an iteration."""
    parts = [f"{k[7:]} {v:.3g}" for k, v in metrics.items() if k.startswith("reward/")]
    return ", ".join(
        [
            *parts,
            f"ratio dev {metrics['ratio_dev_max']:.1e}",
            f"clip {metrics['clip_share']:.0%}",
            f"zero-std {metrics['zero_std_share']:.0%}",
        ]
    )
