"""Bytes and communication of the ways to spread weights over GPUs, by closed forms.

They follow from what `parallel.Shards` keeps; nothing of it was measured on several GPUs. Letters:
n GPUs, U optimizer updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from branchcore.models.sizing.memory_need import Need
from branchcore.parallel import ParallelConfig
from branchcore.rollout import num_calls

SPLIT: tuple[str, ...] = ("transformer", "reference")
STATES: tuple[str, ...] = ("moments", "averages", "way back")


class Spread(NamedTuple):
    """How weights are spread, and what of it the byte model asks."""

    config: ParallelConfig
    gpus: int
    sharded: bool
    largest: float
    """Share of a module's weights in its largest two blocks and what is in no block."""

    @staticmethod
    def of(config: ParallelConfig, gpus: int, module: nn.Module) -> Spread:
        """Returns how `parallel.spread` will spread a module.

        Raises:
            ValueError: groups that do not come out even, trained weights of 16 bits.
        """
        parameters = list(module.parameters())
        whole = all(p.requires_grad for p in parameters)
        sharded = config.kind == "shard" or (config.kind == "auto" and whole and gpus > 1)
        if sharded and gpus % (config.shards or gpus):
            raise ValueError(f"shards must divide the {gpus} GPUs, got {config.shards} per copy")
        short = [p.dtype for p in parameters if p.requires_grad and p.itemsize < 4]
        if sharded and short:
            raise ValueError(
                f"dtype must be fp32 where trained weights are sharded, got {short[0]}; "
                "mixed computes in bfloat16"
            )
        blocks = [b for part in module.children() if isinstance(part, nn.ModuleList) for b in part]
        sizes = sorted(sum(p.nbytes for p in block.parameters()) for block in blocks)
        total = max(1, sum(p.nbytes for p in parameters))
        return Spread(config, gpus, sharded, (total - sum(sizes[:-2])) / total)

    @property
    def lockstep(self) -> bool:
        """Whether every call gathers weights anew, so that nothing is on the tape."""
        return self.sharded and self.config.reshard

    def fixed(self, fixed: Mapping[str, int]) -> dict[str, int]:
        """Returns what is always there on one GPU, of what one alone would have."""
        if not self.sharded:
            return dict(fixed)
        copies = self.config.shards or self.gpus
        own = 0.0 if self.config.offload else 1.0 / copies
        gathered = (self.largest if self.config.reshard else 1.0) * (
            0.5 if self.config.mixed else 1
        )
        shares: dict[str, float] = dict.fromkeys(SPLIT, own + gathered) | dict.fromkeys(STATES, own)
        return {name: round(size * shares.get(name, 1.0)) for name, size in fixed.items()}

    def sent(self, need: Need) -> float:
        """Returns the bytes that one GPU sends in an iteration, in rings."""
        n, updates = self.gpus, need.recipe.updates + need.config.fast_steps
        ring = (n - 1) / n
        if not self.sharded:
            return 2 * ring * updates * need.gradients
        weights = sum(need.fixed.get(name, 0) for name in SPLIT)
        gathers = updates
        if self.lockstep:
            plan, rows = need.plan(1), need.config.max_batch
            calls = num_calls(plan, max_batch=rows, keep_velocity=need.stored)
            passes = -(-plan.counts().trained_parents // (rows or len(plan)))
            gathers = (calls + 2 * passes) * need.config.prompts_per_iteration + updates
        half = 0.5 if self.config.mixed else 1.0
        return ring * (gathers * half * weights + updates * need.gradients)

    def words(self) -> str:
        """Says it."""
        if self.gpus == 1 and not self.sharded:
            return "One GPU has all weights"
        if not self.sharded:
            return f"Each of the {self.gpus} GPUs has all weights"
        parts = [f"Weights are sharded over {self.config.shards or self.gpus} GPUs"]
        parts += ["gathered for every call" if self.config.reshard else "gathered once an update"]
        parts += ["kept in CPU memory between"] if self.config.offload else []
        return ", ".join(parts)


def ways(given: ParallelConfig, gpus: int, *, open_: bool) -> Sequence[ParallelConfig]:
    """Returns what to try, the fastest first; what somebody chose alone if anything was chosen."""
    if not open_ or gpus == 1:
        return [given]
    tried = [ParallelConfig(), ParallelConfig(kind="shard")]
    return [
        *tried,
        ParallelConfig(kind="shard", reshard=True),
        ParallelConfig(kind="shard", reshard=True, offload=True),
    ]
