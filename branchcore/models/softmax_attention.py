"""Attention processors of ours, which ask diffusers' dispatcher for softmax(Q K^T / sqrt(C)) V.

Letters: N rows, S queries, L keys or text tokens, H heads, C channels of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SoftmaxProcessor:
    """A diffusers attention processor that `set_attention_backend` reaches.

    Args:
        replaced: the one that it stands for, if any.
    """

    _attention_backend: Any = None

    def __init__(self, replaced: object = None) -> None:
        self._parallel_config = getattr(replaced, "_parallel_config", None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns attention (N, S, H * C) of q (N, S, H, C) and k, v (N, L, H, C)."""
        return self.dispatch(q, k, v, mask).flatten(2, 3).to(q.dtype)

    def dispatch(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the same with heads apart, as the backend gives it."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            *(q, k, v),
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class JointAttention(SoftmaxProcessor):
    """Attention over [image, text], or over the image alone, of SD3 and SD3.5.

    Its own processor always takes torch's attention.
    """

    def normed(
        self, q: Tensor, k: Tensor, norm_q: nn.Module | None, norm_k: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """Norms queries and keys, (N, S, H, C); SD3 before 3.5 has no norms."""
        return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends.

        Args:
            attn: the module, whose layers are called as they are: adapters work.
            hidden_states: (N, S, H * C) image tokens.
            encoder_hidden_states: (N, L, H * C) text tokens; None = image tokens alone.
            attention_mask: always None: SD3 attends to its padding.

        Returns:
            Image tokens, and text tokens where there are some.

        Raises:
            NotImplementedError: there is a mask.
        """
        if attention_mask is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: attention_mask must be None, got one; SD3 has none"
            )
        text, length = encoder_hidden_states, hidden_states.shape[1]
        channels = attn.inner_dim // attn.heads
        q, k, v = heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), channels)
        q, k = self.normed(q, k, attn.norm_q, attn.norm_k)
        if text is not None:
            added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            q_text, k_text, v_text = heads(text, added, channels)
            q_text, k_text = self.normed(q_text, k_text, attn.norm_added_q, attn.norm_added_k)
            pairs = (q, q_text), (k, k_text), (v, v_text)
            q, k, v = (torch.cat(pair, 1) for pair in pairs)
        out = self.attend(q, k, v)
        image = attn.to_out[1](attn.to_out[0](out[:, :length]))
        if text is None:
            return image
        text = out[:, length:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def heads(x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], channels: int) -> list[Tensor]:
    """Projects (N, S, H * C) by each layer to (N, S, H, C)."""
    return [layer(x).unflatten(-1, (-1, channels)) for layer in layers]
