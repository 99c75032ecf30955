"""Regional torch.compile: the repeated blocks, which one graph serves, and nothing around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from branchcore.models.cross_attention import CrossAttention
from branchcore.models.flow_model import FlowModel
from branchcore.models.runtime.change import Change
from branchcore.models.sharing import Sharing

GRAPHS = 64
"""Graphs that dynamo may make of a block: batch 1 or more, with or without gradient and adapters,
times the kinds of blocks; its own limit of 8 would send the rest back to eager."""


def compile_blocks(model: FlowModel, **options: Any) -> Change:
    """Compiles each repeated block of the transformer at its first call.

    Work shared between rows inside of blocks (modulation, text keys and values) is done per row
    again: the distinct rows of a call are never the same shape, and every shape would compile anew.
    Around the blocks (text and time embeddings) sharing stays. A batch of 1 and one of more rows,
    with and without gradient, with and without adapters are graphs of their own. Results differ
    from eager ones by rounding. Switch adapters, attention and fused blocks on first. Not to be
    combined with `graph_rollout` if mode="reduce-overhead".

    Args:
        model: its transformer's blocks and those of `frozen`.
        options: of torch.compile; dynamic=True unless given, so that batch sizes share a graph.

    Raises:
        ValueError: they are compiled already.
    """
    copies = [(model.module, model.sharing)]
    if model.frozen is not None:
        copies.append((model.frozen, model.frozen_sharing))
    blocks = [block for transformer, _ in copies for block in repeated_blocks(transformer)]
    if any(_compiled(block) for block in blocks):
        raise ValueError("compile_blocks: model must be eager, got compiled blocks; try undo()")
    rejoin = [_leave(transformer, sharing) for transformer, sharing in copies if sharing]
    import torch._dynamo.config as dynamo

    limit = dynamo.recompile_limit
    dynamo.recompile_limit = max(limit, GRAPHS)
    for block in blocks:
        block.compile(**{"dynamic": True, **options})

    def undo() -> None:
        for block in blocks:
            block._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]
        dynamo.recompile_limit = limit
        for share_again in rejoin:
            share_again()

    kinds = " and ".join(dict.fromkeys(type(block).__name__ for block in blocks))
    return Change(
        f"torch.compile of {len(blocks)} blocks ({kinds}): fewer and fused pointwise kernels, after"
        " a compilation at the first calls; modulation inside of blocks is computed per row",
        undo,
    )


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a transformer: what its lists of modules hold."""
    lists = [part for part in transformer.children() if isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part]


def _compiled(block: nn.Module) -> bool:
    return block._compiled_call_impl is not None  # pyright: ignore[reportPrivateUsage]


def _leave(transformer: nn.Module, sharing: Sharing) -> Callable[[], None]:
    """Stops sharing inside of blocks; returns what starts it again."""
    inside = {part for block in repeated_blocks(transformer) for part in block.modules()}
    patched = [part for part in sharing.patched if part in inside]
    forwards = {part: vars(part).pop("forward") for part in patched}
    processors: list[Any] = [getattr(part, "processor", None) for part in inside]
    folding = [each for each in processors if isinstance(each, CrossAttention)]
    for processor in folding:
        processor.sharing = None

    def rejoin() -> None:
        if not sharing.modules:
            return
        for part, forward in forwards.items():
            vars(part)["forward"] = forward
        for processor in folding:
            processor.sharing = sharing

    return rejoin
