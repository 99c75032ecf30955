"""Reward guidance while sampling: a flow model pushed along the gradient of a noisy-state reward.

    v_guided = v - w t / (1 - t) grad_x r(x_t, t, prompt)

is the exact velocity of the data tilted by exp(w r) when r is the log-mean of exp(w r(x0)) given
x_t, over w. Inference only: its gradient with respect to the policy's weights is the policy's own.
Source: Flow-NRG, arXiv 2501.13918, sec. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.credit import Floats
from branchcore.model import VelocityModel

NoisyReward = Callable[[Tensor, Tensor, Tensor], Tensor]


class RewardGuided:
    """A `VelocityModel` with guidance by rewards of noisy states.

    Args:
        model: the policy, its prompts encoded.
        rewards: by name, each `(x (N, *latent), sigma (N,), prompt (N,)) -> (N,)`, differentiable
            in x, trained on noisy states.
        weights: by the same names.
        cap: largest t / (1 - t), which has no limit at pure noise; inf only for schedules that
            start below sigma = 1.

    Raises:
        ValueError: names that differ, or a cap that is not positive.
    """

    def __init__(
        self,
        model: VelocityModel,
        rewards: Mapping[str, NoisyReward],
        weights: Mapping[str, float],
        *,
        cap: float = 10.0,
    ) -> None:
        if not rewards or set(rewards) != set(weights):
            raise ValueError(
                f"RewardGuided: weights must name the rewards {sorted(rewards)}, got "
                f"{sorted(weights)}"
            )
        if not cap > 0.0:
            raise ValueError(f"RewardGuided: cap must be positive, got {cap}")
        self.model, self.rewards, self.weights, self.cap = model, rewards, weights, cap
        self.latent_shape = model.latent_shape

    def announce(
        self, sigma: Tensor, prompt: Tensor, host_sigma: Floats, host_prompt: NDArray[np.integer]
    ) -> None:
        """Passes on what the rollout tells of the next call, to a policy that listens."""
        announce = getattr(self.model, "announce", None)
        if announce is not None:
            announce(sigma, prompt, host_sigma, host_prompt)

    def velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the guided velocity, (N, *latent).

        Raises:
            ValueError: pure noise without a cap, or a reward that is not (N,).
        """
        push = self._reward_gradient(x, sigma, prompt)
        factor = (sigma / (1.0 - sigma)).clamp(max=self.cap)
        if math.isinf(self.cap) and bool((sigma >= 1.0).any()):
            raise ValueError("RewardGuided: cap must be finite at sigma = 1, got inf")
        return self.model.velocity(x, sigma, prompt) - factor.view(-1, *[1] * (x.ndim - 1)) * push

    def reference_velocity(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Returns the frozen base policy's velocity, not guided."""
        return self.model.reference_velocity(x, sigma, prompt)

    def _reward_gradient(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            total = torch.zeros_like(sigma)
            for name, reward in self.rewards.items():
                value = reward(at, sigma, prompt)
                if value.shape != sigma.shape:
                    raise ValueError(
                        f"RewardGuided: {name} must be {tuple(sigma.shape)}, got "
                        f"{tuple(value.shape)}"
                    )
                total = total + self.weights[name] * value
            return torch.autograd.grad(total.sum(), at)[0]
