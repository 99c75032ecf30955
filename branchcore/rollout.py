"""Runs a plan: wave by wave, every node evaluated once, all children of a wave in one launch.

Letters: M rows of the plan, N nodes of a wave, D latent elements, S kept states. Nothing in the
loop reads a value from the device; finiteness is checked once, after the last wave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchcore import ops
from branchcore.forest import (
    Forest,
    Stop,
    TapePart,
    edge_noise,
    end_branches,
    kept_slots,
    noise_rows,
    stoppable,
    upload,
)
from branchcore.masked_backward import MaskedBackward
from branchcore.model import VelocityModel, call_velocity
from branchcore.noise import Noise
from branchcore.packing import balanced_chunks
from branchcore.plan import Ints, Plan
from branchcore.waves import Chunk, Wave, waves_of


def rollout(
    plan: Plan,
    model: VelocityModel,
    uids: Sequence[int],
    *,
    seed: int,
    iteration: int = 0,
    tape: int = 0,
    max_batch: int | None = None,
    keep_velocity: bool | None = None,
    off_tape: NDArray[np.bool_] | None = None,
    masked_backward: bool = False,
    given: Tensor | None = None,
    stop: Stop | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Forest:
    """Grows all trees of a plan.

    Args:
        plan: trees of all prompts of the call.
        model: its prompts are the plan's prompts.
        uids: (num_prompts,) global sample positions; noise depends on nothing else of a prompt.
        seed: of the run.
        iteration: of the run.
        tape: how many trained nodes of the first update keep their graph; their training forward
            is then this one. The first in plan order.
        max_batch: rows of a model call at most; None = a whole wave.
        keep_velocity: store the velocities of trained nodes as v_old; None = if the plan has later
            updates, which need them: re-noised states of later updates are then evaluated too.
        off_tape: (M,) nodes that are known to be pruned from the first update: never on the tape.
        masked_backward: rows of the tape that later get no gradient cost little; `MaskedBackward`.
        given: (num_prompts, n, D) states of `Tree.given` roots; a root takes the row that its
            stream names, so that sharing and dead roots do not move it.
        stop: at these depths, once their velocities are known, branches may end: nothing below is
            evaluated or kept, and noise and states of the others stay as they are.
        dtype: of the states; float32 (bf16 rounding would move the ratio), or float64 in tests.
        device: where the model lives.

    Returns:
        Forest; its noise is identical for any max_batch, prompt order and number of processes.

    Raises:
        ValueError: uids, given states or the model's result have the wrong shape, or nothing can
            be stopped at a depth of `stop`.
        TypeError: dtype, or the model's result is no float tensor.
        FloatingPointError: a velocity is NaN or Inf; names node, sigma and prompt.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rollout: dtype must be float32 or float64, got {dtype}")
    if tape < 0:
        raise ValueError(f"rollout: tape must be >= 0 nodes, got {tape}")
    evaluated, keep_velocity = _evaluated(plan, keep_velocity)
    trained = plan.action[plan.trained(0)]
    on_tape = np.zeros(len(plan), dtype=bool)
    left = trained if off_tape is None else trained[~off_tape[trained]]
    on_tape[np.unique(left[plan.evaluated[left]])[:tape]] = True
    checkpoints = {} if stop is None else {d: stoppable(plan, d) for d in stop.depths}
    slot = kept_slots(plan)
    waves = waves_of(plan, slot, evaluated, on_tape, max_batch, device)
    noise = edge_noise(plan, uids, seed, iteration, device)
    run = _Run(plan, model, noise, slot, evaluated, keep_velocity, dtype, device)
    run.forest.masked = MaskedBackward() if masked_backward else None
    x, past = run.root_states(given), _Past(None, None)
    for depth in range(len(waves)):
        wave = waves[depth]
        if len(wave.kept):
            run.forest.x[wave.kept_slots] = x[wave.kept]
        v = run.evaluate(wave, x)
        if stop is not None and v is not None and depth in checkpoints:
            run.check_finite()
            end_branches(run.forest, stop, depth, checkpoints[depth], x, v)
            left = np.where(run.forest.alive, slot, -1)
            waves = waves_of(plan, left, evaluated, on_tape, max_batch, device)
        x, past = run.grow(wave, x, v, past)
    run.check_finite()
    return run.forest


def num_calls(plan: Plan, *, max_batch: int | None, keep_velocity: bool | None) -> int:
    """Returns the model calls of a rollout without a tape and stops; arguments as there."""
    evaluated = _evaluated(plan, keep_velocity)[0]
    counts = [int(evaluated[lo:hi].sum()) for lo, hi in plan.levels()]
    return sum(len(balanced_chunks(count, max_batch)) for count in counts)


def _evaluated(plan: Plan, keep_velocity: bool | None) -> tuple[NDArray[np.bool_], bool]:
    """Returns (M,) nodes that get a velocity, and whether it is stored."""
    read_later = np.flatnonzero(plan.train & ((plan.update > 0) | bool(keep_velocity)))
    evaluated = plan.evaluated.copy()
    stored = plan.num_updates > 1 if keep_velocity is None else keep_velocity
    if stored:
        evaluated[plan.action[read_later]] = True
    return evaluated, stored


class _Past(NamedTuple):
    """x0 predictions of the parents of a level's nodes and of their parents, where asked for."""

    h: Tensor | None
    h2: Tensor | None


