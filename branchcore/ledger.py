"""What pruning left, saved and added in one iteration, kept pass by pass for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from branchcore.checkpoint import require
from branchcore.coins import Coins
from branchcore.credit import Floats
from branchcore.distributed import Ranks
from branchcore.flops import Work, pass_work
from branchcore.gradient import Anchor
from branchcore.gradient_norms import MOST, Measured, measure
from branchcore.pruning import Draw, Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.pruning_sums import Sums
from branchcore.stages import Batch
from branchcore.trainer_config import TrainerConfig


class Ledger:
    """Draws the edge weights of every pass and books them; books nothing where nothing is pruned.

    Args:
        pruning: of the run.
        config: of the run.
        parameters: on which gradients add up.
        tape: nodes that a round's tape covers where nothing is dropped; None = all.
        ranks: of the run; None = this process alone.
    """

    def __init__(
        self,
        pruning: Pruning,
        config: TrainerConfig,
        parameters: Sequence[Tensor],
        tape: int | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.pruning, self.config, self.ranks = pruning, config, ranks or Ranks()
        self.parameters, self.tape = parameters, tape
        self.sums, self.work, self.measured = Sums(), Work(), Measured()

    def open(self, draw: Draw, iteration: int) -> None:
        """Begins an iteration with its prompts."""
        self.draw, self.iteration = draw, iteration
        first = float(self.ranks.main)  # what all processes know is booked by one
        self.sums = Sums(prompts=first * len(draw.indices), rolled_out=first * len(draw.weight))
        self.work, self.measured = Work(saved=first * draw.spared), Measured()

    def weigh(self, batch: Batch, *, update: int, inner: int, anchor: Anchor) -> Floats:
        """Returns (M,) edge weights of one pass; must come before its gradient.

        Args:
            batch: credited.
            update: which of the plan's updates.
            inner: passes of the iteration before this one.
            anchor: of the pass.

        Raises:
            ValueError: see `Pruning.coins`.
        """
        where = {"iteration": self.iteration, "update": update}
        coins = self.pruning.coins(batch, inner=inner, **where)
        if coins is None:
            return batch.weight
        weight, sums = coins.weights(batch.weight)
        self.sums = self.sums.plus(sums)
        tape = self.tape if inner == 0 else 0
        work = pass_work(batch, weight, self.pruning.recipe, update=update, tape=tape)
        self.work = self.work.plus(work)
        if inner == 0:
            self._first(batch, coins, anchor)
        return weight

    def _first(self, batch: Batch, coins: Coins, anchor: Anchor) -> None:
        """Books what the first pass of a round tells: its rollout, and measured norms."""
        self.work = self.work.plus(Work(spent=float(np.sum(batch.forest.evaluated))))
        every = self.config.prune.measure
        if not every or (self.iteration + 1) % every:
            return
        found = measure(
            batch,
            self.pruning.recipe,
            coins,
            self.parameters,
            seed=self.config.seed,
            iteration=self.iteration,
            most=max(1, MOST // len(self.draw.rounds)),
            anchor=anchor,
            max_batch=self.config.max_batch,
            max_tokens=self.config.max_tokens,
            num_planned=self.draw.planned[0],
        )
        self.measured = self.measured.plus(found)

    def close(self, batches: Sequence[Batch]) -> None:
        """Ends an iteration: remembers what its prompts were worth, and their spread."""
        spread, rewards = self.pruning.spread, self.config.reward_weights
        self.pruning.remember(self.draw.indices, batches, self.ranks)
        spread.remember(spread.moments(batches, self.draw.weight, rewards, self.ranks))
        if self.config.prune == PruningConfig() or self.ranks.alone:
            return
        parts = (self.sums, self.work, self.measured)
        total = self.ranks.sum(np.concatenate([np.array(part) for part in parts])).tolist()
        sizes = [len(part) for part in parts]
        self.sums, total = Sums(*total[: sizes[0]]), total[sizes[0] :]
        self.work, self.measured = Work(*total[: sizes[1]]), Measured(*total[sizes[1] :])

    def state(self) -> dict[str, Any]:
        """Returns what `load` takes, ready for JSON."""
        return self.pruning.state()

    def load(self, state: Mapping[str, Any], where: Path) -> None:
        """Takes a state back.

        Raises:
            ValueError: it is damaged; names `where`.
        """
        require(where, state, prompts=dict, steps=dict, spread=dict)
        self.pruning.load(state, where)

    def metrics(self, flop: float | None) -> dict[str, float]:
        """Returns the iteration's sums, its work, and norms if it measured any.

        Args:
            flop: operations of a forward per row; None = not known.
        """
        if self.config.prune == PruningConfig():
            return {}
        return {**self.sums.metrics(), **self.work.metrics(flop), **self.measured.metrics()}
