"""Noise as a function: what names a draw, and the host's own random numbers.

A latent draw is Philox4x32-10 [Salmon et al. 2011] with counter words (element block, purpose,
stream, uid) and key words (seed, iteration), then Box-Muller; the specification is
`branchcore.reference.philox_normal`.
Nothing is stored and nothing depends on batch size, chunking or the number of ranks.
Letters: M nodes = edges.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

LATENT, RECIPE, SHARED, PRUNING = 0, 1, 2, 3
NO_STREAM = -1
STOPPING_LANE = 2**32 - 1
"""Of PRUNING: coins of branches that may be stopped during the rollout."""


class Noise(NamedTuple):
    """The names of M draws: eps = mix0 * normal(own stream) + mix1 * normal(shared stream).

    A stream of -1 draws nothing: its part is exactly 0.
    """

    key: Tensor
    """(3,) int64: seed, iteration, purpose, each in [0, 2**32)."""
    counter: Tensor
    """(M, 3) int32: own stream, stream shared with siblings, prompt uid; stream -1 = none."""
    mix: Tensor
    """(M, 2) float64: weights of the own and of the shared stream."""


def host_generator(
    seed: int, iteration: int, uid: int, purpose: int = RECIPE, *, lane: int = 0
) -> np.random.Generator:
    """Make the host's random numbers of one prompt and iteration, a pure function of its arguments.

    Args:
        seed: seed of the run.
        iteration: training iteration.
        uid: global sample position of the prompt, the same on any number of ranks.
        purpose: what the numbers are for; RECIPE = a prompt's windows and random subsets, prompt
            order; SHARED = what all prompts of an iteration agree on; PRUNING = coins.
        lane: one of the purpose's independent streams; lane 0 of PRUNING is about the prompt,
            lane 1 + n about the parents of pass n, STOPPING_LANE about branches.

    Source: numpy's Philox4x64-10; its stream is unrelated to the latents' Philox4x32-10.
    """
    for name, word in (("seed", seed), ("iteration", iteration), ("uid", uid)):
        if not 0 <= word < 2**32:
            raise ValueError(f"host_generator: {name} must be in [0, 2**32), got {word}")
    return np.random.Generator(
        np.random.Philox(key=[seed, iteration], counter=[0, purpose, lane, uid])
    )
