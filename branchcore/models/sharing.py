"""Computes once per prompt and noise level what rows of one call have in common, and indexes it.

Nodes of a tree that are called together have one prompt, and those of one wave one sigma. A module
whose input depends on these alone is evaluated on one row each; its result is handed to all rows.
Module names stay as they are, so that weights, adapters and checkpoints know nothing of it.
Letters: N rows of a call, U distinct ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from branchcore.credit import Floats
from branchcore.plan import Ints

Kind = Literal["prompt", "sigma", "node"]
"""What a module's input depends on; node = prompt and sigma."""


class Distinct(NamedTuple):
    """The distinct rows of a call under one kind."""

    first: Tensor
    """(U,) int64, a row of each."""
    which: Tensor
    """(N,) int64, which of the U every row is."""


class Fold(NamedTuple):
    """A call's rows put next to the others of their prompt; prompts equally frequent in a group."""

    first: Tensor
    """(U,) int64, a row of each prompt, group after group."""
    groups: list[tuple[int, int]]
    """(u, c): the next u prompts have c rows each."""
    order: Tensor | None
    """(N,) int64, the rows prompt after prompt; None where they lie so already."""
    back: Tensor | None
    """(N,) int64, the place of every row in that order."""


class Rows:
    """Which of a call's rows agree, from host values.

    Args:
        sigma: (N,) noise levels.
        prompt: (N,) prompt indices.
        device: where the indices are needed.
    """

    def __init__(self, sigma: Floats, prompt: NDArray[np.integer], device: torch.device) -> None:
        level = np.unique(sigma, return_inverse=True)[1].reshape(-1)
        self._keys: dict[str, Ints] = {
            "prompt": np.asarray(prompt, np.int64),
            "sigma": level,
            "node": np.asarray(prompt, np.int64) * (int(level.max(initial=0)) + 1) + level,
        }
        self._device, self._found = device, dict[str, "Distinct | None"]()
        self._fold: list[Fold | None] = []
        self.count = len(prompt)

    def distinct(self, kind: Kind) -> Distinct | None:
        """Returns the distinct rows of a kind; None where all N are."""
        if kind not in self._found:
            self._found[kind] = self._find(self._keys[kind])
        return self._found[kind]

    def fold(self) -> Fold | None:
        """Returns how rows of one prompt come together; None where each has its own."""
        if not self._fold:
            self._fold.append(self._find_fold(self._keys["prompt"]))
        return self._fold[0]

    def _find(self, key: Ints) -> Distinct | None:
        _, first, index = np.unique(key, return_index=True, return_inverse=True)
        if len(first) == self.count:
            return None
        return Distinct(self._put(first), self._put(index.reshape(-1)))

    def _find_fold(self, key: Ints) -> Fold | None:
        _, first, index, counts = np.unique(
            key, return_index=True, return_inverse=True, return_counts=True
        )
        if len(first) == self.count:
            return None
        by_count = np.lexsort((first, counts))
        order = np.argsort(np.argsort(by_count)[index.reshape(-1)], kind="stable")
        sizes, numbers = np.unique(counts, return_counts=True)
        groups = list(zip(numbers.tolist(), sizes.tolist(), strict=True))
        chosen = self._put(first[by_count])
        if np.array_equal(order, np.arange(self.count)):
            return Fold(chosen, groups, None, None)
        return Fold(chosen, groups, self._put(order), self._put(np.argsort(order)))

    def _put(self, array: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


class Sharing:
    """Patches modules of a transformer so that they compute distinct rows only.

    Args:
        transformer: its modules' `forward` is replaced, nothing else.
        rules: module name pattern -> kind; `*` stands for one part of a name.

    Raises:
        ValueError: a pattern matches no module: another version of the transformer.
    """

    def __init__(self, transformer: nn.Module, rules: Mapping[str, Kind]) -> None:
        self.rows: Rows | None = None
        self.modules: dict[str, Kind] = {}
        patched: list[tuple[nn.Module, Kind]] = []
        for pattern, kind in rules.items():
            hits: list[tuple[str, nn.Module]] = [
                hit for hit in transformer.named_modules() if matches(pattern, hit[0])
            ]
            if not hits:
                raise ValueError(
                    f"Sharing: {type(transformer).__name__} must have modules {pattern!r}, got "
                    "none; try the version of diffusers that README names"
                )
            self.modules |= {name: kind for name, _ in hits}
            patched.extend((module, kind) for _, module in hits)
        self._undo: list[Callable[[], object]] = []
        for module, kind in patched:
            module.forward = self._shared(module.forward, kind)
            # a compiled block has its modules' own forwards back already
            self.on_undo(partial(vars(module).pop, "forward", None))
        self.patched = [module for module, _ in patched]
        # where accelerated blocks look for it
        vars(transformer)["row_sharing"] = self
        self.on_undo(partial(delattr, transformer, "row_sharing"))

    def on_undo(self, restore: Callable[[], object]) -> None:
        """Remembers what else `undo` has to call."""
        self._undo.append(restore)

    def _shared(self, forward: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
        def on_distinct_rows(*args: Any, **kwargs: Any) -> Any:
            rows = self.rows
            distinct = None if rows is None else rows.distinct(kind)
            if rows is None or distinct is None:
                return forward(*args, **kwargs)

            def per_row(value: Any) -> bool:
                return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows.count

            # a caller that took the distinct rows itself wants no others back
            if not any(map(per_row, (*args, *kwargs.values()))):
                return forward(*args, **kwargs)

            def take(value: Any) -> Any:
                return value[distinct.first] if per_row(value) else value

            out = forward(*map(take, args), **{name: take(v) for name, v in kwargs.items()})
            if isinstance(out, tuple):
                return tuple(value[distinct.which] for value in out)
            return out[distinct.which]

        return on_distinct_rows

    @contextmanager
    def using(self, rows: Rows | None) -> Generator[None]:
        """Shares between these rows within the block; None = computes every row."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def checkpointed(self, block: nn.Module, *args: Any) -> Any:
        """Runs a block, keeping its inputs only; recomputation shares between the same rows."""
        rows = self.rows

        def run(*inputs: Any) -> Any:
            with self.using(rows):
                return block(*inputs)

        return checkpoint(run, *args, use_reentrant=False)

    def undo(self) -> None:
        """Gives every module its own forward back, and every attention its processor."""
        while self._undo:
            self._undo.pop()()
        self.modules.clear()


def matches(pattern: str, name: str) -> bool:
    """Tells whether a module's name has a pattern's parts; `*` is any one part."""
    parts = [r"[^.]+" if part == "*" else re.escape(part) for part in pattern.split(".")]
    return re.fullmatch(r"\.".join(parts), name) is not None


def fold_attention(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    fold: Fold,
) -> Tensor:
    """Attends with all queries of a prompt as one long sequence: keys and values once per prompt.

    Rows that lie prompt after prompt are neither gathered nor scattered; keys never are.

    Args:
        attend: (query, key, value, mask) -> out, in the layout (batch, tokens, heads, channels).
        query: (N, S, H, C).
        key: (U, L, H, C) of the prompts, in the order of `fold.first`.
        value: (U, L, H, C).
        mask: (U, 1, 1, L) added to the scores, or None.
        fold: of the rows.

    Returns:
        (N, S, H, C); every row as it would be alone.
    """
    rows = query if fold.order is None else query.index_select(0, fold.order)
    parts: list[Tensor] = []
    row = prompt = 0
    for u, c in fold.groups:
        own = slice(prompt, prompt + u)
        long = rows[row : row + u * c].unflatten(0, (u, c)).flatten(1, 2)
        out = attend(long, key[own], value[own], None if mask is None else mask[own])
        parts.append(out.reshape(u * c, *query.shape[1:]))
        row, prompt = row + u * c, prompt + u
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole if fold.back is None else whole.index_select(0, fold.back)
