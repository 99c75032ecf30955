"""What a rollout leaves behind: kept states, noise names, velocities, tape.

Letters: M rows of the plan, D latent elements, S kept states, L leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore.masked_backward import MaskedBackward
from branchcore.noise import LATENT, Noise
from branchcore.plan import Ints, Plan


class Stop(NamedTuple):
    """Where a rollout asks which branches go on, and who answers."""

    depths: Sequence[int]
    """Levels of the plan, each with something to stop."""
    choose: Callable[[int, Ints, Tensor], NDArray[np.bool_]]
    """(depth, (N,) nodes, (N, D) previews x0 = x - sigma v) -> (N,) which go on. The nodes are
    those whose branches are grown and have a leaf to come."""


@dataclass
class TapePart:
    """Velocities of some nodes, still attached to the graph that made them."""

    nodes: Ints
    """(n,) rows of the plan."""
    velocity: Tensor
    """(n, D) with its graph."""


@dataclass(kw_only=True)
class Forest:
    """A plan and what its rollout kept: states of leaves and trained nodes, velocities, tape."""

    plan: Plan
    sigma: Tensor
    """(M,) noise levels on the device, dtype of the states."""
    prompt: Tensor
    """(M,) int64 prompt indices on the device."""
    noise: Noise
    """Noise of all M edges: replayed by the objective, never stored."""
    x: Tensor
    """(S, D) kept states."""
    slot: Ints
    """(M,) row in `x`, -1 where the state was not kept."""
    log_prob: Tensor
    """(M,) log-probability of every edge, nats per latent element; 0 on deterministic ones."""
    velocity: Tensor | None
    """(S, D) rollout velocities in the slots of trained nodes; kept for updates after the first."""
    evaluated: NDArray[np.bool_]
    """(M,) nodes whose velocity the rollout computed."""
    alive: NDArray[np.bool_]
    """(M,) False from a node on whose branch was stopped; states below it are 0."""
    tape: list[TapePart] = field(default_factory=list[TapePart])
    masked: MaskedBackward | None = None
    """What counts the rows of the tape's backwards, if they leave out rows without a gradient."""
    calls: int = 0
    """Model calls of the rollout."""

    @property
    def leaves(self) -> Tensor:
        """(L, D) states of the leaves in the plan's leaf order; 0 where a branch was stopped."""
        return self.states(np.flatnonzero(self.plan.leaf))

    def states(self, nodes: Ints) -> Tensor:
        """Returns (n, D) kept states of nodes."""
        return self.x[torch.from_numpy(self.slot[nodes]).to(self.x.device)]


def edge_noise(
    plan: Plan, uids: Sequence[int], seed: int, iteration: int, device: torch.device | str
) -> Noise:
    """Returns the noise names of all M edges: a pure function of (seed, iteration, uid, stream)."""
    uid = np.asarray(uids, dtype=np.int64)
    if uid.shape != (plan.num_prompts,):
        raise ValueError(f"rollout: uids must be ({plan.num_prompts},), got {uid.shape}")
    if uid.min() < 0 or uid.max() >= 2**31:
        raise ValueError(f"rollout: uids must be in [0, 2**31), got {uid.min()} to {uid.max()}")
    for name, word in (("seed", seed), ("iteration", iteration)):
        if not 0 <= word < 2**32:
            raise ValueError(f"rollout: {name} must be in [0, 2**32), got {word}")
    counter = np.concatenate([plan.stream, uid[plan.prompt][:, None]], axis=1).astype(np.int32)
    return Noise(
        key=torch.tensor([seed, iteration, LATENT], dtype=torch.int64).to(device),
        counter=torch.from_numpy(counter).to(device),
        mix=torch.from_numpy(plan.mix).to(device),
    )


def noise_rows(noise: Noise, lo: int, hi: int) -> Noise:
    """Returns the noise of rows lo..hi - 1."""
    return Noise(noise.key, noise.counter[lo:hi], noise.mix[lo:hi])


def stoppable(plan: Plan, depth: int) -> Ints:
    """Returns the nodes of a level whose branches can be stopped: evaluated, with leaves to come.

    Raises:
        ValueError: there is none, or one of them is a leaf itself.
    """
    inner = plan.evaluated & (plan.leaves_below > plan.leaf)
    nodes = np.flatnonzero(inner & (plan.depth == depth))
    if not len(nodes):
        raise ValueError(
            "rollout: stop must be at depths with nodes above leaves, in "
            f"0..{plan.depth[inner].max(initial=0)}, got {depth}"
        )
    if plan.leaf[nodes].any():
        row = int(nodes[np.argmax(plan.leaf[nodes])])
        raise ValueError(
            f"rollout: stop must be at depths whose nodes with leaves below are no leaves, got "
            f"{depth} with row {row}; try another depth"
        )
    return nodes


def end_branches(forest: Forest, stop: Stop, depth: int, nodes: Ints, x: Tensor, v: Tensor) -> None:
    """Asks which branches of a level go on; marks the others and all that is below them.

    Args:
        forest: while it grows.
        stop: who answers.
        depth: of the level.
        nodes: of `stoppable`; those that an earlier answer ended are not asked about again.
        x: (N, D) states of the whole level.
        v: (N, D) their velocities.

    Raises:
        ValueError: the answer is not one bool per node.
    """
    plan, alive = forest.plan, forest.alive
    nodes = nodes[alive[nodes]]
    if not len(nodes):
        return
    lo, hi = plan.levels()[depth]
    index, rows = upload([nodes, nodes - lo], x.device)
    x0 = x[rows] - forest.sigma[index, None] * v[rows]
    goes_on = np.asarray(stop.choose(depth, nodes, x0))
    if goes_on.dtype != np.bool_ or goes_on.shape != nodes.shape:
        raise ValueError(
            f"rollout: stop must choose ({len(nodes)},) of True or False, got {goes_on.shape} "
            f"{goes_on.dtype}"
        )
    alive[nodes[~goes_on]] = False
    for first, last in plan.levels()[depth + 1 :]:
        alive[first:last] &= alive[plan.parent[first:last]]
    forest.evaluated[hi:] &= alive[hi:]
    gone = forest.slot[hi:][~alive[hi:]]
    forest.x[torch.from_numpy(gone[gone >= 0]).to(x.device)] = 0.0


def kept_slots(plan: Plan) -> Ints:
    """Returns (M,) slots of the states a forest keeps: leaves and trained nodes; -1 elsewhere.

    A matching edge is also about the image it was re-noised from.
    """
    kept = plan.leaf.copy()
    edges = plan.trained()
    kept[plan.action[edges]] = True
    kept[plan.parent[edges[plan.matching[edges]]]] = True
    return np.where(kept, np.cumsum(kept) - 1, -1)


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device | str) -> list[Tensor]:
    """Copies 1-d arrays, all integer or all float64, to the device at once and returns views."""
    if not arrays:
        return []
    flat = np.concatenate(arrays)
    flat = flat if flat.dtype == np.float64 else flat.astype(np.int64)
    return list(torch.from_numpy(flat).to(device).split([len(a) for a in arrays]))
