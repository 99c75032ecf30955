"""Blocks of FLUX.1: two streams with joint attention, then one stream with a parallel MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from branchcore.models.accelerate.binding import (
    BlockBinding,
    Conditioning,
    Draw,
    angles,
    enter,
    finish,
    gated,
    modulate,
    normalise,
    refuse,
)
from branchcore.models.softmax_attention import SoftmaxProcessor, heads

Rotation = tuple[Tensor, Tensor]
"""cos and sin, (S, D) fp32, over [text, image]."""
NORMED = {"attn": "FluxAttention", "attn.norm_q": "RMSNorm", "attn.norm_k": "RMSNorm"}


class FluxProcessor(SoftmaxProcessor):
    """Attention over [text, image], or over one sequence of both."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns what attention gives the image, (B, S, C), and the text if it is given."""
        refuse(attn, fused_projections=attn.fused_projections)
        tables, text = image_rotary_emb, encoder_hidden_states
        q, k, v = heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn.head_dim)
        if text is None:
            q, k = normalise(q, k, attn.norm_q, attn.norm_k, tables)
            return self.attend(q, k, v, attention_mask)
        q_text, k_text, v_text = heads(
            text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), attn.head_dim
        )
        split = [text.shape[1], hidden_states.shape[1]]
        of_text, of_image = (
            (None, None) if tables is None else zip(*(t.split(split) for t in tables), strict=True)
        )
        q, k = normalise(q, k, attn.norm_q, attn.norm_k, of_image)
        q_text, k_text = normalise(q_text, k_text, attn.norm_added_q, attn.norm_added_k, of_text)
        joint = (torch.cat(pair, 1) for pair in ((q_text, q), (k_text, k), (v_text, v)))
        text, image = self.attend(*joint, mask=attention_mask).split(split, 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class FluxBlock(BlockBinding):
    """Two streams."""

    block = "FluxTransformerBlock"
    arguments = (
        *("hidden_states", "encoder_hidden_states", "temb"),
        *("image_rotary_emb", "joint_attention_kwargs"),
    )
    processors = {"attn": ("FluxAttnProcessor", FluxProcessor)}

    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the norms and the attention."""
        added = {"attn.norm_added_q": "RMSNorm", "attn.norm_added_k": "RMSNorm"}
        ada = dict.fromkeys(("norm1", "norm1_context"), "AdaLayerNormZero")
        layer = "norm1.norm", "norm1_context.norm", "norm2", "norm2_context"
        return NORMED | added | ada | dict.fromkeys(layer, "LayerNorm")

    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns two norms, and one pair of queries and keys, for each stream."""
        return {"gate_norm_modulate": 4, "qk_norm_rope": 2}

    def forward(
        self,
        block: Any,
        conditioning: Conditioning,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns text and image."""
        refuse(block, joint_attention_kwargs=joint_attention_kwargs)
        x, text = hidden_states, encoder_hidden_states
        temb, row = conditioning.distinct(temb, "node")
        normed, own = enter(block.norm1, x, temb, row)
        normed_text, own_text = enter(block.norm1_context, text, temb, row)
        y, y_text = block.attn(normed, normed_text, image_rotary_emb=image_rotary_emb)
        x = finish(block.norm2, block.ff, x, y, own, row)
        return finish(block.norm2_context, block.ff_context, text, y_text, own_text, row), x

    def example(self, block: Any, draw: Draw) -> dict[str, Any]:
        """Returns three samples."""
        width, turns = block.attn.query_dim, angles(draw, 10, block.attn.head_dim)
        states = {"hidden_states": draw(3, 6, width), "encoder_hidden_states": draw(3, 4, width)}
        return {**states, "temb": draw(3, width), "image_rotary_emb": turns}


class FluxSingleBlock(FluxBlock):
    """One stream; text and image come and go apart."""

    block = "FluxSingleTransformerBlock"

    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the norm and the attention."""
        return {"norm": "AdaLayerNormZeroSingle", "norm.norm": "LayerNorm", **NORMED}

    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns the norm, and the queries and keys."""
        return {"gate_norm_modulate": 1, "qk_norm_rope": 1}

    def forward(
        self,
        block: Any,
        conditioning: Conditioning,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns text and image."""
        refuse(block, joint_attention_kwargs=joint_attention_kwargs)
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        temb, row = conditioning.distinct(temb, "node")
        norm = block.norm
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, 1)
        normed = modulate(norm.norm, x, scale, shift, row).out_BSC
        hidden = block.act_mlp(block.proj_mlp(normed))
        y = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        x = gated(x, block.proj_out(torch.cat([y, hidden], 2)), gate, row)
        tokens = encoder_hidden_states.shape[1]
        return x[:, :tokens], x[:, tokens:]


BLOCKS = {"transformer_blocks.*": FluxBlock(), "single_transformer_blocks.*": FluxSingleBlock()}
