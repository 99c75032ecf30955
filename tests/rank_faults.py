"""Runs of a toy on several processes in which one fails, as `test_rank_faults` starts them."""

import copy
import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from branchcore import checkpoint, recipes, schedule
from branchcore.metrics import repeatable
from branchcore.parallel import ParallelConfig
from branchcore.rewards import waiting
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SG = schedule.shifted_linear(5)
PROMPTS = ["a", "b", "c", "d", "e"]
CONFIG = TrainerConfig(
    iterations=4, prompts_per_iteration=4, lr=1e-3, ema_decay=0.9, checkpoint_every=1
)
BAD = 1
"""The iteration, from 0, in which something fails."""


def net(generator):
    layers = nn.Sequential(nn.Linear(17, 24), nn.SiLU(), nn.Linear(24, 15)).double()
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layers


class Toy:
    """A float64 velocity field; a view with other prompts is another object."""

    latent_shape = (3, 5)

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.module, self.base = net(generator), net(generator)
        self.prompts = PROMPTS[:1]
        self.spoil = lambda v: v
        """What becomes of a velocity."""

    def with_prompts(self, prompts):
        view = copy.copy(self)
        view.prompts = list(prompts)
        return view

    def decode(self, latents):
        return latents

    def velocity(self, x, sigma, prompt):
        return self.spoil(self._call(self.module, x, sigma, prompt))

    def reference_velocity(self, x, sigma, prompt):
        return self._call(self.base, x, sigma, prompt)

    def _call(self, layers, x, sigma, prompt):
        code = torch.tensor([ord(p) - 97 for p in self.prompts])[prompt]
        extra = torch.stack([sigma, 0.1 * code.to(x)], 1)
        return layers(torch.cat([x.flatten(1), extra], 1)).view(x.shape)


def reward(images, prompts):
    shift = torch.tensor([ord(p) for p in prompts]) % 3
    flat = images.flatten(1)
    return {"mean": -(flat.mean(1) - 0.2 * shift).abs(), "spread": 5.0 - flat.std(1)}


class Outcome(NamedTuple):
    """How a run ended on one process."""

    error: str
    rows: list
    weights: np.ndarray
    newest: int
    """Iteration of the newest checkpoint."""
    preempted: bool


REPLICATE = ParallelConfig(kind="replicate")
RESHARD = ParallelConfig(kind="shard", reshard=True)


def build(
    out, ranks=None, the_reward=reward, resume=False, callbacks=(), parallel=REPLICATE, **options
):
    config = dataclasses.replace(CONFIG, **options)
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7, kl=0.05)
    trainer = Trainer(
        Toy(), PROMPTS, the_reward, recipe, config, out,
        callbacks=callbacks, resume=resume, ranks=ranks,
        parallel=parallel,
    )  # fmt: skip
    trainer.learner.pace.dtype = torch.float64
    return trainer


def rows(out):
    log = Path(out) / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [repeatable(json.loads(line)) for line in lines]


def weights(trainer):
    """Everything in one row; a collective where weights are sharded, empty if it fails."""
    try:
        whole = [
            p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
            for p in trainer.model.module.parameters()
        ]
    except RuntimeError:
        return np.zeros(0)
    return torch.cat([p.detach().flatten() for p in whole]).numpy().copy()


def finish(trainer):
    """Runs to the end, whichever it is."""
    error = ""
    try:
        trainer.run()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    newest = checkpoint.latest(trainer.folder.path)
    return Outcome(
        error,
        rows(trainer.folder.path),
        weights(trainer),
        -1 if newest is None else int(newest.name.split("-")[-1]),
        trainer.preemption.asked,
    )


def alone(out, **options):
    return finish(build(out, **options))


# faults that all processes survive ---------------------------------------------------------------


def bad_velocity(trainer, mine, iterations):
    def spoil(v):
        return v * math.nan if mine and trainer.iteration in iterations else v

    trainer.model.spoil = spoil


def bad_gradient(trainer, mine, iterations):
    def spoil(gradient):
        return gradient * math.nan if mine and trainer.iteration in iterations else gradient

    next(trainer.model.module.parameters()).register_hook(spoil)


NUMBERS = {"velocity": bad_velocity, "gradient": bad_gradient}


def bad_numbers(ranks, out):
    """Every fault of `NUMBERS` on rank 1 (or alone), where updates may be skipped and where not."""
    found = {}
    for kind, spoil in NUMBERS.items():
        for limit, iterations in ((0, {BAD}), (2, {BAD}), (2, {0, 1, 2})):
            name = f"{kind}, {limit}, {len(iterations)}"
            trainer = build(Path(out) / name, ranks, bad_updates=limit)
            spoil(trainer, ranks.alone or ranks.rank == 1, iterations)
            found[name] = finish(trainer)
            ranks.gather(None)
    return found


class Faulty:
    """The toy's reward; in one iteration some of its calls fail."""

    def __init__(self, how, calls=0):
        self.how, self.left, self.trainer, self.kept = how, calls, None, []
        self.worst, self.hangs = None, 0

    def __call__(self, images, prompts):
        if self.trainer.iteration == BAD and self.left > 0:
            self.left -= 1
            if self.how == "hang":
                self.hangs += 1
                Event().wait(1.0)
            raise OSError("gone")
        if self.how == "leaf" and self.trainer.iteration == BAD:
            sums = images.flatten(1).sum(1).tolist()
            self.worst = min(sums) if self.worst is None else self.worst
            if self.worst in sums:
                raise OSError("no score")
        return reward(images, prompts)


class Kept:
    """Remembers the scores of a reward's whole batches, NaN where there is none."""

    def __init__(self, scored):
        self.scored, self.scores = scored, []

    def __call__(self, images, prompts):
        found = self.scored(images, prompts)
        self.scores.append(found["spread"].numpy())
        return found


