"""What an iteration reports: rewards, their spread, ratios, clipping, work. One device sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from branchcore.gradient import Statistics
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
        `leaves`, `masked_leaves`, `edges`, `parents`, `model_calls`. Masked leaves, those without a
        score, are in no mean or spread, and not among `leaves`.
    """
    names = batches[0].scores.names
    values = np.concatenate([b.scores.values for b in batches])
    masked = np.concatenate([_masked(b) for b in batches])
    values = values[~masked]
    weight = component_weights(names, reward_weights)
    spread = np.concatenate([_spread(b) for b in batches])
    ratio = torch.stack([t.double() for t in (*total.ratio, total.loss, total.kl)]).tolist()
    numbers = dict(zip((*total.ratio._fields, "loss", "kl"), ratio, strict=True))
    edges = max(numbers["edges"], 1.0)
    metrics = {"reward": float((values @ weight).mean())}
    metrics |= {f"reward/{n}": float(v) for n, v in zip(names, values.mean(0), strict=True)}
    metrics |= {f"reward_std/{n}": float(v) for n, v in zip(names, spread.mean(0), strict=True)}
    return metrics | {
        "zero_std_share": float((spread < ZERO_STD).mean()),
        "ratio_dev_mean": numbers["sum_abs_dev"] / edges,
        "ratio_dev_max": numbers["max_abs_dev"],
        "clip_share": (numbers["clipped_low"] + numbers["clipped_high"]) / edges,
        "loss": numbers["loss"],
        "kl": numbers["kl"],
        "leaves": len(values),
        "masked_leaves": int(masked.sum()),
        "edges": int(numbers["edges"]),
        "parents": total.parents,
        "model_calls": sum(b.forest.calls for b in batches),
    }


def _spread(batch: Batch) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(prompts, R) std of the rewards within each prompt that has any."""
    plan, there = batch.forest.plan, ~_masked(batch)
    owner, values = plan.prompt[plan.leaf][there], batch.scores.values[there]
    return np.stack([values[owner == p].std(0) for p in np.unique(owner)])


def _masked(batch: Batch) -> NDArray[np.bool_]:
    """(L,) leaves without a score."""
    masked = batch.scores.masked
    return np.zeros(len(batch.scores.values), dtype=bool) if masked is None else masked


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
