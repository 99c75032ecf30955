"""How the weights of a run are spread over its processes, and how their gradients come together.

Every process takes the gradient of its own prompts with as many forwards and backwards as it likes
(the tape has many forwards before its first backward, which `DistributedDataParallel` does not
take); one reduction per optimizer update follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from branchcore.distributed import Ranks

_BUCKET = 64 * 2**20
"""Bytes of gradients that one all-reduce carries."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How weights are spread; on the command line `--parallel`, `--shards`, ...

    Raises:
        ValueError: a value is unknown, or has no effect where weights are replicated.
    """

    kind: Literal["auto", "replicate", "shard"] = "auto"
    """replicate: every process has all weights, gradients are all-reduced (LoRA); shard: FSDP2,
    weights, gradients and moments are split; auto: shard if all weights are trained."""
    shards: int | None = None
    """Processes that share one copy of the weights (hybrid sharding); None = all."""
    mixed: bool = False
    """Compute in bfloat16 from float32 shards, reduce gradients in float32."""
    offload: bool = False
    """Shards live in CPU memory."""
    reshard: bool = False
    """Gather weights anew for every call: the least memory. No tape then, and all processes make
    equally many calls. False: weights stay whole from the first call to the update."""

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "replicate", "shard"):
            raise ValueError(
                f"ParallelConfig: kind must be auto, replicate or shard, got {self.kind!r}"
            )
        unread = [n for n in ("shards", "mixed", "offload", "reshard") if getattr(self, n)]
        if self.kind == "replicate" and unread:
            raise ValueError(
                f"ParallelConfig: {unread[0]} must be left out for replicate, got "
                f"{getattr(self, unread[0])!r}; try kind='shard'"
            )
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"ParallelConfig: shards must be at least 1, got {self.shards}")


class Parallel:
    """One process, which has everything."""

    lockstep = False
    """All processes must make equally many calls."""
    sharded = False
    """No process has all weights."""
    share = 1.0
    """What this process's gradients are multiplied by in the reduction."""

    def gather(self) -> None:
        """Makes weights whole for the calls to come; by all processes, after every change."""

    def reduce(self, parameters: Sequence[Tensor], zero_pass: Callable[[], None]) -> None:
        """Sums the gradients of an update over all processes: the only communication about them.

        Args:
            parameters: trained ones, as the optimizer sees them.
            zero_pass: a forward and backward of one row with a gradient of zero.
        """

    def grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clips the gradients' norm and returns what it was, the same on every process."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return cast("Any", norm).full_tensor() if hasattr(norm, "full_tensor") else norm


class Replicas(Parallel):
    """Every process has all weights, as `DistributedDataParallel` has them.

    Args:
        modules: weights and buffers become those of rank 0.
        ranks: of the run.
    """

    def __init__(self, modules: Iterable[nn.Module], ranks: Ranks) -> None:
        self._ranks = ranks
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def reduce(self, parameters: Sequence[Tensor], zero_pass: Callable[[], None]) -> None:
        """All-reduces gradients in buckets; who has none takes part with zeros."""
        del zero_pass
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([cast("Tensor", p.grad) for p in parameters]):
            flat = torch.cat([g.flatten() for g in bucket])
            self._ranks.collect(partial(dist.all_reduce, flat))
            sizes = [g.numel() for g in bucket]
            for gradient, part in zip(bucket, flat.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, up to the size of a bucket."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        last = buckets[-1][-1] if buckets else None
        fits = last is not None and (last.dtype, last.device) == (gradient.dtype, gradient.device)
        if not fits or size + gradient.nbytes > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets


class Shards(Parallel):
    """FSDP2: weights, gradients and moments are split; blocks are gathered when they are called.

    Gradients add up unsharded, without communication; a last pass of weight zero on every process
    reduces and scatters them.

    Args:
        modules: the trained one first, then frozen ones that are called too; each is split by its
            blocks (what its lists of modules hold) and as a whole.
        config: how.
        ranks: of the run.

    Raises:
        ValueError: the processes cannot be parted into groups of `config.shards`, or trained
            weights have 16 bits.
    """

    sharded = True

    def __init__(self, modules: Sequence[nn.Module], config: ParallelConfig, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self.lockstep, self.share = config.reshard, float(ranks.world_size)
        self._ranks = ranks
        short = [p.dtype for p in modules[0].parameters() if p.requires_grad and p.itemsize < 4]
        if short:
            raise ValueError(
                f"Shards: trained weights must be float32, got {short[0]}; try mixed=True, which "
                "computes in bfloat16"
            )
        shards, world = config.shards or ranks.world_size, ranks.world_size
        if world % shards:
            raise ValueError(
                f"Shards: shards must divide the {world} processes, got {shards} per copy"
            )
        shape, names = ((world,), ("shard",))
        if shards < world:
            shape, names = (world // shards, shards), ("replicate", "shard")
        device = next(modules[0].parameters()).device.type
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device, shape, mesh_dim_names=names),
            "reshard_after_forward": config.reshard,
        }
        if config.mixed:
            low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
            options["mp_policy"] = MixedPrecisionPolicy(**low, cast_forward_inputs=False)
        if config.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device != "cpu")
        for module in modules:
            for part in module.children():
                for block in part if isinstance(part, nn.ModuleList) else ():
                    fully_shard(block, **options)
            fully_shard(module, **options)
        self._modules = [cast("Any", module) for module in modules]
        self._keep_whole()

    def _keep_whole(self) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(False)
            module.set_reshard_after_backward(self.lockstep)

    def gather(self) -> None:
        """Gathers trained weights anew and frozen ones once, unless every call does."""
        if self.lockstep:
            return
        for part in _parts(self._modules[:1]):
            part.reshard()
        for part in _parts(self._modules):
            part.unshard()

    def reduce(self, parameters: Sequence[Tensor], zero_pass: Callable[[], None]) -> None:
        """Reduces and scatters what has added up, in the backward of the pass of zero weight."""
        del parameters
        for module in self._modules:
            module.set_requires_gradient_sync(True)
            module.set_reshard_after_backward(True)
        self._ranks.collect(zero_pass)
        for part in _parts(self._modules[:1]):
            part.reshard()
        self._keep_whole()


def _parts(modules: Sequence[nn.Module]) -> list[Any]:
    """Returns everything that is gathered as one; what is gathered already stays."""
    from torch.distributed.fsdp import FSDPModule

    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


def spread(config: ParallelConfig, modules: Sequence[nn.Module], ranks: Ranks) -> Parallel:
    """Spreads the weights of modules over all processes.

    Args:
        config: how.
        modules: the trained one first, then frozen ones that are called too.
        ranks: of the run.
    """
    whole = all(p.requires_grad for p in modules[0].parameters())
    shard = config.kind == "shard" or (config.kind == "auto" and whole)
    if ranks.alone and not (shard and config.kind == "shard"):
        return Parallel()
    return Shards(modules, config, ranks) if shard else Replicas(modules, ranks)
