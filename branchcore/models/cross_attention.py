"""Cross-attention to text with keys and values computed once per prompt, for Wan and SANA.

All rows of a prompt become one long query sequence. Letters: N rows of a call, U distinct prompts,
S latent tokens, L text tokens, H heads, C channels of one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from branchcore.models.sharing import Sharing, fold_attention, matches
from branchcore.models.softmax_attention import SoftmaxProcessor


class CrossAttention(SoftmaxProcessor):
    """A diffusers attention processor for `WanAttention` and for SANA's `Attention`.

    All attention goes through diffusers' dispatcher, so that `set_attention_backend` reaches it;
    SANA's own processor ignores that. Text states and mask of one prompt must be equal in its rows.

    Args:
        sharing: knows a call's rows; None, or a call whose prompts are all distinct = every row
            has keys and values of its own.
    """

    def __init__(self, sharing: Sharing | None = None) -> None:
        super().__init__()
        self.sharing = sharing

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        """Attends.

        Args:
            attn: the module, whose layers are called as they are: adapters work.
            hidden_states: (N, S, H * C).
            encoder_hidden_states: (N, L, channels) text states.
            attention_mask: (N, 1, L) added to the scores, or None.
            rotary_emb: always None: text has no positions.

        Returns:
            (N, S, H * C).
        """
        rows = None if self.sharing is None else self.sharing.rows
        fold = None if rows is None else rows.fold()
        text, mask = encoder_hidden_states, attention_mask
        if fold is not None:
            text = text[fold.first]
            mask = None if mask is None else mask[fold.first]
        mask = None if mask is None else mask[:, None]

        query = _heads(attn, _normed(attn.norm_q, attn.to_q(hidden_states)))
        key = _heads(attn, _normed(attn.norm_k, attn.to_k(text)))
        value = _heads(attn, attn.to_v(text))
        if fold is None:
            out = self.dispatch(query, key, value, mask)
        else:
            out = fold_attention(self.dispatch, query, key, value, mask, fold)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))
        factor = getattr(attn, "rescale_output_factor", 1.0)
        return out if factor == 1.0 else out / factor


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def install(transformer: nn.Module, sharing: Sharing, pattern: str) -> list[str]:
    """Gives cross-attentions the processor above until `sharing.undo()`.

    Args:
        transformer: where they are.
        sharing: of the transformer.
        pattern: their names; `*` stands for one part.

    Returns:
        The names of the modules.

    Raises:
        ValueError: no module has such a name: another version of the transformer.
    """
    found: dict[str, Any] = {
        name: module for name, module in transformer.named_modules() if matches(pattern, name)
    }
    if not found:
        raise ValueError(
            f"fold_cross_attention: {type(transformer).__name__} must have modules {pattern!r}, "
            "got none; try the version of diffusers that README names"
        )
    for module in found.values():
        sharing.on_undo(partial(module.set_processor, module.processor))
        module.set_processor(CrossAttention(sharing))
    return list(found)
