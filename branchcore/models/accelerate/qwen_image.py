"""Blocks of Qwen-Image: two streams with joint attention under a text mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from branchcore.models.accelerate.binding import (
    BlockBinding,
    Conditioning,
    Draw,
    Tables,
    finish,
    modulate,
    normalise,
    refuse,
)
from branchcore.models.softmax_attention import SoftmaxProcessor, heads

Rotation = tuple[Tensor, Tensor]
"""Unit complex numbers, (S, D / 2), of the image and of the text."""


class QwenProcessor(SoftmaxProcessor):
    """Attention over [text, image]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns what attention gives the image and the text, (B, S, C) each."""
        refuse(attn, attention_mask=attention_mask)
        text, text_mask = encoder_hidden_states, encoder_hidden_states_mask
        channels = attn.inner_dim // attn.heads
        q, k, v = heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), channels)
        q_text, k_text, v_text = heads(
            text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), channels
        )
        of_image, of_text = map(_tables, image_rotary_emb or (None, None))
        q, k = normalise(q, k, attn.norm_q, attn.norm_k, of_image)
        q_text, k_text = normalise(q_text, k_text, attn.norm_added_q, attn.norm_added_k, of_text)
        joint = (torch.cat(pair, 1) for pair in ((q_text, q), (k_text, k), (v_text, v)))
        mask = None
        if text_mask is not None:
            seen = text_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([text_mask, seen], 1).bool()[:, None, None]
        text, image = self.attend(*joint, mask=mask).split([text.shape[1], q.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _tables(turns: Tensor | None) -> list[Tensor] | None:
    """Turns complex numbers into cos and sin, each for both channels of a pair."""
    if turns is None:
        return None
    return [part.repeat_interleave(2, 1) for part in (turns.real, turns.imag)]


class QwenBlock(BlockBinding):
    """Its modulation depends on the noise level alone."""

    block = "QwenImageTransformerBlock"
    arguments = (
        *("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb"),
        *("image_rotary_emb", "joint_attention_kwargs", "modulate_index"),
    )
    processors = {"attn": ("QwenDoubleStreamAttnProcessor2_0", QwenProcessor)}

    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the norms, what modulates, and the attention."""
        if block.zero_cond_t:
            raise NotImplementedError(
                "accelerate: zero_cond_t must be False, got True: its tokens are modulated apart"
            )
        layer = {f"{s}_norm{i}": "LayerNorm" for s in ("img", "txt") for i in (1, 2)}
        names = "norm_q", "norm_k", "norm_added_q", "norm_added_k"
        norms = {f"attn.{name}": "RMSNorm" for name in names}
        return (
            {"img_mod": "Sequential", "txt_mod": "Sequential", "attn": "Attention"} | layer | norms
        )

    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns two norms, and one pair of queries and keys, for each stream."""
        return {"gate_norm_modulate": 4, "qk_norm_rope": 2}

    def forward(
        self,
        block: Any,
        conditioning: Conditioning,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns text and image."""
        extras = {"joint_attention_kwargs": joint_attention_kwargs}
        refuse(block, **extras, modulate_index=modulate_index)
        x, text = hidden_states, encoder_hidden_states
        temb, row = conditioning.distinct(temb, "sigma")
        own = Tables(*block.img_mod(temb).chunk(6, 1))
        own_text = Tables(*block.txt_mod(temb).chunk(6, 1))
        y, y_text = block.attn(
            hidden_states=modulate(block.img_norm1, x, own.scale, own.shift, row).out_BSC,
            encoder_hidden_states=modulate(
                block.txt_norm1, text, own_text.scale, own_text.shift, row
            ).out_BSC,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
        )
        x = finish(block.img_norm2, block.img_mlp, x, y, own, row)
        return finish(block.txt_norm2, block.txt_mlp, text, y_text, own_text, row), x

    def example(self, block: Any, draw: Draw) -> dict[str, Any]:
        """Returns three samples, of which one has a shorter text."""
        half = block.attn.inner_dim // block.attn.heads // 2
        turns = (torch.polar(torch.ones_like(a), a) for a in (draw(6, half), draw(4, half)))
        mask = draw(3, 4) > -1e9
        mask[1, 2:] = False
        return {
            "hidden_states": draw(3, 6, block.dim),
            "encoder_hidden_states": draw(3, 4, block.dim),
            "encoder_hidden_states_mask": mask,
            "temb": draw(3, block.dim),
            "image_rotary_emb": tuple(turn.to(torch.complex64) for turn in turns),
        }


BLOCKS = {"transformer_blocks.*": QwenBlock()}
