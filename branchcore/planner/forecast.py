"""What one iteration will need and take: bytes and seconds of every part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from branchcore.model import Model
from branchcore.models.sizing.live_bytes import CallBytes, measure
from branchcore.models.sizing.memory_need import Need, check_trained, rollout_calls
from branchcore.packing import balanced_chunks
from branchcore.planner.engine import overhead
from branchcore.planner.probe import SECONDS, Probe
from branchcore.planner.times import rounds_of, stage_seconds, taped_nodes
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward
from branchcore.trainer_config import TrainerConfig


class Forecast(NamedTuple):
    """An iteration on one process."""

    phases: Mapping[str, int]
    """Peak bytes of every part."""
    seconds: Mapping[str, float]
    """By stage of `speed.STAGES`."""
    source: str
    """Where the times are from."""

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return max(self.phases.values())

    @property
    def total(self) -> float:
        """Seconds of the whole iteration."""
        return sum(self.seconds.values())

    def metrics(self) -> dict[str, float]:
        """Returns what is logged beside what happened."""
        return {"plan/seconds": self.total, "plan/memory_gb": self.peak / 1e9}


def forecast(
    model: Model,
    prompts: Sequence[str],
    recipe: Recipe,
    config: TrainerConfig,
    *,
    reward: Reward | None = None,
    cost: CallBytes | None = None,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = SECONDS,
) -> Forecast:
    """Forecasts an iteration of these very settings by a probe of the model where it is.

    Args:
        model: as it will run.
        prompts: that it knows.
        recipe: of the run.
        config: of the run.
        reward: called on noise; None = its time is not in the forecast.
        cost: of this model, if `measure` was called before.
        clock: seconds.
        seconds: of the probe at most, but for the call it is in.
    """
    check_trained(model)
    need = Need.of(model, recipe, config, cost or measure(model, prompts[0]))
    probe = Probe(model, prompts, clock=clock, seconds=seconds)
    averages = (config.ema_decay is not None) + need.lags
    speed = probe.speed(*widest(need), reward, tape=tape_rows(need), averages=averages)
    latent, device = model.latent_shape, probe.device
    engine = overhead(latent, recipe, config, device=device, clock=clock, seconds=0.3 * seconds)
    return Forecast(phases(need), stage_seconds(need, speed, engine), speed.source)


def phases(need: Need) -> dict[str, int]:
    """Returns the peak bytes of every part of an iteration of these very settings."""
    rounds = rounds_of(need)
    plan = need.plan(max(rounds))
    return need.phases(plan, len(rounds), need.config.max_batch or len(plan), tape_rows(need))


def tape_rows(need: Need) -> int:
    """Returns the nodes on the tape of the largest round."""
    nodes = need.taped(need.plan(max(rounds_of(need))))
    return len(nodes[: taped_nodes(need)])


def widest(need: Need) -> tuple[int, int]:
    """Returns the rows of the largest model call, and the images of the largest decode."""
    plan = need.plan(max(rounds_of(need)))
    rows = need.config.max_batch or len(plan)
    nodes = need.taped(plan)[: taped_nodes(need)]
    calls = [n for level in rollout_calls(plan, rows, nodes) for n, _ in level.calls]
    for update in range(plan.num_updates):
        left = need.left(plan, update, nodes)
        calls += [hi - lo for lo, hi in balanced_chunks(len(left), rows)]
    images = min(rows, int(plan.leaf.sum()), need.decode_batch or rows)
    return max(calls), images
