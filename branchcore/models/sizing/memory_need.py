"""The byte model of an iteration: what is always there, and what every part of it adds.

It is exact bookkeeping of what trainer, rollout and gradient keep, with measured lines for what
the model's own calls need. Letters: N rows of a call, M nodes of the plan, D latent elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from branchcore.forest import kept_slots
from branchcore.model import Model
from branchcore.models.sizing.live_bytes import CallBytes
from branchcore.packing import balanced_chunks, runs
from branchcore.plan import Ints, Plan
from branchcore.pruning import Pruning
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig

STATE = 4
"""Bytes of a latent element of a state: fp32."""


def check_trained(model: Model) -> None:
    """Raises ValueError unless some weights are trained."""
    if not any(p.requires_grad for p in model.module.parameters()):
        raise ValueError(
            "plan_memory: model must have trainable weights, got none; "
            "try add_lora() or train_all()"
        )


class Need(NamedTuple):
    """What a run needs: what is always there, what calls take, and what the plan keeps."""

    recipe: Recipe
    config: TrainerConfig
    fixed: Mapping[str, int]
    cost: CallBytes
    elements: int
    """D."""
    gradients: int
    decode_batch: int | None
    """Images per call of the decoder at most, if the model has a limit of its own."""
    optimizer_step: int
    """Bytes of an optimizer step beyond what is always there."""

    @staticmethod
    def of(model: Model, recipe: Recipe, config: TrainerConfig, cost: CallBytes) -> Need:
        """Adds up what is always there."""
        trained = [p for p in model.module.parameters() if p.requires_grad]
        wide = sum(p.numel() * max(4, p.itemsize) for p in trained)
        averages = (config.ema_decay is not None) + (recipe.sampler_decay is not None)
        fixed = {
            **resident(model),
            "fp32 masters": sum(4 * p.numel() for p in trained if p.itemsize < 4),
            "gradients": wide,
            "moments": 2 * wide,
            "averages": averages * wide,
            "way back": 3 * wide if config.fast_steps else 0,
        }
        single = max(p.numel() * max(4, p.itemsize) for p in trained)
        step = wide if trained[0].device.type == "cuda" else single
        elements = math.prod(model.latent_shape)
        limit = getattr(model, "decode_batch", None)
        return Need(recipe, config, fixed, cost, elements, wide, limit, step)

    @property
    def least_rows(self) -> int:
        """Nodes that the objective cannot part."""
        together, plan = self.recipe.objective.together, self.plan(1)
        if not together:
            return 1
        return int(np.bincount(plan.group(together)[plan.trained()]).max(initial=1))

    @property
    def lags(self) -> bool:
        """Whether another policy samples, so that nothing can be on the tape."""
        return self.recipe.sampler_decay is not None

    def plan(self, prompts: int) -> Plan:
        """Returns a round's plan."""
        return self.recipe.plan(list(range(prompts)), seed=self.config.seed, iteration=0)

    def off_tape(self, plan: Plan) -> NDArray[np.bool_] | None:
        """Returns (M,) nodes that pruning drops before the rollout, as in iteration 0."""
        pruning = Pruning(self.config.prune, self.recipe, self.config.seed)
        return pruning.ahead(plan, range(plan.num_prompts), 0)

    def taped(self, plan: Plan) -> Ints:
        """Returns the nodes of the first update that can be on the tape, in plan order."""
        off = self.off_tape(plan)
        nodes = plan.action[plan.trained(0)]
        nodes = nodes if off is None else nodes[~off[nodes]]
        return np.unique(nodes[plan.evaluated[nodes]])

    def phases(self, plan: Plan, rounds: int, rows: int, tape: int) -> dict[str, int]:
        """Returns the peak bytes of every part of an iteration."""
        recipe, cost, state = self.recipe, self.cost, STATE * self.elements
        reference = recipe.objective.compares
        slots = int(kept_slots(plan).max()) + 1
        kept = sum(self.fixed.values()) + rounds * (
            slots * state * (1 + self.stored) + plan.num_prompts * cost.prompt
        )
        nodes = self.taped(plan)[:tape]
        wave, on_tape, parts = self._waves(plan, rows, nodes)
        shared = 0
        if reference:
            shared = max((sum(parts[i:j]) for i, j in runs(parts, rows)), default=0)
        leaves = int(plan.leaf.sum())
        images = leaves * cost.image
        other = on_tape + images if self.config.overlap_rewards else 0
        # gradients are there once the first round has left them
        grown = kept + other - (0 if rounds > 1 else self.gradients)
        left = self._largest_batch(plan, rows, nodes)
        fresh = cost.tape.at(left) + self._beyond(left, reference)
        backward = cost.backward.at(max(parts, default=0)) + shared * state
        taped = on_tape + max(backward, cost.call.at(shared))
        # the noise floor of stored velocities is measured while the tape is there
        floor = on_tape + (cost.call.at(_first_batch(plan, rows)) if self.stored else 0)
        beside = (3 + 2 * reference + self.stored) * left * state
        most = max(fresh, cost.tape_call.at(left), taped, floor)
        return {
            "rollout": grown + wave,
            "decoding": grown + on_tape + leaves * state + self._decoding(leaves, rows),
            "gradient": kept + other + beside + most,
            "optimizer step": kept + self.optimizer_step,
        }

    def _decoding(self, leaves: int, rows: int) -> int:
        """Returns the most bytes of decoded images and of the call that makes the last of them."""
        call = min(rows, leaves)
        peak = 2 * leaves * self.cost.image  # parts, and all in one
        for count, before in ((call, leaves // max(call, 1) - 1), (leaves % max(call, 1), 1)):
            # a short call is the last one
            earlier = before * call if count == call else leaves - count
            inner = min(count, self.decode_batch or count)
            own = max(self.cost.decode.at(inner), inner * self.cost.image)
            both = max((count - inner) * self.cost.image + own, 2 * count * self.cost.image)
            peak = max(peak, earlier * self.cost.image + both if count else 0)
        return peak

    @property
    def stored(self) -> bool:
        """Whether the rollout's velocities are kept."""
        later = self.recipe.updates > 1 or self.lags or self.config.fast_steps > 0
        return later and self.recipe.objective.anchor == "policy"

    def _beyond(self, rows: int, reference: bool) -> int:
        """Returns what a backward needs beyond its graph, the reference's call included."""
        return max(self.cost.backward.at(rows), self.cost.call.at(rows) if reference else 0)

    def left(self, plan: Plan, update: int, taped: Ints) -> Ints:
        """Returns the parents of an update that have a training forward of their own."""
        nodes = np.unique(plan.action[plan.trained(update)])
        if update:
            return nodes
        off = self.off_tape(plan)
        nodes = nodes if off is None else nodes[~off[nodes]]
        return np.setdiff1d(nodes, taped)

    def _largest_batch(self, plan: Plan, rows: int, taped: Ints) -> int:
        """Returns the most rows of a micro-batch that is on no tape."""
        left = [len(self.left(plan, update, taped)) for update in range(plan.num_updates)]
        return max([0, *(hi - lo for n in left for lo, hi in balanced_chunks(n, rows))])

    def _waves(self, plan: Plan, rows: int, nodes: Ints) -> tuple[int, int, list[int]]:
        """Returns the rollout's peak beyond what is kept, its tape, and the rows of its parts."""
        cost, state = self.cost, STATE * self.elements
        peak = on_tape = before = 0
        parts: list[int] = []
        for lo, hi, children, calls in rollout_calls(plan, rows, nodes):
            width = hi - lo
            x = width * state * (2 if plan.history[lo:hi].any() else 1)
            whole = len(calls) == 1 and calls[0][0] == width
            v = 0 if whole or not calls else width * cost.velocity
            for count, taped in calls:
                size = (cost.tape_call if taped else cost.call).at(count)
                peak = max(peak, before + x + v + on_tape + size)
                on_tape += cost.tape.at(count) if taped else 0
                parts += [count] if taped else []
            before = width * cost.velocity if calls else 0
            peak = max(peak, on_tape + x + before + children * state)
        return peak, on_tape, parts


class Level(NamedTuple):
    """A wave: its rows of the plan, and the calls that the rollout makes for it."""

    lo: int
    hi: int
    children: int
    calls: list[tuple[int, bool]]
    """(rows, whether on the tape)."""


def rollout_calls(plan: Plan, rows: int, nodes: Ints) -> list[Level]:
    """Returns every wave with the calls that the rollout makes for it, `nodes` on the tape."""
    taped = np.zeros(len(plan), dtype=bool)
    taped[nodes] = True
    levels: list[Level] = []
    for lo, hi in plan.levels():
        calls: list[tuple[int, bool]] = []
        for on_tape in (False, True):
            count = int((plan.evaluated[lo:hi] & (taped[lo:hi] == on_tape)).sum())
            calls += [(last - first, on_tape) for first, last in balanced_chunks(count, rows)]
        children = int(plan.child_start[hi] - plan.child_start[lo])
        levels.append(Level(lo, hi, children, calls))
    return levels


def _first_batch(plan: Plan, rows: int) -> int:
    """Returns the rows of the first micro-batch with stored velocities."""
    edges = plan.trained(1 if plan.num_updates > 1 else 0)
    lo, hi = balanced_chunks(len(np.unique(plan.action[edges])), rows)[0]
    return hi - lo


def resident(model: Any) -> dict[str, int]:
    """Returns the bytes of a model's modules by name, shared weights counted once."""
    named: dict[str, Any] = {"transformer": model.module}
    pipe = getattr(model, "pipe", None)
    for name, part in {} if pipe is None else pipe.components.items():
        named.setdefault(name, part)
    frozen = getattr(model, "frozen", None) or getattr(model, "base", None)
    named |= {"vae": getattr(model, "vae", None), "reference": frozen}
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, part in named.items():
        if isinstance(part, nn.Module):
            own = {id(t): t.nbytes for t in (*part.parameters(), *part.buffers())}
            sizes[name] = sum(size for key, size in own.items() if key not in seen)
            seen |= set(own)
    return sizes
