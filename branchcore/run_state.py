"""What a run must keep to go on bit for bit, and where each part of it comes from and goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from branchcore import checkpoint
from branchcore.checkpoint import Checkpoints
from branchcore.learner import Learner
from branchcore.rewards import Reward
from branchcore.rewards.state import check_state, load_state, state_of


class RunState(NamedTuple):
    """The parts of a run that change, as checkpoints hold them."""

    learner: Learner
    reward: Reward

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the groups of tensors beside the optimizer's, which has none before a step."""
        averages = {name: average.tensors() for name, average in self.learner.averages.items()}
        masters = {"masters": self.learner.masters.copies} if self.learner.masters.copies else {}
        return {"model": checkpoint.trained(self.learner.model.module), **averages, **masters}

    def save(self, to: Checkpoints, iteration: int, facts: Mapping[str, Any]) -> Path:
        """Starts a checkpoint of this state and these facts; see `Checkpoints.save`."""
        tensors = {
            **self.tensors(),
            "optimizer": checkpoint.optimizer_tensors(self.learner.optimizer),
        }
        rewards = to.gather(state_of(self.reward))
        return to.save(
            iteration, tensors, {**facts, "pruning": self.learner.ledger.state(), "reward": rewards}
        )

    def load(self, source: Checkpoints, folder: Path, state: Mapping[str, Any]) -> None:
        """Takes everything from a checkpoint whose facts have been checked.

        Args:
            source: of the run.
            folder: the checkpoint.
            state: its state.json.

        Raises:
            ValueError: damaged, or of another model; no tensor has changed.
        """
        where = folder / "state.json"
        checkpoint.require(where, state, pruning=dict, reward=list)
        of_reward = check_state(self.reward, state["reward"], source.rank, where)
        self.learner.ledger.load(state["pruning"], where)
        held = source.names(folder, "optimizer")
        moments = checkpoint.moments(self.learner.masters.parameters, held)
        source.load_into(folder, {**self.tensors(), "optimizer": moments})
        checkpoint.load_optimizer(self.learner.optimizer, moments)
        load_state(self.reward, of_reward)
        for average in self.learner.averages.values():
            average.updates = int(state["iteration"])
