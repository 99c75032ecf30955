"""The weights of a run: what trains them, averages them, samples with them and spreads them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch

from branchcore.distributed import Ranks, agreed, was_agreed
from branchcore.ema import Ema
from branchcore.masters import Masters
from branchcore.model import Model
from branchcore.pace import Pace, check_spread
from branchcore.parallel import ParallelConfig, spread
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig
from branchcore.watch import Watch, timed

T = TypeVar("T")
_OUT_OF_STEP = "out_of_step"
"""Marks an error from the middle of calls: no process around it can agree on it any more."""


@agreed
class BadUpdate(FloatingPointError):
    """A velocity, reward or gradient that is not finite, on any process; no weight was changed."""


class Policy:
    """A trained model with its optimizer and averages, on one of the processes of a run.

    Args:
        model: the policy.
        prompts: data set of prompts.
        recipe: the method.
        config: the run.
        ranks: its processes.
        parallel: how weights are spread over them.

    Raises:
        ValueError: nothing is trained, or settings exclude each other.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        recipe: Recipe,
        config: TrainerConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
    ) -> None:
        self.model, self.prompts, self.recipe, self.config = model, list(prompts), recipe, config
        self.ranks = ranks
        if not any(p.requires_grad for p in model.module.parameters()):
            raise ValueError("Trainer: module must have trainable parameters, got none")
        self.device = next(model.module.parameters()).device
        frozen = getattr(model, "frozen", None)
        modules = [model.module, *([] if frozen is None else [frozen])]
        self.parallel = spread(parallel, modules, ranks)
        check_spread(self.parallel, config, ranks)
        self.masters = Masters(model.module)
        self.optimizer = torch.optim.AdamW(
            self.masters.parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        average = partial(Ema, model.module, masters=self.masters)
        self.ema = None if config.ema_decay is None else average(config.ema_decay)
        self.sampler = None if recipe.sampler_decay is None else average(0.0, starts_as_copy=True)
        both = (("ema", self.ema), ("sampler", self.sampler))
        self.averages = {name: kept for name, kept in both if kept is not None}
        self.watch = Watch(self.device, recipe)
        self.pace = Pace(ranks, self.parallel, model, prompts, recipe, self.device)

    def together(self, stage: Callable[[], T]) -> T:
        """Runs a stage that every process goes through on its own; what one raises, all raise.

        Where all go in step, there is no such stage: `in_step` has the places to agree.
        """
        return stage() if self.pace.in_step else self._agreed(stage)

    def in_step(self, part: Callable[[], T], kind: type[Exception] = Exception) -> T:
        """Runs a part of a stage; what one process raises in it, all raise there.

        Args:
            part: makes no collective call, or all of them even if it then raises a `kind`.
            kind: other errors come from the middle of the calls and end this process.
        """
        return self._agreed(part, kind) if self.pace.in_step else part()

    def _agreed(self, stage: Callable[[], T], kind: type[Exception] = Exception) -> T:
        error, result = None, None
        try:
            result = stage()
        except Exception as found:
            alone = vars(found).setdefault(_OUT_OF_STEP, not isinstance(found, kind))
            if alone or was_agreed(found):
                raise
            bad = isinstance(found, FloatingPointError)
            error = BadUpdate(str(found)) if bad else found
        self.ranks.agree(error)
        return result  # pyright: ignore[reportReturnType]

    @timed("optimizer")
    def optimizer_step(self, update: int, iteration: int) -> torch.Tensor:
        """Brings the gradients together and takes the step, on every process the same."""
        self.parallel.reduce(self.masters.parameters, self.pace.zero_pass)
        norm = self.parallel.grad_norm(self.masters.parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise BadUpdate(
                f"Trainer: gradient norm must be finite, got {float(norm)} at iteration "
                f"{iteration}, update {update}; this update changed no weight"
            )
        self.optimizer.step()
        self.masters.write()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Generator[None]:
        """A block in which the module has its EMA weights, if the run keeps any."""
        with nullcontext() if self.ema is None else self.ema.applied():
            self.parallel.gather()
            yield
        self.parallel.gather()

    def forget_gradients(self, *, reduce: bool) -> None:
        """Drops the gradients of an update that is not taken.

        Args:
            reduce: all processes do so together: unsharded gradients add up where none can see
                them, and come out in a reduction only.
        """
        if reduce and self.parallel.sharded:
            self.parallel.reduce(self.masters.parameters, self.pace.zero_pass)
        self.optimizer.zero_grad(set_to_none=True)

    @timed("optimizer")
    def update_averages(self, iteration: int) -> None:
        """Takes the new weights into the averages."""
        if self.ema is not None:
            self.ema.update()
        if self.sampler is not None and self.recipe.sampler_decay is not None:
            self.sampler.decay = self.recipe.sampler_decay(iteration)
            self.sampler.update()

    @contextmanager
    def sampling(self) -> Generator[None]:
        """A block in which the module has the weights of the policy that samples."""
        if self.sampler is None:
            yield
            return
        try:
            with self.sampler.applied():
                self.parallel.gather()
                yield
        finally:
            self.parallel.gather()
