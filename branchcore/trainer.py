"""The embedded trainer: iterations, evaluation, log and checkpoints; resumable bit for bit.

`learner.Learner` has what an iteration does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from branchcore import checkpoint, run_records
from branchcore.advice import Advice, clip_of
from branchcore.checkpoint import Checkpoints
from branchcore.clock import STAGES, skew
from branchcore.distributed import Ranks
from branchcore.learner import Learner
from branchcore.model import Model
from branchcore.parallel import ParallelConfig
from branchcore.plots import read_metrics
from branchcore.policy import BadUpdate
from branchcore.preemption import Preempted, Preemption
from branchcore.progress import Shown, chosen_view, progress_of
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward
from branchcore.run_folder import RunFolder, check_same, identity
from branchcore.run_state import RunState
from branchcore.trainer_config import TrainerConfig
from branchcore.watch import timed

Metrics = dict[str, Any]


class Trainer:
    """Trains a flow model with a recipe and writes metrics.jsonl and checkpoints to a folder.

    ```python
    import torch

    import branchcore as bc


    class Policy:  # a `branchcore.model.Model` of 2 x 2 latents, which are its images too
        latent_shape = (4,)
        module = torch.nn.Linear(4, 4)

        def with_prompts(self, prompts):
            return self

        def velocity(self, x, sigma, prompt):
            return self.module(x)

        def decode(self, latents):
            return latents


    recipe = bc.recipes.build("flow_grpo", bc.schedule.shifted_linear(4), kl=0.0)
    config = bc.TrainerConfig(iterations=2, prompts_per_iteration=1, lr=1e-2)
    trainer = bc.Trainer(
        Policy(), ["a cat"], lambda images, texts: {"bright": images.mean(1)}, recipe, config, "run"
    )
    trainer.run()
    ```

    On several processes every one makes a trainer with the same arguments; the first one writes.

    Args:
        model: the policy.
        prompts: data set of prompts.
        reward: scores decoded leaves.
        recipe: the method.
        config: the run.
        out: folder of the run.
        evaluate: held-out measures of the model (EMA weights if there are), by name.
        callbacks: called with every iteration's metrics, after they are logged, by rank 0.
        facts: what else identifies the run (the model, say); must agree on resume.
        resume: continue the run in `out` from its newest whole checkpoint.
        ranks: processes of the run; None = this one alone.
        parallel: how weights are spread over them.
        view: what rank 0 shows of the run: bar, live (in a terminal, with rich), auto or none.

    Raises:
        ValueError: `out` holds another run, or a checkpoint of another model or recipe.
        RuntimeError: there is no terminal, or no rich, for a live view.
        TypeError, NotImplementedError: `max_tokens` of a model that does not count tokens.
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
        ranks: Ranks | None = None,
        parallel: ParallelConfig | None = None,
        view: str = "bar",
    ) -> None:
        self.recipe, self.config, self.ranks = recipe, config, ranks or Ranks()
        self.evaluate, self.callbacks = evaluate, callbacks
        self.view = chosen_view(view if self.ranks.main else "none")
        self.preemption = Preemption()
        self.learner = Learner(
            model,
            prompts,
            reward,
            recipe,
            config,
            self.ranks,
            parallel or ParallelConfig(),
            self.preemption.check,
        )
        self.model, self.prompts = model, self.learner.prompts
        self.watch, self.advice = self.learner.watch, Advice(clip_of(recipe.objective))
        self._state = RunState(self.learner, reward)
        self.iteration, self.cpu_s, self.skipped, self._bad = 0, 0.0, 0, 0
        self.forecast: Mapping[str, float] = {}
        """Logged with the first iteration from now on, beside what it measured."""
        self.folder = RunFolder(
            out, identity(config, recipe, self.prompts, facts or {}), resume=resume
        )
        self.checkpoints = Checkpoints(self.folder.path, config.keep_checkpoints)
        newest = self.checkpoints.latest()
        if newest is not None:
            self._restore(newest)
        if self.ranks.main:
            self.folder.forget_after(self.iteration)
            run_records.forget_after(self.folder.path, self.iteration)
        self.checkpoints.tidy()
        self._session = run_records.session(
            self.learner.device,
            after=self.iteration,
            iterations=config.iterations,
            processes=self.ranks.world_size,
        )
        if self.iteration:
            self.advice.replay(read_metrics(self.folder.log_path))

    def run(self) -> None:
        """Trains to the configured number of iterations; the last checkpoint is whole then.

        SIGTERM ends it early, with a checkpoint of what is finished; `preemption.asked` tells.
        """
        with self.preemption.listening(), self.ranks.collecting():
            try:
                self._run()
            except Preempted:
                # nothing to keep before the first iteration is through
                newest = checkpoint.folder_of(self.folder.path, self.iteration)
                self.checkpoints.wait()
                if self.iteration and newest != self.checkpoints.latest():
                    self.save()
            except BaseException as error:
                self.checkpoints.end(error)
                raise
            self.checkpoints.wait()

    def _run(self) -> None:
        todo = range(self.iteration, self.config.iterations)
        first: Metrics = {}
        self.watch.begin()
        with progress_of(self.view, self._shown()) as progress:
            if self.iteration == 0 and self.evaluate is not None:
                first = {"iteration": 0, **self._evaluation(), **self._measured()}
                progress.row(first)
            for _ in todo:
                due = self._due(self.iteration + 1)
                self.learner.tree.expect(self.ranks.main and (due or self.iteration == 0))
                metrics = self._iterate()
                last = self.iteration == self.config.iterations
                if self.evaluate and due:
                    metrics |= self._evaluation()
                metrics |= {**self._measured(), **self.forecast}
                self.forecast = {}
                if first:
                    self._log(first)
                    first = {}
                progress.row(self._log(metrics))
                if last or self.iteration % self.config.checkpoint_every == 0:
                    self.save()

    def _shown(self) -> Shown:
        """Returns what a view knows of the run before its first row."""
        every, model = self.config.evaluate_every, self.folder.identity["facts"].get("model")
        return Shown(
            title=self.recipe.name + (f" on {model}" if isinstance(model, str) else ""),
            out=str(self.folder.path),
            begun=self.iteration,
            iterations=self.config.iterations,
            checkpoint_every=self.config.checkpoint_every,
            evaluate_every=None if self.evaluate is None else every,
            clip=self.advice.clip,
            stage=lambda: self.watch.clock.current,
            rows=read_metrics(self.folder.log_path) if self.iteration else (),
        )

    def _due(self, iteration: int) -> bool:
        """Tells whether an iteration is one to look at: to evaluate, and to keep a tree of."""
        return iteration == self.config.iterations or iteration % self.config.evaluate_every == 0

    def step(self) -> Metrics:
        """Runs one iteration and returns its metrics.

        Raises:
            BadUpdate: something was not finite once more than `TrainerConfig.bad_updates` allows.
        """
        return self._iterate() | self._measured()

    def _measured(self) -> Metrics:
        """Returns what this process measured since the last row, and how others differ in it."""
        row = self.watch.row()
        if self.ranks.alone:
            return row
        # all stages: where one process failed, the others were in more of them
        mine = [float(row.get(f"time/{stage}", 0.0)) for stage in STAGES]
        return row | skew(self.ranks.stack(np.array(mine)), STAGES)

    def _iterate(self) -> Metrics:
        cpu = time.process_time()
        try:
            metrics = self.learner.step(self.iteration)
            self._bad = 0
        except BadUpdate as error:
            self._bad += 1
            self.skipped += 1
            if self._bad > self.config.bad_updates:
                raise
            metrics = {"skipped": str(error)}
        self.iteration += 1
        self.cpu_s += time.process_time() - cpu
        counted = {"skipped_updates": self.skipped} if self.config.bad_updates else {}
        return {"iteration": self.iteration, **metrics, **counted, "cpu_s": self.cpu_s}

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a block in which the module has its EMA weights, if the run keeps any."""
        return self.learner.averaged()

    @timed("checkpoint")
    def save(self) -> Path:
        """Starts a checkpoint of the current iteration; it is whole after `checkpoints.wait()`.

        Raises:
            OSError: the one before could not be written.
        """
        counts = {"cpu_s": self.cpu_s, "skipped": self.skipped, "skipped_in_a_row": self._bad}
        measured = {"noise_floor": self.learner.floor.value, "flop": self.watch.state()}
        facts = {**self.folder.identity, **counts, **measured}
        return self._state.save(self.checkpoints, self.iteration, facts)

    @timed("evaluation")
    def _evaluation(self) -> Metrics:
        assert self.evaluate is not None
        with self.averaged():
            return {f"eval/{k}": float(v) for k, v in self.evaluate(self.model).items()}

    @timed("callbacks")
    def _log(self, metrics: Metrics) -> Metrics:
        """Writes a row and returns it with its warnings; what fails on rank 0 fails on all."""

        def write() -> Metrics:
            row = self.advice.warn(metrics)
            self.folder.log(row)
            self._record(row["iteration"])
            for callback in self.callbacks:
                callback(row)
            return row

        return self.ranks.together(write if self.ranks.main else lambda: metrics)

    def _record(self, iteration: int) -> None:
        """Keeps what rows do not hold: a first row's session, the tree of an iteration."""
        if self._session:
            run_records.add_session(self.folder.path, self._session)
            self._session = {}
        if iteration:
            self.learner.tree.write(self.folder.path, iteration)

    def _restore(self, newest: Path) -> None:
        state = self.checkpoints.load_state(newest)
        check_same(newest, state, self.folder.identity)
        counts = {"cpu_s": float, "skipped": int, "skipped_in_a_row": int}
        measured = {"noise_floor": (float, None), "flop": list}
        checkpoint.require(newest / "state.json", state, **counts, **measured)
        self._state.load(self.checkpoints, newest, state)
        self.iteration, self.cpu_s = int(state["iteration"]), float(state["cpu_s"])
        self.skipped, self._bad = int(state["skipped"]), int(state["skipped_in_a_row"])
        self.learner.floor.value = state["noise_floor"]
        self.watch.load(state["flop"])
