"""Exponential moving average of a module's weights, and its loan to the module."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Ema:
    """Averages a module's weights after every optimizer iteration.

    Args:
        module: the trained module.
        decay: weight of the old average, in [0, 1]; may be set anew before an update.
        starts_as_copy: the average starts as the module is now (a policy that lags behind); False:
            as it is at the first update.
    """

    def __init__(self, module: nn.Module, decay: float, *, starts_as_copy: bool = False) -> None:
        self.module, self.decay = module, decay
        self.average = AveragedModel(module, multi_avg_fn=self._mix)
        self.average.n_averaged.fill_(int(starts_as_copy))

    def _mix(self, averages: Any, weights: Any, count: Any) -> None:
        get_ema_multi_avg_fn(self.decay)(averages, weights, count)

    def update(self) -> None:
        """Takes the module's weights in."""
        self.average.update_parameters(self.module)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the averaged weights under the module's own names."""
        return dict(self.average.module.state_dict())

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restores the average as it was after so many updates."""
        self.average.module.load_state_dict(dict(tensors))
        self.average.n_averaged.fill_(updates)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Puts the averaged weights into the module for the time of the block."""
        averages = self.average.module.parameters()
        pairs = list(zip(self.module.parameters(), averages, strict=True))
        trained = [p.detach().clone() for p, _ in pairs]
        with torch.no_grad():
            for p, average in pairs:
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(pairs, trained, strict=True):
                    p.copy_(value)
