"""Several rewards as one: a mapping of names to rewards is a reward itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from branchcore.rewards.failures import NoMapping
from branchcore.rewards.scores import Partial, Reward
from branchcore.rewards.state import stateful


class Rewards:
    """Calls several rewards, one after the other, on the same images.

    A reward with one component gives it under the reward's name here; one with several gives
    `name/component` each. Weights are not kept here: they are
    `TrainerConfig(reward_weights={"hps": 0.7, "clip": 1.4})`, or the array that a recipe's credit
    takes, because recipes differ in what they weight (rewards, advantages or losses).

    Args:
        rewards: by name.

    Raises:
        ValueError: there is none, or a name contains '/'.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)
        if not self.rewards or any(not name or "/" in name for name in self.rewards):
            raise ValueError(
                f"Rewards: rewards must have names without '/', got {list(self.rewards)}"
            )

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the components of all rewards; a leaf that one of them masks is masked in all.

        Raises:
            TypeError: a reward returned something else than a mapping with components.
        """
        result: dict[str, Tensor] = {}
        masked, because = np.zeros(len(images), dtype=bool), ""
        for name, reward in self.rewards.items():
            part = reward(images, prompts)
            if not isinstance(part, Mapping) or not part:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise NoMapping(
                    f"Rewards: {name} must return a mapping of components, "
                    f"got {type(part).__name__}"
                )
            if isinstance(part, Partial):
                masked, because = masked | part.masked, part.because
            single = len(part) == 1
            result |= {name if single else f"{name}/{k}": value for k, value in part.items()}
        return Partial(result, masked, because) if because else result

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the rewards that have one, by name."""
        held = {name: stateful(reward) for name, reward in self.rewards.items()}
        return {name: part.state_dict() for name, part in held.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives the rewards their states back.

        Raises:
            ValueError: others than these have one.
        """
        held = {name: stateful(reward) for name, reward in self.rewards.items()}
        parts = {name: part for name, part in held.items() if part is not None}
        if set(parts) != set(state):
            raise ValueError(
                f"Rewards: state must be of the rewards {sorted(parts)}, got {sorted(state)}"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
