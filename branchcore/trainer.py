"""The embedded trainer: plan, grow, score, credit, prune, backward, step; resumable bit for bit.

Read `Trainer.step` top to bottom; every stage is a public function of `stages`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from branchcore import checkpoint
from branchcore.ema import Ema
from branchcore.gradient import Statistics
from branchcore.metrics import bar_text, iteration_metrics
from branchcore.model import Model
from branchcore.plan import Plan
from branchcore.prune import balanced_chunks
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward
from branchcore.run_folder import RunFolder, check_same
from branchcore.slow_fast import FastPath, check_fast_steps
from branchcore.stages import Batch, accumulate, collect, noise_floor, prompt_indices
from branchcore.trainer_config import TrainerConfig

Metrics = dict[str, Any]
_FREE_TO_CHANGE = ("iterations", "checkpoint_every", "keep_checkpoints", "evaluate_every")


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
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.ema = None if config.ema_decay is None else Ema(model.module, config.ema_decay)
        lags = recipe.sampler_decay is not None
        self.sampler = Ema(model.module, 0.0, starts_as_copy=True) if lags else None
        self.iteration, self.cpu_s = 0, 0.0
        self.noise_floor: float | None = None
        identity = self._identity(facts or {})
        self.folder = RunFolder(out, identity, resume=resume)
        newest = checkpoint.latest(self.folder.path)
        if newest is not None:
            self._restore(newest)
        self.folder.forget_after(self.iteration)

    def _identity(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a resumed run must agree on."""
        settings = dataclasses.asdict(self.config)
        text = "\n".join(self.prompts).encode()
        return {
            "recipe": {"name": self.recipe.name, **self.recipe.options},
            "prompts": {"count": len(self.prompts), "sha256": hashlib.sha256(text).hexdigest()},
            "config": {k: v for k, v in settings.items() if k not in _FREE_TO_CHANGE},
            "facts": dict(facts),
        }

    def run(self) -> None:
        """Trains to the configured number of iterations."""
        todo = range(self.iteration, self.config.iterations)
        first: Metrics = {}
        if self.iteration == 0 and self.evaluate is not None:
            first = {"iteration": 0, **self._evaluation()}
        with tqdm(todo, initial=self.iteration, total=self.config.iterations, unit="it") as bar:
            for _ in bar:
                metrics = self.step()
                last = self.iteration == self.config.iterations
                if self.evaluate and (last or self.iteration % self.config.evaluate_every == 0):
                    metrics |= self._evaluation()
                if first:
                    self._log(first)
                    first = {}
                self._log(metrics)
                if last or self.iteration % self.config.checkpoint_every == 0:
                    self.save()
                bar.set_postfix_str(bar_text(metrics))

    def step(self) -> Metrics:
        """Runs one iteration and returns its metrics."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        before = FastPath(self.parameters, self.optimizer) if self.config.fast_steps else None
        batches, total = self._first_update()
        norms = [self._optimizer_step(0)]
        if before is not None:
            norms += self._fast_steps(before, batches)
        for update in range(1, self.recipe.updates):
            total = total.plus(self._update(batches, update))
            norms.append(self._optimizer_step(update))
        if self.ema is not None:
            self.ema.update()
        if self.sampler is not None and self.recipe.sampler_decay is not None:
            self.sampler.decay = self.recipe.sampler_decay(self.iteration)
            self.sampler.update()
        self.iteration += 1
        self.cpu_s += time.process_time() - cpu
        return {
            "iteration": self.iteration,
            **iteration_metrics(batches, total, self.config.reward_weights),
            "grad_norm": max(float(n) for n in norms),
            **({} if self.noise_floor is None else {"noise_floor": self.noise_floor}),
            "cpu_s": self.cpu_s,
            "wall_s": time.perf_counter() - wall,
        }

    def _first_update(self) -> tuple[list[Batch], Statistics]:
        """Rolls out, scores and backpropagates round by round, so that one tape lives at a time."""
        config, seed, iteration = self.config, self.config.seed, self.iteration
        chosen = prompt_indices(
            len(self.prompts), config.prompts_per_iteration, seed=seed, iteration=iteration
        )
        rounds = balanced_chunks(len(chosen), config.prompts_per_round)
        uids = np.arange(len(chosen))
        plans = [
            self.recipe.plan(uids[lo:hi].tolist(), seed=seed, iteration=iteration)
            for lo, hi in rounds
        ]
        planned = sum(len(p.trained(0)) for p in plans)
        batches: list[Batch] = []
        total = Statistics.zero(self.device)
        for plan, (lo, hi) in zip(plans, rounds, strict=True):
            prompts = [self.prompts[i] for i in chosen[lo:hi]]
            batch = self._collect(plan, prompts, uids[lo:hi].tolist())
            if self.noise_floor is None and self.sampler is None:
                self.noise_floor = noise_floor(batch, self.recipe, max_batch=config.max_batch)
            batches.append(batch)
            total = total.plus(
                accumulate(
                    batch,
                    self.recipe,
                    anchor="auto" if self.sampler is None else "rollout",
                    max_batch=config.max_batch,
                    num_planned=planned,
                )
            )
        return batches, total

    def _collect(self, plan: Plan, prompts: list[str], uids: list[int]) -> Batch:
        """Grows and scores a round with the policy that samples."""
        config, lags = self.config, self.sampler is not None
        with self.sampler.applied() if self.sampler is not None else nullcontext():
            return collect(
                plan,
                self.model,
                self.recipe,
                prompts,
                uids,
                self.reward,
                seed=config.seed,
                iteration=self.iteration,
                reward_weights=config.reward_weights,
                tape=0 if lags else config.tape,
                max_batch=config.max_batch,
                keep_velocity=True if lags or config.fast_steps else None,
                device=self.device,
            )

    def _update(self, batches: Sequence[Batch], update: int) -> Statistics:
        planned = sum(len(b.forest.plan.trained(update)) for b in batches)
        limits = {"max_batch": self.config.max_batch, "num_planned": planned}
        total = Statistics.zero(self.device)
        for batch in batches:
            total = total.plus(
                accumulate(batch, self.recipe, update=update, anchor="rollout", **limits)
            )
        return total

    def _fast_steps(self, before: FastPath, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Takes the other fast steps of SFPO, goes back and takes the corrective step."""
        norms: list[torch.Tensor] = []
        share, limit = self.config.fast_share, self.config.fast_limit
        for _ in range(1, self.config.fast_steps):
            ratio = self._update(batches, 0).ratio
            norms.append(self._optimizer_step(0))
            if limit < math.inf:
                far = bool(ratio.sum_abs_dev > limit * ratio.edges)
                share = 0.0 if far else self.config.fast_share
        before.go_back(share)
        self._update(batches, 0)
        return [*norms, self._optimizer_step(0)]

    def _optimizer_step(self, update: int) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"Trainer: gradient norm must be finite, got {float(norm)} at iteration "
                f"{self.iteration}, update {update}; this update changed no weight"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _averages(self) -> dict[str, Ema]:
        both = {"ema": self.ema, "sampler": self.sampler}
        return {name: average for name, average in both.items() if average is not None}

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a block in which the module has its EMA weights, if the run keeps any."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save(self) -> Path:
        """Writes a checkpoint of the current iteration and returns its folder."""
        tensors = {
            "model": dict(self.model.module.state_dict()),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
        }
        for name, average in self._averages().items():
            tensors[name] = average.tensors()
        state = {
            **self.folder.identity,
            "cpu_s": self.cpu_s,
            "noise_floor": self.noise_floor,
        }
        keep = self.config.keep_checkpoints
        return checkpoint.save(self.folder.path, self.iteration, tensors, state, keep)

    def _evaluation(self) -> Metrics:
        assert self.evaluate is not None
        with self.averaged():
            return {f"eval/{k}": float(v) for k, v in self.evaluate(self.model).items()}

    def _log(self, metrics: Metrics) -> None:
        self.folder.log(metrics)
        for callback in self.callbacks:
            callback(metrics)

    def _restore(self, newest: Path) -> None:
        state = checkpoint.load_state(newest)
        check_same(newest, state, self.folder.identity)
        checkpoint.require(newest / "state.json", state, cpu_s=float, noise_floor=(float, None))
        module = self.model.module
        weights = checkpoint.load_tensors(newest, "model", like=module.state_dict())
        moments = checkpoint.load_moments(newest, self.parameters)
        for name, average in self._averages().items():
            tensors = checkpoint.load_tensors(newest, name, like=module.state_dict())
            average.load(tensors, updates=int(state["iteration"]))
        module.load_state_dict(weights)
        checkpoint.load_optimizer(self.optimizer, moments)
        self.iteration, self.cpu_s = int(state["iteration"]), float(state["cpu_s"])
        self.noise_floor = state["noise_floor"]
