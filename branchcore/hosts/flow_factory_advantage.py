"""Flow-Factory's advantage processor, X-GenGroup/Flow-Factory at 3a2a482: `AdvantageProcessor`.

Seam: the processor takes a callable for `aggregation_func`; `weighted_sum` and `gdpo` are two, with
the arguments (processor, samples, rewards, store_to_samples) that it passes.

Differs from the host:
- prompts are grouped by whole numbers; there `unique_id` is gathered as fp32, so that ids that
  differ beyond 24 bits fall into one group ("distributed_k_repeat").
- the std over processes is that of the deviations, in float64; there it is sqrt(E r^2 - (E r)^2) of
  fp32 sums, which loses every digit for rewards far from 0, and fails where the difference is
  negative ("group_contiguous").
- rewards that are equal up to rounding have advantage 0; there the rounding is divided by 1e-6.
- a reward that is NaN or infinite is an error; there it makes its group's advantages NaN.
- metrics are not logged: the host leaves its snapshot empty for callables.

Not supported: other processors than those with `accelerator`, `group_on_same_rank`, `group_size`,
`global_std` and `reward_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from branchcore.credit import Floats, standardize
from branchcore.hosts import _seam
from branchcore.plan import Ints

VERSION = "3a2a482"
SMALLEST_STD = 1e-6
_host = _seam.host("Flow-Factory", VERSION)


class Processor(Protocol):
    """What is read of the host's processor."""

    accelerator: Any
    group_on_same_rank: bool
    group_size: int
    global_std: bool
    reward_weights: Mapping[str, float]


class _Gathered(NamedTuple):
    values_nR: Floats
    group_n: Ints
    weight_R: Floats


@_host
def weighted_sum(
    processor: Processor,
    samples: Sequence[Any],
    rewards: Mapping[str, Tensor],
    store_to_samples: bool = True,
) -> Tensor:
    """Sums the weighted rewards, then standardizes them per prompt: the host's "sum".

    Args:
        processor: the host's; see `Processor`.
        samples: B of this process, with `unique_id` and `extra_kwargs`.
        rewards: (B,) per reward.
        store_to_samples: write sample.extra_kwargs["advantage"].

    Returns:
        (B,) float64 advantages of this process's samples, on the accelerator's device.
    """
    op = "flow_factory_advantage.weighted_sum"
    values_nR, group_n, weight_R = _gathered(op, processor, samples, rewards)
    _, counts = np.unique(group_n, return_counts=True)
    if (counts != processor.group_size).any():
        raise ValueError(
            f"{op}: groups must have group_size={processor.group_size} samples, got {counts}"
        )
    total_n1 = (values_nR @ weight_R)[:, None]
    std = _std(processor, total_n1[:, 0]) if processor.global_std else None
    return _local(processor, samples, _scores(total_n1, group_n, std)[:, 0], store_to_samples)


@_host
def gdpo(
    processor: Processor,
    samples: Sequence[Any],
    rewards: Mapping[str, Tensor],
    store_to_samples: bool = True,
) -> Tensor:
    """Standardizes every reward per prompt, sums them weighted, standardizes over the batch.

    Args and Returns: as `weighted_sum`.
    """
    op = "flow_factory_advantage.gdpo"
    values_nR, group_n, weight_R = _gathered(op, processor, samples, rewards)
    total_n = _scores(values_nR, group_n) @ weight_R
    centred_n = total_n - _mean(processor, total_n)
    return _local(processor, samples, centred_n / _std(processor, total_n), store_to_samples)


def _scores(values_nR: Floats, group_n: Ints, std: float | None = None) -> Floats:
    """Deviations from the group's mean over `std`, None = the group's, at least 1e-6."""
    centred = standardize(values_nR, group_n, eps=0.0, spread=np.ones(values_nR.shape[1]))
    if std is not None:
        return centred / std
    group = np.unique(group_n, return_inverse=True)[1].reshape(-1)
    squares = np.zeros((int(group.max(initial=-1)) + 1, values_nR.shape[1]))
    np.add.at(squares, group, centred**2)
    spread = np.sqrt(squares / np.bincount(group)[:, None])
    return centred / np.maximum(spread, SMALLEST_STD)[group]


def _gathered(
    op: str, processor: Any, samples: Sequence[Any], rewards: Mapping[str, Tensor]
) -> _Gathered:
    for name in Processor.__annotations__:
        _seam.field(op, processor, name)
    if set(rewards) - set(processor.reward_weights) or not rewards:
        raise ValueError(
            f"{op}: rewards must have weights, which are for "
            f"{sorted(processor.reward_weights)}, got {sorted(rewards)}"
        )
    columns: list[Tensor] = []
    for name, value in rewards.items():
        column = torch.as_tensor(value).double().reshape(-1)
        if len(column) != len(samples):
            raise ValueError(
                f"{op}: {name} must be ({len(samples)},), one per sample, got {len(column)}"
            )
        columns.append(column.cpu())
    ids = torch.tensor([int(_seam.field(op, s, "unique_id")) for s in samples], dtype=torch.int64)
    values = torch.stack(columns, dim=1)
    if not processor.group_on_same_rank:
        # two gathers: ids stay integers
        device = processor.accelerator.device
        values = processor.accelerator.gather(values.to(device)).cpu()
        ids = processor.accelerator.gather(ids.to(device)).cpu()
    finite = torch.isfinite(values).all(0)
    if not finite.all():
        bad = [name for name, fine in zip(rewards, finite.tolist(), strict=True) if not fine]
        raise ValueError(f"{op}: rewards must be finite, got NaN or Inf in {', '.join(bad)}")
    weight = np.array([float(processor.reward_weights[name]) for name in rewards])
    return _Gathered(values.numpy(), ids.numpy(), weight)


def _summed(processor: Processor, *numbers: float) -> list[float]:
    """Sums over processes where every process has its own samples only."""
    if not processor.group_on_same_rank:
        return list(numbers)
    parts = torch.tensor(numbers, dtype=torch.float64, device=processor.accelerator.device)
    return processor.accelerator.reduce(parts, reduction="sum").tolist()


def _mean(processor: Processor, values_n: Floats) -> float:
    total, count = _summed(processor, float(values_n.sum()), float(len(values_n)))
    return total / count


def _std(processor: Processor, values_n: Floats) -> float:
    deviation = values_n - _mean(processor, values_n)
    total, count = _summed(processor, float((deviation**2).sum()), float(len(values_n)))
    return max((total / count) ** 0.5, SMALLEST_STD)


def _local(
    processor: Processor, samples: Sequence[Any], advantage_n: Floats, store: bool
) -> Tensor:
    accelerator, values = processor.accelerator, torch.from_numpy(advantage_n)
    if not processor.group_on_same_rank:
        values = values.reshape(accelerator.num_processes, -1)[accelerator.process_index]
    values = values.to(accelerator.device)
    if store:
        for sample, value in zip(samples, values, strict=True):
            sample.extra_kwargs["advantage"] = value
    return values


__all__ = ["VERSION", "Processor", "gdpo", "weighted_sum"]
