"""Exponential moving average of a module's trained weights, and its loan to the module."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from branchcore.checkpoint import trained
from branchcore.masters import Masters


class Ema:
    """Averages a module's trainable weights after every optimizer iteration, in fp32 at least.

    What is frozen is not copied: the average of a LoRA costs no second base.

    Args:
        module: the trained module.
        decay: weight of the old average, in [0, 1]; may be set anew before an update.
        starts_as_copy: the average starts as the module is now (a policy that lags behind); False:
            as it is at the first update.
        masters: whose values are averaged where the module has them rounded; None = the module's.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        starts_as_copy: bool = False,
        masters: Masters | None = None,
    ) -> None:
        self.module, self.decay = module, decay
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.sources = self.parameters if masters is None else masters.parameters
        self.averages = [_wide(p).clone() for p in self.sources]
        self.updates = int(starts_as_copy)
        """Weights taken in so far; the first time, the average becomes what it takes in."""

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's weights in."""
        weights = [_wide(p) for p in self.sources]
        if self.updates:
            get_ema_multi_avg_fn(self.decay)(self.averages, weights, self.updates)
        else:
            for average, weight in zip(self.averages, weights, strict=True):
                average.copy_(weight)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """Returns `checkpoint.trained` with the averaged weights, under the module's own names.

        A checkpoint is loaded by filling them; `updates` is to be set then.
        """
        pairs = zip(self.parameters, self.averages, strict=True)
        average = {id(p): value for p, value in pairs}
        state = trained(self.module)
        return {name: average.get(id(value), value.detach()) for name, value in state.items()}

    @contextmanager
    def applied(self) -> Generator[None]:
        """Puts the averaged weights into the module for the time of the block."""
        before = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, average in zip(self.parameters, self.averages, strict=True):
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, before, strict=True):
                    p.copy_(value)


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
