"""One iteration of a run on one of its processes: grow, score, credit, prune, backward, step.

All processes go through the same stages in the same order and meet in `Ranks` and `Parallel` only;
one process meets nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from branchcore import stages
from branchcore.distributed import Ranks, agreed
from branchcore.ema import Ema
from branchcore.gradient import Anchor, Statistics
from branchcore.idle import idle_calls, idle_passes
from branchcore.ledger import Ledger
from branchcore.masters import Masters
from branchcore.metrics import iteration_metrics
from branchcore.model import Model, VelocityModel, check_tokens
from branchcore.parallel import ParallelConfig, spread
from branchcore.plan import Plan
from branchcore.pruning import Draw, Pruning
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward, check_masked, patient
from branchcore.rewards.failures import NoMapping, NoRetry, RewardFailure
from branchcore.rollout import num_calls
from branchcore.rounds import score_rounds
from branchcore.slow_fast import FastPath, check_fast_steps
from branchcore.stages import Batch, Grown, accumulate
from branchcore.stopping import stopping_of
from branchcore.trainer_config import TrainerConfig
from branchcore.watch import Watch, timed

T = TypeVar("T")
for _kind in (RewardFailure, NoRetry, NoMapping):
    agreed(_kind)


@agreed
class BadUpdate(FloatingPointError):
    """A velocity, reward or gradient that is not finite, on any process; no weight was changed."""


class Learner:
    """The policy of a run, its optimizer and averages, and how an iteration moves them.

    Args:
        model: the policy.
        prompts: data set of prompts.
        reward: scores decoded leaves.
        recipe: the method.
        config: the run.
        ranks: its processes.
        parallel: how weights are spread over them.
        may_stop: called where an iteration can be given up without a trace; raises if it is to be.

    Raises:
        ValueError: nothing is trained, or settings exclude each other.
        TypeError, NotImplementedError: `max_tokens` of a model that does not count tokens.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        reward: Reward,
        recipe: Recipe,
        config: TrainerConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
        may_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.prompts, self.recipe, self.config = model, list(prompts), recipe, config
        asked = patient(reward, config, rank=ranks.rank)
        self.reward, self.stopping = stopping_of(config, recipe, asked)
        self.ranks, self._may_stop = ranks, may_stop
        if not any(p.requires_grad for p in model.module.parameters()):
            raise ValueError("Trainer: module must have trainable parameters, got none")
        check_fast_steps(config, recipe)
        check_tokens(model, self.prompts, config.max_tokens)
        frozen = getattr(model, "frozen", None)
        modules = [model.module, *([] if frozen is None else [frozen])]
        self.parallel = spread(parallel, modules, ranks)
        if self.parallel.lockstep and config.overlap_rewards:
            raise ValueError(
                "Trainer: overlap_rewards must be False where weights are gathered for every call, "
                "got True; try reshard=False"
            )
        if self.parallel.lockstep and self.stopping is not None:
            raise ValueError(
                "Trainer: prune_stop must be left out where weights are gathered for every call, "
                f"got {config.prune.stop}; try reshard=False"
            )
        if self.parallel.sharded and config.prune.measure:
            raise ValueError(
                "Trainer: prune_measure must be 0 where weights are sharded, got "
                f"{config.prune.measure}; gradients of single parents are not apart there"
            )
        self.pruning = Pruning(config.prune, recipe, config.seed)
        self.masters = Masters(model.module)
        self.optimizer = torch.optim.AdamW(
            self.masters.parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.device = self.masters.parameters[0].device if ranks.alone else ranks.device
        average = partial(Ema, model.module, masters=self.masters)
        self.ema = None if config.ema_decay is None else average(config.ema_decay)
        self.sampler = None if recipe.sampler_decay is None else average(0.0, starts_as_copy=True)
        both = (("ema", self.ema), ("sampler", self.sampler))
        self.averages = {name: kept for name, kept in both if kept is not None}
        no_tape = self.sampler is not None or self.parallel.lockstep
        self.tape = 0 if no_tape else self.pruning.tape(config.tape)
        self.ledger = Ledger(
            self.pruning,
            config,
            self.masters.parameters,
            self.tape,
            ranks,
            counts_flops=not self.parallel.lockstep,
        )
        self.watch = Watch(self.device, recipe)
        self.dtype = torch.float32
        """Of the states; float64 where exactness is tested."""
        self.noise_floor: float | None = None
        self.names: tuple[str, ...] = ()
        """Components of the reward, once known."""

    def step(self, iteration: int) -> dict[str, Any]:
        """Runs one iteration and returns its metrics, the same on every process.

        Raises:
            BadUpdate: something was not finite; weights and averages are as before.
            Exception: what any process raised, on every process.
        """
        self.watch.begin()
        try:
            with self.masters.receiving():
                batches, total, norms = self._updates(iteration)
        except Exception:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        self._update_averages(iteration)
        if batches and not self.parallel.sharded:
            trained = [p for p in self.model.module.parameters() if p.requires_grad]
            self.watch.count_flop(batches[0], trained, self.config.max_batch)
        found = iteration_metrics(
            batches, total, self.config.reward_weights, self.names, self.ranks.stack
        )
        return {
            **found,
            "grad_norm": max(float(n) for n in norms),
            **({} if self.noise_floor is None else {"noise_floor": self.noise_floor}),
            **self.ledger.metrics(),
        }

    @timed("optimizer")
    def _update_averages(self, iteration: int) -> None:
        if self.ema is not None:
            self.ema.update()
        if self.sampler is not None and self.recipe.sampler_decay is not None:
            self.sampler.decay = self.recipe.sampler_decay(iteration)
            self.sampler.update()

    def _updates(self, iteration: int) -> tuple[list[Batch], Statistics, list[torch.Tensor]]:
        """Takes all optimizer steps of an iteration; returns their gradient norms too."""
        self.optimizer.zero_grad(set_to_none=True)
        fast = self.config.fast_steps > 0
        start = FastPath(self.masters.parameters, self.optimizer) if fast else None
        sizes = len(self.prompts), self.config.prompts_per_iteration
        indices = stages.prompt_indices(*sizes, seed=self.config.seed, iteration=iteration)
        draw = self.pruning.draw(indices, iteration, self.config.prompts_per_round, self.ranks)
        self.ledger.open(draw, iteration)
        batches, total = self._together(lambda: self._first_update(draw, iteration))
        self._agree_on_names(batches)
        scores = [batch.scores for batch in batches]
        check_masked(scores, self.config.reward_max_failed, self.ranks.sum)
        norms = [self._optimizer_step(0, iteration)]
        if start is not None:
            norms += self._fast_steps(start, draw, batches, iteration)
        for update in range(1, self.recipe.updates):
            one = partial(self._later_pass, draw, batches, update, update)
            total = total.plus(self._together(one))
            norms.append(self._optimizer_step(update, iteration))
        self.ledger.close(batches)
        return batches, total, norms

    def _together(self, stage: Callable[[], T]) -> T:
        """Runs a stage; what one process raises in it, all raise."""
        error, result = None, None
        try:
            result = stage()
        except FloatingPointError as found:
            error = BadUpdate(str(found))
        except Exception as found:
            error = found
        self.ranks.agree(error)
        return result  # pyright: ignore[reportReturnType]

    def _agree_on_names(self, batches: Sequence[Batch]) -> None:
        """Tells processes without prompts what the reward's components are."""
        if not self.names:
            mine = batches[0].scores.names if batches else ()
            found = [tuple(names) for names in self.ranks.gather(mine)]
            self.names = next((names for names in found if names), ())

    def _first_update(self, draw: Draw, iteration: int) -> tuple[list[Batch], Statistics]:
        """Rolls out, scores and backpropagates round by round, so that few tapes live at a time.

        A std over all prompts of several rounds or processes is known after the last of them: all
        rounds are then grown before the first backward, on no tape if there are several.
        """
        self.parallel.gather()
        missing = self._missing_rounds(len(draw.rounds))
        spread, weights = self.pruning.spread, self.config.reward_weights
        crosses = spread.crosses and not (self.ranks.alone and len(draw.rounds) == 1)
        tape = 0 if crosses and len(draw.rounds) > 1 else self.tape
        pairs = zip(draw.plans, draw.rounds, strict=True)
        grown = (self._grow(plan, uids, draw, iteration, tape) for plan, uids in pairs)
        overlap = self.config.overlap_rewards and len(draw.rounds) > 1
        clock = self.watch.clock
        done = score_rounds(grown, self.reward, stages.scored_batch, overlap=overlap, clock=clock)
        batches: list[Batch] = []
        total = Statistics.zero(self.device)
        with closing(done):
            scored, recipe = done, spread.credited()
            if crosses:
                scored = list(done)
                self._idle_rounds(missing)
                recipe = spread.credited(scored, weights, self.ranks)
            for batch in scored:
                self._may_stop()
                with clock("credit"):
                    known = stages.credited(
                        batch, recipe, iteration=iteration, reward_weights=weights
                    )
                self._measure_floor(known)
                batches.append(self.pruning.weigh(known, draw.weight))
                total = total.plus(self._pass(draw, batches[-1:]))
        for _ in range(missing):
            self._idle_rounds(0 if crosses else 1)
            self._even_passes(0)
        return batches, total

    def _missing_rounds(self, mine: int) -> int:
        """Returns how many rounds of other processes this one has to go along with."""
        together = self.parallel.lockstep or (self.parallel.sharded and self.sampler is not None)
        return self.ranks.most([mine])[0] - mine if together else 0

    def _idle_rounds(self, count: int) -> None:
        """Goes along with the rollouts of rounds that this process has not."""
        for _ in range(count):
            with self._sampling():
                idle_calls(self._any_view(), self._missing_calls(0), self.device, self.dtype)

    def _any_view(self) -> VelocityModel:
        return self.model.with_prompts(self.prompts[:1])

    def _missing_calls(self, mine: int) -> int:
        """Returns the calls that others make of a round beyond this process's, agreed before it."""
        return self.ranks.most([mine])[0] - mine if self.parallel.lockstep else 0

    def _even_passes(self, mine: int) -> int:
        """Returns the passes of every process; makes them all itself if this one has none."""
        if not self.parallel.lockstep:
            return mine
        most = self.ranks.most([mine])[0]
        if not mine:
            reference = self.recipe.objective.compares
            idle_passes(self._any_view(), most, self.device, self.dtype, reference=reference)
        return most if mine else 0

    @contextmanager
    def _sampling(self) -> Generator[None]:
        """A block in which the module has the weights of the policy that samples."""
        if self.sampler is None:
            yield
            return
        with self.sampler.applied():
            self.parallel.gather()
            yield
        self.parallel.gather()

    def _measure_floor(self, batch: Batch) -> None:
        """Measures the noise floor once, where a call more on one process is no matter."""
        if self.noise_floor is None and self.sampler is None and not self.parallel.lockstep:
            limits = {"max_batch": self.config.max_batch, "max_tokens": self.config.max_tokens}
            self.noise_floor = stages.noise_floor(batch, self.recipe, **limits)

    def _grow(
        self, plan: Plan, uids: Sequence[int], draw: Draw, iteration: int, tape: int | None
    ) -> Grown:
        """Grows a round with the policy that samples."""
        config = self.config
        self._may_stop()
        stored = True if self.sampler or config.fast_steps else None
        stored = stored if self.recipe.objective.anchor == "policy" else False
        calls = num_calls(plan, max_batch=config.max_batch, keep_velocity=stored)
        missing = self._missing_calls(calls)
        with self._sampling():
            grown = stages.grow(
                plan,
                self.model,
                self.recipe,
                [self.prompts[i] for i in draw.indices[[*uids]]],
                uids,
                seed=config.seed,
                iteration=iteration,
                tape=tape,
                max_batch=config.max_batch,
                keep_velocity=stored,
                off_tape=self.pruning.ahead(plan, uids, iteration),
                masked_backward=self.pruning.late,
                stopping=self.stopping,
                dtype=self.dtype,
                device=self.device,
                clock=self.watch.clock,
            )
            idle_calls(grown.model, missing, self.device, self.dtype)
        return grown

    def _pass(
        self, draw: Draw, batches: Sequence[Batch], update: int = 0, inner: int = 0
    ) -> Statistics:
        """Adds the gradient of one pass, with coins of its own; only the first is on policy."""
        total = Statistics.zero(self.device)
        anchor: Anchor = "auto" if inner == 0 and self.sampler is None else "rollout"
        for batch in batches:
            weight = self.ledger.weigh(batch, update=update, inner=inner, anchor=anchor)
            weighed = batch._replace(weight=weight)
            self.watch.work.count(weighed, update=update, inner=inner)
            with self.watch.clock("update"):
                part = accumulate(
                    weighed,
                    self.recipe,
                    update=update,
                    anchor=anchor,
                    max_batch=self.config.max_batch,
                    max_tokens=self.config.max_tokens,
                    num_planned=draw.planned[update] / self.parallel.share,
                    even=self._even_passes,
                )
            total = total.plus(part)
        # what a reduction multiplies gradients by is no part of the loss
        share = self.parallel.share
        return total._replace(loss=total.loss / share, kl=total.kl / share)

    def _later_pass(
        self, draw: Draw, batches: Sequence[Batch], update: int, inner: int
    ) -> Statistics:
        """A pass over all rounds, after weights have changed."""
        self.parallel.gather()
        total = self._pass(draw, batches, update, inner)
        for _ in range(self._missing_rounds(len(batches))):
            self._even_passes(0)
        return total

    def _fast_steps(
        self, before: FastPath, draw: Draw, batches: Sequence[Batch], iteration: int
    ) -> list[torch.Tensor]:
        """Takes the other fast steps of SFPO, goes back and takes the corrective step."""
        norms: list[torch.Tensor] = []
        share, limit = self.config.fast_share, self.config.fast_limit
        for inner in range(1, self.config.fast_steps):
            ratio = self._together(partial(self._later_pass, draw, batches, 0, inner)).ratio
            norms.append(self._optimizer_step(0, iteration))
            if limit < math.inf:
                mine = torch.stack([ratio.sum_abs_dev, ratio.edges]).double().cpu().numpy()
                deviation, edges = self.ranks.sum(mine)
                share = 0.0 if deviation > limit * edges else self.config.fast_share
        before.go_back(share)
        self.masters.write()
        self._together(partial(self._later_pass, draw, batches, 0, self.config.fast_steps))
        return [*norms, self._optimizer_step(0, iteration)]

    @timed("optimizer")
    def _optimizer_step(self, update: int, iteration: int) -> torch.Tensor:
        """Brings the gradients together and takes the step, on every process the same."""
        self.parallel.reduce(
            self.masters.parameters,
            lambda: idle_passes(self._any_view(), 1, self.device, self.dtype),
        )
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