class _Run:
    """One rollout's device tables and the forest it fills."""

    def __init__(
        self,
        plan: Plan,
        model: VelocityModel,
        noise: Noise,
        slot: Ints,
        evaluated: NDArray[np.bool_],
        keep_velocity: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.plan, self.model, self.dtype = plan, model, dtype
        prompt, self.child_start, self.parent = upload(
            [plan.prompt, plan.child_start, plan.parent], device
        )
        self.row = torch.from_numpy(plan.row).to(device)
        self.older = torch.from_numpy(plan.older).to(device, dtype)
        self.num_elements = math.prod(model.latent_shape)
        x = torch.empty(int(slot.max()) + 1, self.num_elements, dtype=dtype, device=device)
        self.forest = Forest(
            plan=plan,
            sigma=torch.from_numpy(plan.sigma).to(device, dtype),
            prompt=prompt,
            noise=noise,
            x=x,
            slot=slot,
            log_prob=torch.zeros(len(plan), dtype=dtype, device=device),
            velocity=torch.zeros_like(x) if keep_velocity else None,
            evaluated=evaluated,
            alive=np.ones(len(plan), dtype=bool),
        )
        self.bad: list[tuple[Ints, Tensor]] = []

    def root_states(self, given: Tensor | None) -> Tensor:
        lo, hi = self.plan.levels()[0]
        is_given = self.plan.row[lo:hi, 3] == 0.0
        x = ops.philox_normal(noise_rows(self.forest.noise, lo, hi), self.num_elements, self.dtype)
        if given is None and not is_given.any():
            return x
        rows = lo + np.flatnonzero(is_given)
        prompt, row = self.plan.prompt[rows], self.plan.stream[rows, 0]
        needed = (self.plan.num_prompts, int(row.max(initial=-1)) + 1, self.num_elements)
        got = None if given is None else tuple(given.shape)
        fits = got is not None and len(got) == 3 and got[::2] == needed[::2] and got[1] >= needed[1]
        if given is None or not is_given.any() or not fits:
            wanted = f"{needed} or more rows" if is_given.any() else "None without given roots"
            raise ValueError(f"rollout: given must be {wanted}, got {got}")
        index = upload([rows - lo, prompt, row], x.device)
        x[index[0]] = given.to(x)[index[1], index[2]]
        return x

    def evaluate(self, wave: Wave, x: Tensor) -> Tensor | None:
        """Returns (N, D) velocities, zero where nobody reads them; None for a wave of leaves."""
        v: Tensor | None = None
        for chunk in wave.chunks:
            out = self._call(chunk, x)
            if len(chunk.nodes) == wave.hi - wave.lo:
                return out
            v = out.new_zeros(wave.hi - wave.lo, self.num_elements) if v is None else v
            v[chunk.local] = out
        return v

    def _call(self, chunk: Chunk, x: Tensor) -> Tensor:
        forest = self.forest
        masked = forest.masked if chunk.taped else None
        with torch.set_grad_enabled(chunk.taped), masked or nullcontext():
            sigma, prompt = forest.sigma[chunk.rows], forest.prompt[chunk.rows]
            host = (self.plan.sigma[chunk.nodes], self.plan.prompt[chunk.nodes])
            out = call_velocity(self.model, x[chunk.local], sigma, prompt, host=host)
        forest.calls += 1
        if chunk.taped:
            if not out.requires_grad:
                raise ValueError(
                    "rollout: velocity must be differentiable for the tape, got a constant; "
                    "try tape=0 or unfreeze the module"
                )
            forest.tape.append(TapePart(chunk.nodes, out))
            out = out.detach()
        self.bad.append((chunk.nodes, ~torch.isfinite(out).all(1)))
        if forest.velocity is not None:
            forest.velocity[chunk.kept_slots] = out[chunk.kept].to(self.dtype)
        return out

    def grow(self, wave: Wave, x: Tensor, v: Tensor | None, past: _Past) -> tuple[Tensor, _Past]:
        """Returns the next level's states and what it remembers of the levels above."""
        start, (lo, hi) = self.plan.child_start, wave[:2]
        first, last = int(start[lo]), int(start[hi])
        if first == last:
            return x[:0], _Past(None, None)
        noise = noise_rows(self.forest.noise, first, last)
        v = torch.zeros_like(x) if v is None else v
        row, child_start = self.row[first:last], self.child_start[lo : hi + 1] - first
        grown = ops.branch_step(x, v, row, child_start, noise, past.h)
        self.forest.log_prob[first:last] = grown.log_prob_M
        y, parent = grown.y_MD, self.parent[first:last] - lo
        if past.h2 is not None:
            y = y + self.older[first:last, None] * past.h2[parent]
        after, beyond = int(start[first]), int(start[last])
        x0 = None
        if self.plan.history[after:beyond].any() or self._reaches(after, beyond):
            x0 = (x - self.forest.sigma[lo:hi, None] * v)[parent]
        older = past.h is not None and bool(self.plan.older[after:beyond].any())
        return y, _Past(x0, past.h[parent] if older and past.h is not None else None)

    def _reaches(self, after: int, beyond: int) -> bool:
        """Tells whether an edge below rows after..beyond - 1 reads two levels further up."""
        start = self.plan.child_start
        return bool(self.plan.older[int(start[after]) : int(start[beyond])].any())

    def check_finite(self) -> None:
        """Raises for the first node whose velocity was not finite: the rollout's only sync."""
        if not self.bad:
            return
        bad = torch.cat([flags for _, flags in self.bad]).cpu().numpy()
        if bad.any():
            nodes = np.concatenate([n for n, _ in self.bad])[bad]
            i = int(nodes.min())
            raise FloatingPointError(
                f"rollout: velocity must be finite, got NaN or Inf at node {i} (depth "
                f"{self.plan.depth[i]}, sigma {self.plan.sigma[i]:.4g}, prompt "
                f"{self.plan.prompt[i]}) and {len(nodes) - 1} more"
            )
