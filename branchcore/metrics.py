"""What an iteration reports: rewards, their spread, ratios, clipping, work. One device sync."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from branchcore.credit import Floats, pooled_std
from branchcore.gradient import Statistics
from branchcore.leaf_weights import LeafWeight
from branchcore.reference import RatioStats
from branchcore.rewards import component_weights
from branchcore.stages import Batch

ZERO_STD = 1e-6
_OF_THE_MACHINE = ("cpu_s", "wall_s", "mfu", "memory_gb", "rss_gb")
_GROUPS_OF_THE_MACHINE = ("time", "skew", "slowest", "plan")


_COUNTS = (
    "leaves", "masked", "planned", "stops", "weight", "reward", "groups", "zero_std", "parents",
    "model_calls", "loss", "kl", *RatioStats._fields,
)  # fmt: skip


def iteration_metrics(
    batches: Sequence[Batch],
    total: Statistics,
    reward_weights: Mapping[str, float] | None,
    names: Sequence[str] | None = None,
    stack: Callable[[Floats], Floats] = lambda sums: sums[None],
    floor: float | None = None,
) -> dict[str, float]:
    """Returns the metrics of one iteration.

    Args:
        batches: of all rounds of this process.
        total: statistics of all updates; read here, the iteration's only sync besides the rewards.
        reward_weights: per component, for the total reward.
        names: components of the reward; None = those of the first batch.
        stack: returns the (processes, n) sums of all processes for the (n,) of this one.
        floor: noise floor of the log ratio, if it is known.

    Returns:
        `reward` (weighted sum), `reward/<name>` means, `reward_std/<name>` mean std within a
        prompt, `zero_std_share` of (prompt, component) groups without spread, `ratio_dev_mean`,
        `ratio_dev_max` of |ratio - 1|, `clip_share` of trained edges, where there is a floor
        `clip_noise_share` of the clipped ones that are beyond the clip range by less than it (0 if
        none is clipped), `loss`, `kl`, and the counts
        `leaves`, `masked_leaves`, `edges`, `parents`, `model_calls`. Where branches may be stopped,
        `stopped_share` of the planned leaves. Leaves that are neither stopped nor masked, which is
        without a score, are what `leaves` counts, and rewards and their spread are means weighted
        by `Batch.leaf_weight`: plain means of survivors would be too good. They are NaN if no leaf
        is left.
    """
    names = batches[0].scores.names if names is None else names
    rows = stack(_sums(batches, total, component_weights(names, reward_weights)))
    of_all = rows.sum(0)
    counts = dict(zip(_COUNTS, of_all.tolist(), strict=False))
    means, spreads = np.split(of_all[len(_COUNTS) :], 2)
    weight, groups = counts["weight"] or np.nan, counts["groups"] or np.nan
    edges, clipped = max(counts["edges"], 1.0), counts["clipped_low"] + counts["clipped_high"]
    noise = {"clip_noise_share": counts["clipped_noise"] / max(clipped, 1.0)}
    metrics = {"reward": counts["reward"] / weight}
    metrics |= {f"reward/{n}": float(v) for n, v in zip(names, means / weight, strict=True)}
    metrics |= {f"reward_std/{n}": float(v) for n, v in zip(names, spreads / groups, strict=True)}
    gone = 1.0 - (counts["leaves"] + counts["masked"]) / max(counts["planned"], 1.0)
    return metrics | {
        "zero_std_share": counts["zero_std"] / groups / len(names),
        "ratio_dev_mean": counts["sum_abs_dev"] / edges,
        "ratio_dev_max": float(rows[:, _COUNTS.index("max_abs_dev")].max()),
        "clip_share": clipped / edges,
        **({} if floor is None else noise),
        "loss": counts["loss"],
        "kl": counts["kl"],
        "leaves": int(counts["leaves"]),
        "masked_leaves": int(counts["masked"]),
        **({"stopped_share": gone} if counts["stops"] else {}),
        "edges": int(counts["edges"]),
        "parents": int(counts["parents"]),
        "model_calls": int(counts["model_calls"]),
    }


def _sums(batches: Sequence[Batch], total: Statistics, reward_weight_R: Floats) -> Floats:
    """(n,) what adds up over batches and processes: `_COUNTS`, then R rewards and R stds."""
    width = len(reward_weight_R)
    rewards, spreads = np.zeros(width), np.zeros(width)
    values = torch.stack([t.double() for t in (*total.ratio, total.loss, total.kl)]).tolist()
    counts = dict.fromkeys(_COUNTS, 0.0)
    counts |= dict(zip((*total.ratio._fields, "loss", "kl"), values, strict=True))
    counts["parents"] = float(total.parents)
    for batch in batches:
        weight_L = _weight(batch.leaf_weight, len(batch.scores.values))
        there, spread = weight_L > 0.0, _spread(batch)
        found, weight = batch.scores.values[there], weight_L[there]
        rewards += weight @ found
        spreads += spread.sum(0)
        counts["reward"] += float(weight @ (found @ reward_weight_R))
        counts["weight"] += float(weight_L.sum())
        counts["leaves"] += len(found)
        counts["planned"] += len(weight_L)
        masked = batch.scores.masked
        counts["masked"] += 0 if masked is None else int(masked.sum())
        # without stopping masked leaves weigh 0, the others 1
        weighed = masked is None or bool((weight_L != 1.0 - masked).any())
        counts["stops"] += batch.leaf_weight is not None and weighed
        counts["groups"] += len(spread)
        counts["zero_std"] += int((spread < ZERO_STD).sum())
        counts["model_calls"] += batch.forest.calls
    return np.concatenate([[counts[name] for name in _COUNTS], rewards, spreads])


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


def repeatable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a repeated run logs too: a row without times, memory and what comes of them."""
    return {
        name: value
        for name, value in row.items()
        if name not in _OF_THE_MACHINE and name.split("/")[0] not in _GROUPS_OF_THE_MACHINE
    }
