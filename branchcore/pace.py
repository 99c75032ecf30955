"""Keeps the processes of a run in step: where weights are sharded, all make the same calls.

A process that has fewer rounds, calls or passes than another makes up for them with calls of one
row and weight 0. All numbers are agreed before what they are about, never in its middle. Errors
are agreed where all processes have made the same calls; an error elsewhere ends its process, and
with it the others (`Ranks.collect`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from branchcore.distributed import Ranks
from branchcore.idle import idle_calls, idle_passes
from branchcore.model import Model, VelocityModel
from branchcore.parallel import Parallel
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig


class Pace:
    """Counts of this process beside those of the others.

    Args:
        ranks: of the run.
        parallel: how weights are spread.
        model: the policy.
        prompts: the first one serves calls without a row of their own.
        recipe: the method.
        device: of the model.
    """

    def __init__(
        self,
        ranks: Ranks,
        parallel: Parallel,
        model: Model,
        prompts: Sequence[str],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.ranks, self.parallel, self.model = ranks, parallel, model
        self.prompts, self.recipe, self.device = list(prompts[:1]), recipe, device
        self.dtype = torch.float32
        """Of the states."""

    def view(self) -> VelocityModel:
        """Returns the model with some prompt."""
        return self.model.with_prompts(self.prompts)

    @property
    def in_step(self) -> bool:
        """Weights are gathered in every round: all processes must go through it together."""
        lags = self.recipe.sampler_decay is not None
        return self.parallel.lockstep or (self.parallel.sharded and lags)

    def missing_rounds(self, mine: int) -> int:
        """Returns how many rounds of other processes this one has to go along with."""
        return self.ranks.most([mine])[0] - mine if self.in_step else 0

    def missing_calls(self, mine: int) -> int:
        """Returns the calls of a round that others make beyond those of this process."""
        return self.ranks.most([mine])[0] - mine if self.parallel.lockstep else 0

    @contextmanager
    def calling(self, missing: int) -> Generator[None]:
        """A block of calls after which this process makes so many more, without a gradient.

        It makes them too where velocities are not finite, which is known after the last call.
        """
        try:
            yield
        except FloatingPointError:
            self._make_up(missing)
            raise
        self._make_up(missing)

    def _make_up(self, calls: int) -> None:
        if calls:
            idle_calls(self.view(), calls, self.device, self.dtype)

    def passes(self, mine: int) -> int:
        """Returns the passes of every process; makes them all itself if this one has none."""
        if not self.parallel.lockstep:
            return mine
        most = self.ranks.most([mine])[0]
        if not mine:
            reference = self.recipe.objective.compares
            idle_passes(self.view(), most, self.device, self.dtype, reference=reference)
        return most if mine else 0

    def zero_pass(self) -> None:
        """Makes one forward and backward of weight 0, which ends the passes of an update."""
        idle_passes(self.view(), 1, self.device, self.dtype)


def check_spread(parallel: Parallel, config: TrainerConfig, ranks: Ranks) -> None:
    """Raises ValueError for settings that several processes, or sharded weights, exclude."""
    tries = config.reward_attempts * (config.reward_timeout or 0.0)
    if not ranks.alone and tries >= ranks.timeout_s:
        raise ValueError(
            "Trainer: reward_attempts * reward_timeout must be below the seconds that processes "
            f"wait for each other, {ranks.timeout_s:g}, got {tries:g}; try a larger --rank-timeout"
        )
    whole = "where weights are gathered for every call"
    wrong = {
        f"overlap_rewards must be False {whole}": parallel.lockstep and config.overlap_rewards,
        f"prune_stop must be left out {whole}": parallel.lockstep and bool(config.prune.stop),
    }
    for rule, broken in wrong.items():
        if broken:
            raise ValueError(f"Trainer: {rule}, got {config}; try reshard=False")
    if parallel.sharded and config.prune.measure:
        raise ValueError(
            f"Trainer: prune_measure must be 0 where weights are sharded, got "
            f"{config.prune.measure}; gradients of single parents are not apart there"
        )
