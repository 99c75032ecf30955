"""The embedded trainer: iterations, evaluation, log and checkpoints; resumable bit for bit.

`learner.Learner` has what an iteration does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from branchcore import checkpoint
from branchcore.distributed import Ranks
from branchcore.learner import Learner
from branchcore.metrics import bar_text
from branchcore.model import Model
from branchcore.parallel import ParallelConfig
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Reward
from branchcore.run_folder import RunFolder, check_same, identity
from branchcore.trainer_config import TrainerConfig

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
        ranks: processes of the run; None = this one alone.
        parallel: how weights are spread over them.

    Raises:
        ValueError: `out` holds another run, or a checkpoint of another model or recipe.
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
    ) -> None:
        self.recipe, self.config, self.ranks = recipe, config, ranks or Ranks()
        self.evaluate, self.callbacks = evaluate, callbacks
        self.learner = Learner(
            model, prompts, reward, recipe, config, self.ranks, parallel or ParallelConfig()
        )
        self.model, self.prompts = model, self.learner.prompts
        self.iteration, self.cpu_s = 0, 0.0
        self.folder = RunFolder(
            out, identity(config, recipe, self.prompts, facts or {}), resume=resume
        )
        newest = checkpoint.latest(self.folder.path)
        if newest is not None:
            self._restore(newest)
        self.folder.forget_after(self.iteration)

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
        cpu = time.process_time()
        metrics = self.learner.step(self.iteration)
        self.iteration += 1
        self.cpu_s += time.process_time() - cpu
        return {"iteration": self.iteration, **metrics, "cpu_s": self.cpu_s}

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a block in which the module has its EMA weights, if the run keeps any."""
        return self.learner.averaged()

    def save(self) -> Path:
        """Writes a checkpoint of the current iteration and returns its folder."""
        learner = self.learner
        tensors = {
            "model": checkpoint.trained(self.model.module),
            "optimizer": checkpoint.optimizer_tensors(learner.optimizer),
        }
        tensors |= {name: average.tensors() for name, average in learner.averages.items()}
        tensors |= {"masters": learner.masters.copies} if learner.masters.copies else {}
        state = {**self.folder.identity, "cpu_s": self.cpu_s, "noise_floor": learner.noise_floor}
        state["pruning"] = learner.ledger.state()
        where = self.folder.path, self.iteration
        return checkpoint.save(*where, tensors, state, self.config.keep_checkpoints)

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
        kinds = {"cpu_s": float, "noise_floor": (float, None), "pruning": dict}
        checkpoint.require(newest / "state.json", state, **kinds)
        learner = self.learner
        learner.ledger.load(state["pruning"], newest / "state.json")
        module, copies = self.model.module, learner.masters.copies
        like = checkpoint.trained(module)
        weights = checkpoint.load_tensors(newest, "model", like)
        moments = checkpoint.load_moments(newest, learner.masters.parameters)
        masters = checkpoint.load_tensors(newest, "masters", copies) if copies else {}
        for name, average in learner.averages.items():
            average.load(checkpoint.load_tensors(newest, name, like), int(state["iteration"]))
        module.load_state_dict(weights, strict=False)
        learner.masters.load(masters)
        checkpoint.load_optimizer(learner.optimizer, moments)
        self.iteration, self.cpu_s = int(state["iteration"]), float(state["cpu_s"])
        learner.noise_floor = state["noise_floor"]
