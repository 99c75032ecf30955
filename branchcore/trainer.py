"""The embedded trainer: plan, grow, score, credit, prune, backward, step; resumable bit for bit.

Read `Trainer.step` top to bottom; every stage is a public function of `stages`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from branchcore import checkpoint, stages
from branchcore.advice import Advice, clip_of
from branchcore.ema import Ema
from branchcore.gradient import Statistics
from branchcore.masters import Masters
from branchcore.metrics import bar_text, iteration_metrics
from branchcore.model import Model
from branchcore.plan import Plan
from branchcore.plots import read_metrics
from branchcore.pruning import Draw, Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.pruning_sums import Sums
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward
from branchcore.run_folder import RunFolder, check_same, identity
from branchcore.slow_fast import FastPath, check_fast_steps
from branchcore.stages import Batch, Grown, accumulate
from branchcore.trainer_config import TrainerConfig
from branchcore.watch import Watch, timed

Metrics = dict[str, Any]


class Trainer:
    """Trains a flow model with a recipe and writes metrics.jsonl and checkpoints to a folder.

    Args:
        model: the policy.
        prompts: data set of prompts.
        reward: scores decoded leaves.
        recipe: the method.
        config: the run.
        out: folder of the run.
        evaluate: held-out measures of the model (EMA weights if there are), by name.
        callbacks: called with every iteration's metrics, after they are logged.
        facts: what else identifies the run (the model, say); must agree on resume.
        resume: continue the run in `out` from its newest whole checkpoint.

    Raises:
        ValueError: `out` holds another run, or a checkpoint of another model or recipe.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        reward: Reward,
        recipe: Recipe,
        config: TrainerConfig,
        out: str | Path,
        *,
        evaluate: Callable[[Model], Mapping[str, float]] | None = None,
        callbacks: Sequence[Callable[[Metrics], None]] = (),
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.model, self.prompts, self.reward = model, list(prompts), reward
        self.recipe, self.config = recipe, config
        self.evaluate, self.callbacks = evaluate, callbacks
        self.parameters = [p for p in model.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("Trainer: module must have trainable parameters, got none")
        check_fast_steps(config, recipe)
        self.pruning = Pruning(config.prune, recipe, config.seed)
        self.device = self.parameters[0].device
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
        self._averages = {name: kept for name, kept in both if kept is not None}
        self.watch, self.advice = Watch(self.device, recipe), Advice(clip_of(recipe.objective))
        self.iteration, self.cpu_s, self.kept = 0, 0.0, Sums()
        self.noise_floor: float | None = None
        self.folder = RunFolder(
            out, identity(config, recipe, self.prompts, facts or {}), resume=resume
        )
        newest = checkpoint.latest(self.folder.path)
        if newest is not None:
            self._restore(newest)
        self.folder.forget_after(self.iteration)
        if self.iteration:
            self.advice.replay(read_metrics(self.folder.log_path))

    def run(self) -> None:
        """Trains to the configured number of iterations."""
        todo = range(self.iteration, self.config.iterations)
        first: Metrics = {}
        self.watch.begin()
        if self.iteration == 0 and self.evaluate is not None:
            first = {"iteration": 0, **self._evaluation(), **self.watch.row()}
        with tqdm(todo, initial=self.iteration, total=self.config.iterations, unit="it") as bar:
            for _ in bar:
                metrics = self._iterate()
                last = self.iteration == self.config.iterations
                if self.evaluate and (last or self.iteration % self.config.evaluate_every == 0):
                    metrics |= self._evaluation()
                metrics |= self.watch.row()
                if first:
                    self._log(first)
                    first = {}
                self._log(metrics)
                if last or self.iteration % self.config.checkpoint_every == 0:
                    self.save()
                bar.set_postfix_str(bar_text(metrics))

    def step(self) -> Metrics:
        """Runs one iteration and returns its metrics."""
        return self._iterate() | self.watch.row()

    def _iterate(self) -> Metrics:
        cpu = time.process_time()
        self.watch.begin()
        with self.masters.receiving():
            batches, total, norms = self._updates()
        self._update_averages()
        self.iteration += 1
        self.cpu_s += time.process_time() - cpu
        self.watch.count_flop(batches[0], self.parameters, self.config.max_batch)
        return {
            "iteration": self.iteration,
            **iteration_metrics(batches, total, self.config.reward_weights),
            "grad_norm": max(float(n) for n in norms),
            **({} if self.noise_floor is None else {"noise_floor": self.noise_floor}),
            **({} if self.config.prune == PruningConfig() else self.kept.metrics()),
            "cpu_s": self.cpu_s,
        }

    @timed("optimizer")
    def _update_averages(self) -> None:
        if self.ema is not None:
            self.ema.update()
        if self.sampler is not None and self.recipe.sampler_decay is not None:
            self.sampler.decay = self.recipe.sampler_decay(self.iteration)
            self.sampler.update()

    def _updates(self) -> tuple[list[Batch], Statistics, list[torch.Tensor]]:
        """Takes all optimizer steps of an iteration; returns their gradient norms too."""
        self.optimizer.zero_grad(set_to_none=True)
        fast = self.config.fast_steps > 0
        start = FastPath(self.masters.parameters, self.optimizer) if fast else None
        sizes = len(self.prompts), self.config.prompts_per_iteration
        seed, now = self.config.seed, self.iteration
        indices = stages.prompt_indices(*sizes, seed=seed, iteration=now)
        draw = self.pruning.draw(indices, now, self.config.prompts_per_round)
        self.kept = Sums(prompts=len(indices), rolled_out=len(draw.weight))
        batches, total = self._first_update(draw)
        norms = [self._optimizer_step(0)]
        if start is not None:
            norms += self._fast_steps(start, draw, batches)
        for update in range(1, self.recipe.updates):
            total = total.plus(self._pass(draw, batches, update, inner=update))
            norms.append(self._optimizer_step(update))
        self.pruning.remember(indices, batches)
        return batches, total, norms

    def _first_update(self, draw: Draw) -> tuple[list[Batch], Statistics]:
        """Rolls out, scores and backpropagates round by round, so that few tapes live at a time."""
        config, iteration = self.config, self.iteration
        grown = (self._grow(*one, draw) for one in zip(draw.plans, draw.rounds, strict=True))
        batches: list[Batch] = []
        total = Statistics.zero(self.device)
        limit, weights = config.max_batch, config.reward_weights
        end = partial(
            stages.finish, recipe=self.recipe, iteration=iteration, reward_weights=weights
        )
        clock, overlap = self.watch.clock, config.overlap_rewards
        timed_end = clock("credit")(end)
        done = stages.score_rounds(grown, self.reward, timed_end, overlap=overlap, clock=clock)
        with closing(done):
            for batch in done:
                if self.noise_floor is None and self.sampler is None:
                    self.noise_floor = stages.noise_floor(batch, self.recipe, max_batch=limit)
                batches.append(self.pruning.weigh(batch, draw.weight))
                total = total.plus(self._pass(draw, batches[-1:]))
        return batches, total

    def _grow(self, plan: Plan, uids: Sequence[int], draw: Draw) -> Grown:
        """Grows a round with the policy that samples."""
        config, lags = self.config, self.sampler is not None
        dropped = self.pruning.ahead(plan, uids, self.iteration)
        with self.sampler.applied() if self.sampler is not None else nullcontext():
            return stages.grow(
                plan,
                self.model,
                self.recipe,
                [self.prompts[i] for i in draw.indices[[*uids]]],
                uids,
                seed=config.seed,
                iteration=self.iteration,
                tape=0 if lags else self.pruning.tape(config.tape),
                max_batch=config.max_batch,
                keep_velocity=True if lags or config.fast_steps else None,
                off_tape=dropped,
                masked_backward=self.pruning.late,
                device=self.device,
                clock=self.watch.clock,
            )

    def _pass(
        self, draw: Draw, batches: Sequence[Batch], update: int = 0, inner: int = 0
    ) -> Statistics:
        """Adds the gradient of one pass, with coins of its own; only the first is on policy."""
        total = Statistics.zero(self.device)
        first = inner == 0 and self.sampler is None
        for batch in batches:
            where = {"iteration": self.iteration, "update": update, "inner": inner}
            weight, sums = self.pruning.weights(batch, **where)
            self.kept = self.kept.plus(sums)
            weighed = batch._replace(weight=weight)
            self.watch.work.count(weighed, update=update, inner=inner)
            with self.watch.clock("update"):
                part = accumulate(
                    weighed,
                    self.recipe,
                    update=update,
                    anchor="auto" if first else "rollout",
                    max_batch=self.config.max_batch,
                    num_planned=draw.planned[update],
                )
            total = total.plus(part)
        return total

    def _fast_steps(
        self, before: FastPath, draw: Draw, batches: Sequence[Batch]
    ) -> list[torch.Tensor]:
        """Takes the other fast steps of SFPO, goes back and takes the corrective step."""
        norms: list[torch.Tensor] = []
        share, limit = self.config.fast_share, self.config.fast_limit
        for inner in range(1, self.config.fast_steps):
            ratio = self._pass(draw, batches, inner=inner).ratio
            norms.append(self._optimizer_step(0))
            if limit < math.inf:
                far = bool(ratio.sum_abs_dev > limit * ratio.edges)
                share = 0.0 if far else self.config.fast_share
        before.go_back(share)
        self.masters.write()
        self._pass(draw, batches, inner=self.config.fast_steps)
        return [*norms, self._optimizer_step(0)]

    @timed("optimizer")
    def _optimizer_step(self, update: int) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.masters.parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"Trainer: gradient norm must be finite, got {float(norm)} at iteration "
                f"{self.iteration}, update {update}; this update changed no weight"
            )
        self.optimizer.step()
        self.masters.write()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a block in which the module has its EMA weights, if the run keeps any."""
        return nullcontext() if self.ema is None else self.ema.applied()

    @timed("checkpoint")
    def save(self) -> Path:
        """Writes a checkpoint of the current iteration and returns its folder."""
        tensors = {
            "model": checkpoint.trained(self.model.module),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
        }
        tensors |= {name: average.tensors() for name, average in self._averages.items()}
        tensors |= {"masters": self.masters.copies} if self.masters.copies else {}
        state = {**self.folder.identity, "cpu_s": self.cpu_s, "noise_floor": self.noise_floor}
        state |= {"pruning": self.pruning.state(), "flop": self.watch.state()}
        where = self.folder.path, self.iteration
        return checkpoint.save(*where, tensors, state, self.config.keep_checkpoints)

    @timed("evaluation")
    def _evaluation(self) -> Metrics:
        assert self.evaluate is not None
        with self.averaged():
            return {f"eval/{k}": float(v) for k, v in self.evaluate(self.model).items()}

    @timed("callbacks")
    def _log(self, metrics: Metrics) -> None:
        metrics = self.advice.warn(metrics)
        self.folder.log(metrics)
        for callback in self.callbacks:
            callback(metrics)

    def _restore(self, newest: Path) -> None:
        state = checkpoint.load_state(newest)
        check_same(newest, state, self.folder.identity)
        kinds = {"cpu_s": float, "noise_floor": (float, None), "pruning": dict, "flop": list}
        checkpoint.require(newest / "state.json", state, **kinds)
        self.pruning.load(state["pruning"], newest / "state.json")
        module, copies = self.model.module, self.masters.copies
        like = checkpoint.trained(module)
        weights = checkpoint.load_tensors(newest, "model", like)
        moments = checkpoint.load_moments(newest, self.masters.parameters)
        masters = checkpoint.load_tensors(newest, "masters", copies) if copies else {}
        for name, average in self._averages.items():
            average.load(checkpoint.load_tensors(newest, name, like), int(state["iteration"]))
        module.load_state_dict(weights, strict=False)
        self.masters.load(masters)
        checkpoint.load_optimizer(self.optimizer, moments)
        self.iteration, self.cpu_s = int(state["iteration"]), float(state["cpu_s"])
        self.noise_floor = state["noise_floor"]
        self.watch.load(state["flop"])
