"""Counts the floating point operations of one model call without a weight or an activation.

The real module runs on the meta device; what sharing saves is what it does not run. Letters: N rows
of a call, P prompts, S noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from branchcore.models.family import Family
from branchcore.models.flow_model import FlowModel
from branchcore.models.sharing import matches
from branchcore.models.sizing import shapes
from branchcore.models.sizing.shapes import Shape

Part = Literal["attention", "MLP", "projections", "text K/V", "prompt and level", "other"]
"""Scores and values; feed-forward; QKV and output; text keys and values of cross-attention; what
depends on prompt and noise level only; embeddings and the last layer."""

_MLP = {"ff", "ff_context", "ffn", "img_mlp", "txt_mlp", "proj_mlp"}
_ATTENTION = {"attn", "attn1", "attn2"}


class Census(NamedTuple):
    """Operations of one call, a multiply-add being two."""

    rows: int
    parts: Mapping[Part, int]
    parameters: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def tera_per_row(self) -> float:
        """TFLOP per row."""
        return self.total / self.rows / 1e12


def census(shape: Shape) -> Census:
    """Counts a call of one row."""
    model = shapes.flow_model(shape)
    return _count(model, _text_keys(model), 1, 1, 1)


def saved(
    shape: Shape, rows: int = 16, *, prompts: int = 1, levels: int = 1
) -> tuple[Census, Census]:
    """Counts the same call plainly, and with what rows have in common computed once.

    Args:
        shape: of the model.
        rows: N, spread evenly over prompts and noise levels.
        prompts: P, at most N.
        levels: S, at most N.

    Returns:
        (plain, shared); a `FlowModel` shares by itself.

    Raises:
        ValueError: more prompts or levels than rows.
    """
    if not (1 <= prompts <= rows and 1 <= levels <= rows):
        raise ValueError(
            f"saved: prompts and levels must be in [1, {rows}], got {prompts}, {levels}"
        )
    model = shapes.flow_model(shape)
    keys = _text_keys(model)
    shared = _count(model, keys, rows, prompts, levels)
    model.unshare()
    return _count(model, keys, rows, prompts, levels), shared


def _text_keys(model: FlowModel) -> tuple[str, ...]:
    return tuple(f"{name}.to_{side}" for name in model.folded for side in "kv")


def _count(model: FlowModel, keys: Sequence[str], rows: int, prompts: int, levels: int) -> Census:
    view = model.with_prompts([str(p) for p in range(prompts)])
    index = np.arange(rows)
    x = torch.empty(rows, *model.latent_shape, device="meta")
    sigma = torch.empty(rows, device="meta")
    prompt = sigma.long()
    view.announce(sigma, prompt, (index % levels + 1) / levels, index * prompts // rows)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        view.velocity(x, sigma, prompt)
    flops = {str(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parameters = sum(p.numel() for p in model.module.parameters())
    return Census(rows, _parts(model, keys, flops), parameters)


def _parts(model: FlowModel, keys: Sequence[str], flops: Mapping[str, int]) -> dict[Part, int]:
    """Sorts what leaf modules cost by their names; what is left over are scores and values."""
    parts: dict[Part, int] = dict.fromkeys(get_args(Part), 0)
    root = type(model.module).__name__
    for name, leaf in model.module.named_modules():
        if not any(True for _ in leaf.children()):
            part = "text K/V" if name in keys else _part_of(name, model.family)
            parts[part] += flops.get(f"{root}.{name}", 0)
    parts["attention"] = flops["Global"] - sum(parts.values())
    return parts


def _part_of(name: str, family: Family) -> Part:
    words = name.split(".")
    if _MLP & set(words) or matches("single_transformer_blocks.*.proj_out", name):
        return "MLP"
    if _ATTENTION & set(words):
        return "projections"
    above = [".".join(words[: i + 1]) for i in range(len(words))]
    rules = [rule for rule in family.shared if any(matches(rule, part) for part in above)]
    return "prompt and level" if rules else "other"


def decode_tera(shape: Shape) -> float:
    """Counts the decoding of one image or video, in TFLOP."""
    model = shapes.flow_model(shape)
    x = torch.empty(1, *model.latent_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.decode(x)
    return counter.get_total_flops() / 1e12
