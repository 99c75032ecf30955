"""Joint attention of SD3 through diffusers' dispatcher; its own processor always takes torch's.

softmax(Q K^T / sqrt(C)) V over image and text tokens together, image first. Letters: N rows, S
image tokens, L text tokens, H heads, C channels of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class JointAttention:
    """A diffusers attention processor for `Attention` of SD3 and SD3.5, dual attention too."""

    _attention_backend: Any = None
    _parallel_config: Any = None

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
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        def heads(projection: nn.Module, norm: nn.Module | None, tokens: Tensor) -> Tensor:
            split = projection(tokens).unflatten(2, (attn.heads, -1))
            return split if norm is None else norm(split)

        text, length = encoder_hidden_states, hidden_states.shape[1]
        qkv = [
            heads(attn.to_q, attn.norm_q, hidden_states),
            heads(attn.to_k, attn.norm_k, hidden_states),
            heads(attn.to_v, None, hidden_states),
        ]
        if text is not None:
            of_text = [
                heads(attn.add_q_proj, attn.norm_added_q, text),
                heads(attn.add_k_proj, attn.norm_added_k, text),
                heads(attn.add_v_proj, None, text),
            ]
            qkv = [torch.cat(pair, 1) for pair in zip(qkv, of_text, strict=True)]
        query, key, value = qkv
        out = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](out[:, :length]))
        if text is None:
            return image
        text = out[:, length:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)
