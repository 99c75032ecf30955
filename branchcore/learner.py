"""One iteration of a run on one of its processes: grow, score, credit, prune, backward, step.

All processes go through the same stages in the same order and meet in `Ranks` and `Parallel` only;
one process meets nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch

from branchcore import stages
from branchcore.distributed import Ranks, agreed
from branchcore.gradient import Anchor, Statistics
from branchcore.ledger import Ledger
from branchcore.metrics import iteration_metrics
from branchcore.model import Model, check_tokens
from branchcore.noise_floor import NoiseFloor
from branchcore.parallel import ParallelConfig
from branchcore.plan import Plan
from branchcore.policy import BadUpdate, Policy
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
from branchcore.tree_record import TreeRecord

for _kind in (RewardFailure, NoRetry, NoMapping):
    agreed(_kind)


class Learner(Policy):
    """How an iteration moves the policy of a run.

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
        super().__init__(model, prompts, recipe, config, ranks, parallel)
        asked = patient(reward, config, rank=ranks.rank)
        self.reward, self.stopping = stopping_of(config, recipe, asked)
        self._may_stop = may_stop
        check_fast_steps(config, recipe)
        check_tokens(model, self.prompts, config.max_tokens)
        self.pruning = Pruning(config.prune, recipe, config.seed)
        no_tape = self.sampler is not None or self.parallel.lockstep
        self.tape = 0 if no_tape else self.pruning.tape(config.tape)
        self.ledger = Ledger(self.pruning, config, self.masters.parameters, self.tape, ranks)
        self.floor = NoiseFloor(recipe, config, ranks, lockstep=self.parallel.lockstep)
        self.tree = TreeRecord(config.reward_weights)
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
            with self.ranks.collecting(), self.masters.receiving():
                batches, total, norms = self._updates(iteration)
        except Exception as error:
            self.forget_gradients(reduce=isinstance(error, BadUpdate))
            self.floor.forget()
            raise
        self.update_averages(iteration)
        if batches and not self.parallel.sharded:
            trained = [p for p in self.model.module.parameters() if p.requires_grad]
            self.watch.count_flop(batches[0], trained, self.config.max_batch)
        flop = self.watch.flop
        found = iteration_metrics(
            batches,
            total,
            self.config.reward_weights,
            self.names,
            self.ranks.stack,
            floor=self.floor.value,
        )
        return {
            **found,
            "grad_norm": max(float(n) for n in norms),
            **self.floor.metrics(),
            **self.ledger.metrics(flop and flop.forward),
        }

    def _updates(self, iteration: int) -> tuple[list[Batch], Statistics, list[torch.Tensor]]:
        """Takes all optimizer steps of an iteration; returns their gradient norms too."""
        self.optimizer.zero_grad(set_to_none=True)
        fast = self.config.fast_steps > 0
        start = FastPath(self.masters.parameters, self.optimizer) if fast else None
        sizes = len(self.prompts), self.config.prompts_per_iteration
        indices = stages.prompt_indices(*sizes, seed=self.config.seed, iteration=iteration)
        draw = self.pruning.draw(indices, iteration, self.config.prompts_per_round, self.ranks)
        self.ledger.open(draw, iteration)
        batches, total = self.together(lambda: self._first_update(draw, iteration))
        mine = batches[0].scores.names if batches else ()
        self.names = self.names or self.ranks.first(mine)
        self.floor.agree()
        scores = [batch.scores for batch in batches]
        check_masked(scores, self.config.reward_max_failed, self.ranks.sum)
        norms = [self.optimizer_step(0, iteration)]
        if start is not None:
            norms += self._fast_steps(start, draw, batches, iteration)
        for update in range(1, self.recipe.updates):
            one = partial(self._later_pass, draw, batches, update, update)
            total = total.plus(self.together(one))
            norms.append(self.optimizer_step(update, iteration))
        self.ledger.close(batches)
        return batches, total, norms

    def _first_update(self, draw: Draw, iteration: int) -> tuple[list[Batch], Statistics]:
        """Rolls out, scores and backpropagates round by round, so that few tapes live at a time.

        A std over all prompts of several rounds or processes is known after the last of them: all
        rounds are then grown before the first backward, on no tape if there are several.
        """
        self.in_step(self._may_stop)
        self.parallel.gather()
        missing = self.pace.missing_rounds(len(draw.rounds))
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
            scored = (self.in_step(partial(self._next, done)) for _ in draw.rounds)
            recipe = spread.credited()
            if crosses:
                whole = self.together(partial(self._whole, scored, missing))
                scored, recipe = iter(whole), spread.credited(whole, weights, self.ranks)
            for batch in scored:
                with clock("credit"):
                    known = stages.credited(
                        batch, recipe, iteration=iteration, reward_weights=weights
                    )
                self.floor.measure(known)
                batches.append(self.pruning.weigh(known, draw.weight))
                total = total.plus(self._pass(draw, batches[-1:]))
        for _ in range(missing):
            if not crosses:
                self._idle_round()
            self.pace.passes(0)
        return batches, total

    def _next(self, rounds: Generator[Batch]) -> Batch:
        """Returns the next scored round, unless the run is to stop."""
        batch = next(rounds)
        self._may_stop()
        return batch

    def _whole(self, rounds: Iterable[Batch], missing: int) -> list[Batch]:
        """Returns all rounds, after those that other processes have beyond."""
        batches = list(rounds)
        for _ in range(missing):
            self._idle_round()
        return batches

    def _idle_round(self) -> None:
        """Goes along with the rollout and the scoring of a round that this process has not."""
        calls = self.pace.missing_calls(0)
        with self.sampling(), self.pace.calling(calls):
            pass
        self.in_step(lambda: None)  # rollout
        self.in_step(lambda: None)  # scores

    def _grow(
        self, plan: Plan, uids: Sequence[int], draw: Draw, iteration: int, tape: int | None
    ) -> Grown:
        """Grows a round with the policy that samples."""
        config = self.config
        stored = True if self.sampler or config.fast_steps else None
        stored = stored if self.recipe.objective.anchor == "policy" else False
        calls = num_calls(plan, max_batch=config.max_batch, keep_velocity=stored)
        missing = self.pace.missing_calls(calls)
        grow = partial(
            stages.grow,
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
            dtype=self.pace.dtype,
            device=self.device,
            clock=self.watch.clock,
        )
        return self.in_step(partial(self._sampled, grow, missing), FloatingPointError)

    def _sampled(self, grow: Callable[[], Grown], missing: int) -> Grown:
        """Grows a round with the weights that sample, and goes along with missing calls."""
        with self.sampling(), self.pace.calling(missing):
            return grow()

    def _pass(
        self, draw: Draw, batches: Sequence[Batch], update: int = 0, inner: int = 0
    ) -> Statistics:
        """Adds the gradient of one pass, with coins of its own; only the first is on policy."""
        total = Statistics.zero(self.device)
        anchor: Anchor = "auto" if inner == 0 and self.sampler is None else "rollout"
        for batch in batches:
            weight = self.ledger.weigh(batch, update=update, inner=inner, anchor=anchor)
            weighed = batch._replace(weight=weight)
            if update == inner == 0:
                self.tree.see(weighed, [self.prompts[i] for i in draw.indices[[*batch.uids]]])
            self.watch.work.count(weighed, update=update, inner=inner)
            with self.watch.clock("update"):
                part = accumulate(
                    weighed,
                    self.floor.recipe,
                    update=update,
                    anchor=anchor,
                    max_batch=self.config.max_batch,
                    max_tokens=self.config.max_tokens,
                    num_planned=draw.planned[update] / self.parallel.share,
                    even=self.pace.passes,
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
        missing = self.pace.missing_rounds(len(batches))
        total = self._pass(draw, batches, update, inner)
        for _ in range(missing):
            self.pace.passes(0)
        return total

    def _fast_steps(
        self, before: FastPath, draw: Draw, batches: Sequence[Batch], iteration: int
    ) -> list[torch.Tensor]:
        """Takes the other fast steps of SFPO, goes back and takes the corrective step."""
        norms: list[torch.Tensor] = []
        share, limit = self.config.fast_share, self.config.fast_limit
        for inner in range(1, self.config.fast_steps):
            ratio = self.together(partial(self._later_pass, draw, batches, 0, inner)).ratio
            norms.append(self.optimizer_step(0, iteration))
            if limit < math.inf:
                mine = torch.stack([ratio.sum_abs_dev, ratio.edges]).double().cpu().numpy()
                deviation, edges = self.ranks.sum(mine)
                share = 0.0 if deviation > limit * edges else self.config.fast_share
        before.go_back(share)
        self.masters.write()
        self.together(partial(self._later_pass, draw, batches, 0, self.config.fast_steps))
        return [*norms, self.optimizer_step(0, iteration)]
