"""The tensors of one wave, and of the loss on it: what the benchmarks of the noise ops run on.

Letters: N parents, K children of each, M = N K, D latent elements.
"""

from __future__ import annotations

from functools import cached_property

import eager
import torch
from eager import A, B, S
from torch import Tensor

from branchcore import testing
from branchcore.noise import Noise


class Wave:
    """Parents, velocities of two policies, steps, noise, advantages and weights."""

    def __init__(
        self, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.num_parents, self.num_children, self.num_elements = sizes
        num_parents, num_children, num_elements = sizes
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.x, v = normal(num_parents, num_elements), normal(num_parents, num_elements)
        self.v_old = (v + 1e-3 * normal(num_parents, num_elements)).to(dtype)
        self.v = v.to(dtype).requires_grad_()
        counts, num_edges = (num_children,) * num_parents, num_parents * num_children
        row = torch.tensor([[A, B, 0.0, S]], dtype=torch.float64, device=device)
        self.rows = row.repeat(num_edges, 1)
        self.child_start = testing.child_starts(counts).to(device)
        self.noise = Noise(*(part.to(device) for part in testing.draws(counts, ("own",))))
        k = torch.full((num_edges,), B / S, dtype=torch.float64, device=device)
        self.exponent = torch.stack((k, k.square() / 2), dim=1)
        self.advantage = normal(num_edges, 2).clamp(min=0.0)
        self.weight = torch.ones(num_edges, device=device)

    @cached_property
    def grown(self) -> tuple[Tensor, Tensor]:
        """Children that the old policy drew, as a release stores them, and their log-prob."""
        with torch.no_grad():
            return eager.step(self.x, self.v_old, self.num_children)

    @property
    def y(self) -> Tensor:
        return self.grown[0]

    @property
    def log_prob_old(self) -> Tensor:
        return self.grown[1]
