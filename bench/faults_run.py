"""One process of a training run whose reward and whose processes fail at random; see `faults`.

torchrun --standalone --nproc-per-node 2 --max-restarts 99 bench/faults_run.py OUT SEED
    ITERATIONS [--raises 0.02] [--hangs 0.005] [--pause 3]
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from branchcore import recipes
from branchcore.distributed import Ranks, joined
from branchcore.models.digits.task import DigitsTask
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

NAME = "branch_grpo"
EVERY = 25
HUNG_S = 3600.0
TIMEOUT_S = 10.0
"""Seconds that the reward may take."""
RANK_TIMEOUT_S = 60.0


def events(out: Path) -> Path:
    """Returns the file in which every process notes what it made fail."""
    return out.with_suffix(".events")


def note(out: Path, rank: int, what: str) -> None:
    """Appends an event, with the process's id, so that it can be killed."""
    row = {"time": time.time(), "rank": rank, "pid": os.getpid(), "what": what}
    with events(out).open("a") as file:
        file.write(json.dumps(row) + "\n")


class Faulty:
    """A reward that raises or hangs at random, and takes a while as a served one does.

    Args:
        reward: the real one.
        raises: probability that a call raises.
        hangs: probability that a call does not come back.
        pause: seconds that every call takes beside its computation.
        tell: called with what happens.
    """

    def __init__(
        self,
        reward: Callable[[Tensor, list[str]], dict[str, Tensor]],
        raises: float,
        hangs: float,
        pause: float,
        tell: Callable[[str], None],
    ) -> None:
        self.reward, self.raises, self.hangs, self.pause = reward, raises, hangs, pause
        self.tell, self.random = tell, np.random.default_rng()

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Scores images, or fails."""
        drawn = self.random.random()
        if drawn < self.raises:
            self.tell("raise")
            raise ConnectionError("the reward's server does not answer")
        if drawn < self.raises + self.hangs:
            self.tell("hang")
            time.sleep(HUNG_S)
        time.sleep(self.pause)
        return self.reward(images, prompts)


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """Trains one process's share, from the newest checkpoint if there is one."""
    task = DigitsTask()
    preset = task.presets[NAME]
    fields = {
        **preset.trainer,
        "iterations": args.iterations,
        "evaluate_every": EVERY,
        "checkpoint_every": 1,
        "reward_timeout": TIMEOUT_S,
        "reward_attempts": 3,
        "reward_max_failed": 0.05,
    }

    def tell(what: str) -> None:
        note(args.out, ranks.rank, what)

    tell("start")
    Trainer(
        task.model,
        task.prompts,
        Faulty(task.reward, args.raises, args.hangs, args.pause, tell),
        recipes.build(NAME, task.sigmas, **preset.recipe),
        TrainerConfig(**fields, seed=args.seed),
        args.out,
        evaluate=task.evaluate,
        facts={"model": "digits"},
        resume=True,
        ranks=ranks,
    ).run()


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="A run that fails at random.")
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("iterations", type=int)
    parser.add_argument("--raises", type=float, default=0.0)
    parser.add_argument("--hangs", type=float, default=0.0)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    with joined("cpu", RANK_TIMEOUT_S) as ranks:
        train(args, ranks)


if __name__ == "__main__":
    main()
