"""What an iteration reports: rewards, their spread, ratios, clipping, work. One device sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from branchcore.gradient import Statistics
from branchcore.rewards import component_weights
from branchcore.stages import Batch

ZERO_STD = 1e-6
_OF_THE_MACHINE = ("cpu_s", "wall_s", "mfu", "memory_gb", "rss_gb")
_GROUPS_OF_THE_MACHINE = ("time", "skew", "slowest")


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
        `leaves`, `edges`, `parents`, `model_calls`.
    """
    names = batches[0].scores.names
    values = np.concatenate([b.scores.values for b in batches])
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
        "edges": int(numbers["edges"]),
        "parents": total.parents,
        "model_calls": sum(b.forest.calls for b in batches),
    }


def _spread(batch: Batch) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(prompts, R) std of the rewards within each prompt."""
    plan = batch.forest.plan
    owner = plan.prompt[plan.leaf]
    return np.stack([batch.scores.values[owner == p].std(0) for p in range(plan.num_prompts)])


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


def repeatable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a repeated run logs too: a row without times, memory and what comes of them."""
    return {
        name: value
        for name, value in row.items()
        if name not in _OF_THE_MACHINE and name.split("/")[0] not in _GROUPS_OF_THE_MACHINE
    }
