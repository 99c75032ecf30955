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
    members: list[tuple[Tensor, Tensor]]
    """Groups of equally frequent ones: (u,) which of the U, (u, c) their rows."""


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
        self.count = len(prompt)

    def distinct(self, kind: Kind) -> Distinct | None:
        """Returns the distinct rows of a kind; None where all N are."""
        if kind not in self._found:
            self._found[kind] = self._find(self._keys[kind])
        return self._found[kind]

    def _find(self, key: Ints) -> Distinct | None:
        _, first, index = np.unique(key, return_index=True, return_inverse=True)
        if len(first) == self.count:
            return None
        index = index.reshape(-1)
        counts = np.bincount(index)
        order, start = np.argsort(index, kind="stable"), np.cumsum(counts) - counts
        members = [
            (np.flatnonzero(counts == c), order[start[counts == c][:, None] + np.arange(c)])
            for c in np.unique(counts)
        ]
        put = self._put
        return Distinct(
            put(first), put(index), [(put(which), put(rows)) for which, rows in members]
        )

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
        self._patched = [module for module, _ in patched]
        for module, kind in patched:
            module.forward = self._shared(module.forward, kind)

    def _shared(self, forward: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
        def on_distinct_rows(*args: Any, **kwargs: Any) -> Any:
            rows = self.rows
            distinct = None if rows is None else rows.distinct(kind)
            if rows is None or distinct is None:
                return forward(*args, **kwargs)

            def take(value: Any) -> Any:
                per_row = isinstance(value, Tensor) and value.ndim and len(value) == rows.count
                return value[distinct.first] if per_row else value

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
        """Runs a block and keeps its inputs only; the recomputation shares between the same rows."""
        rows = self.rows

        def run(*inputs: Any) -> Any:
            with self.using(rows):
                return block(*inputs)

        return checkpoint(run, *args, use_reentrant=False)

    def undo(self) -> None:
        """Gives every module its own forward back."""
        for module in self._patched:
            del module.forward
        self._patched.clear()
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
    distinct: Distinct,
) -> Tensor:
    """Attends with all queries of a prompt as one long sequence: keys and values once per prompt.

    Args:
        attend: (query, key, value, mask) -> out, in the layout (batch, tokens, heads, channels).
        query: (N, S, H, C).
        key: (U, L, H, C) of the distinct prompts.
        value: (U, L, H, C).
        mask: (U, 1, 1, L) added to the scores, or None.
        distinct: of the prompts.

    Returns:
        (N, S, H, C); every row as it would be alone.
    """
    if len(distinct.members) == 1 and distinct.members[0][1].shape[0] == 1:
        rows = distinct.members[0][1]
        folded = query[rows[0]].flatten(0, 1)[None]
        out = attend(folded, key, value, mask)
        return torch.empty_like(query).index_copy(0, rows[0], out.view_as(query))
    parts, order = [], []
    for which, rows in distinct.members:
        folded = query[rows].flatten(1, 2)
        chosen = None if mask is None else mask[which]
        out = attend(folded, key[which], value[which], chosen)
        parts.append(out.reshape(-1, *query.shape[1:]))
        order.append(rows.reshape(-1))
    whole = torch.cat(parts)
    return torch.empty_like(whole).index_copy(0, torch.cat(order), whole)
