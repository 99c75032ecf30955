"""fp32 masters of 16-bit weights: what the optimizer moves, while the module has them rounded.

A step of 1e-5 of a weight is lost in bf16, whose neighbours are 4e-3 apart; in the master it adds
up. Gradients add up in fp32 too, whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SHORT = (torch.bfloat16, torch.float16)


class Masters:
    """A module's trainable parameters as the optimizer sees them; fp32 ones stand for themselves.

    Args:
        module: its trainable parameters are taken once, in the module's order.
    """

    def __init__(self, module: nn.Module) -> None:
        self._rounded: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        """Of 16-bit parameters, by name; none where all are wider. A checkpoint fills them."""
        self.parameters: list[Tensor] = []
        """The copies of 16-bit parameters, and all others themselves."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.dtype in _SHORT:
                self._rounded[name] = parameter
                self.copies[name] = parameter.detach().float()
            if parameter.requires_grad:
                self.parameters.append(self.copies.get(name, parameter))

    @contextmanager
    def receiving(self) -> Generator[None]:
        """Within the block, gradients of 16-bit parameters add up on their masters instead."""
        hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, parameter in self._rounded.items():
            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(_onto(self.copies[name])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the masters into the module."""
        for name, parameter in self._rounded.items():
            parameter.copy_(self.copies[name])


def _onto(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)

    return move