CASES = {
    "for good": (lambda: Faulty("raise", 99), {"reward_attempts": 1}),
    "twice": (lambda: Faulty("raise", 2), {}),
    "leaf": (lambda: Faulty("leaf"), {"reward_max_failed": 0.5}),
    "hangs for good": (lambda: Faulty("hang", 99), {"reward_timeout": 0.3, "reward_attempts": 2}),
    "hangs once": (lambda: Faulty("hang", 1), {"reward_timeout": 0.3}),
}


def bad_rewards(ranks, out):
    """Every case of `CASES` on rank 1; rank 0 and the run "quiet" have no fault."""
    waiting.pause = lambda seconds: None
    found = {}
    for name, (make, options) in {"quiet": (lambda: Faulty("none"), {}), **CASES}.items():
        faulty = make() if ranks.rank == 1 else Faulty("none")
        trainer = build(Path(out) / name, ranks, faulty, **options)
        faulty.trainer = trainer
        kept = Kept(trainer.learner.reward)
        trainer.learner.reward = kept
        found[name] = finish(trainer), kept.scores, faulty.hangs
        ranks.gather(None)
    return found


IN_STEP = {
    "velocity": {},
    "velocity, skipped": {"bad_updates": 2},
    "for good": {"reward_attempts": 1},
    "twice": {},
    "leaf": {"reward_max_failed": 0.5},
}


def in_step(ranks, out, rounds):
    """Faults on rank 1 where weights are gathered for every call."""
    waiting.pause = lambda seconds: None
    found = {}
    for name, options in {"quiet": {}, **IN_STEP}.items():
        make = CASES[name][0] if name in CASES and ranks.rank == 1 else lambda: Faulty("none")
        faulty = make()
        options = {"prompts_per_round": rounds, "prompts_per_iteration": 5, **options}
        trainer = build(Path(out) / name, ranks, faulty, parallel=RESHARD, **options)
        faulty.trainer = trainer
        bad_velocity(trainer, name.startswith("velocity") and ranks.rank == 1, {BAD})
        found[name] = finish(trainer)
        ranks.gather(None)
    return found


def failing_call(ranks, out, where, parallel):
    """An error in the middle of the calls of rank 1, which nobody expects there."""
    trainer = build(Path(out) / "run", ranks, parallel=parallel)
    calls = [0]

    def spoil(v):
        calls[0] += trainer.iteration == BAD and v.requires_grad == (where == "update")
        if calls[0] == 2 and ranks.rank == 1:
            raise MemoryError("no room")
        return v

    trainer.model.spoil = spoil
    start = time.monotonic()
    try:
        trainer.run()
    except Exception as error:
        left = time.monotonic() - start
        newest = checkpoint.latest(trainer.folder.path)
        raise type(error)(f"{error} [{newest}, {left:.0f} s]") from error


def bad_logs(ranks, out):
    """A log that cannot be written, and a callback that raises, both on rank 0 only."""

    def in_the_way(metrics):
        if metrics["iteration"] == BAD:
            log = Path(out) / "log" / "metrics.jsonl"
            log.rename(log.with_suffix(".old"))
            log.mkdir()

    def raises(metrics):
        if metrics["iteration"] == BAD:
            raise KeyError("callback")

    found = {}
    for name, callback in (("log", in_the_way), ("callback", raises)):
        found[name] = finish(build(Path(out) / name, ranks, callbacks=[callback]))
        ranks.gather(None)
    return found


# signals -----------------------------------------------------------------------------------------


class Signal:
    """Sends this process a signal the first time that it is somewhere in an iteration.

    Args:
        trainer: of the run.
        where: rollout, reward, update, reduce or save.
        number: the signal.
        iteration: from 0.
    """

    def __init__(self, trainer, where, number, iteration=BAD):
        self.trainer, self.number, self.iteration, self.sent_s = trainer, number, iteration, None
        learner = trainer.learner
        if where == "rollout":
            trainer.model.spoil = self.before(lambda v: v, calls=2)
        elif where == "reward":
            learner.reward = self.before(learner.reward)
        elif where == "update":
            parameter = next(trainer.model.module.parameters())
            parameter.register_hook(self.before(lambda gradient: gradient))
        elif where == "reduce":
            learner.parallel.reduce = self.before(learner.parallel.reduce)
        elif where == "save":
            self.iteration += 1
            trainer.checkpoints.save = self.before(trainer.checkpoints.save)
        else:
            raise ValueError(where)

    def before(self, act, calls=1):
        left = [calls]

        def acted(*args):
            left[0] -= self.trainer.iteration == self.iteration
            if left[0] == 0 and self.sent_s is None:
                self.sent_s = time.monotonic()
                if self.number is not None:
                    os.kill(os.getpid(), self.number)
            return act(*args)

        return acted


def signalled(ranks, out, where, number, iteration, whom):
    """Runs until a signal comes to some ranks; returns what happened after it and for how long."""
    trainer = build(out, ranks)
    mark = Signal(trainer, where, number if ranks.rank in whom else None, iteration)
    outcome = finish(trainer)
    return outcome, time.monotonic() - mark.sent_s


def preempted(ranks, out, wheres):
    """Runs that get SIGTERM, and what comes of them when they go on; `wheres` by name."""
    found = {}
    for name, (where, iteration, whom) in wheres.items():
        folder = Path(out) / name
        first = signalled(ranks, folder, where, signal.SIGTERM, iteration, whom)
        ranks.gather(None)
        again = finish(build(folder, ranks, resume=True))
        ranks.gather(None)
        found[name] = *first, again
    return found


def whole(ranks, out, resume=False):
    return finish(build(out, ranks, resume=resume))
