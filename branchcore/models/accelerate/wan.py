"""Blocks of Wan2.1: self-attention with positions, cross-attention to text, modulation in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from branchcore.models.accelerate.binding import (
    BlockBinding,
    Conditioning,
    Draw,
    Tables,
    angles,
    gated,
    modulate,
    normalise,
    refuse,
)
from branchcore.models.softmax_attention import SoftmaxProcessor, heads
from branchcore.reference.edges import wide


class WanProcessor(SoftmaxProcessor):
    """Self-attention; its norm is over all channels of a token."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns (B, S, C)."""
        refuse(attn, encoder_hidden_states=encoder_hidden_states)
        refuse(attn, fused_projections=attn.fused_projections)
        channels = attn.inner_dim // attn.heads
        q, k, v = heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), channels)
        # (1, S, 1, D) of all samples and heads
        tables = None if rotary_emb is None else [table[0, :, 0] for table in rotary_emb]
        q, k = normalise(q, k, attn.norm_q, attn.norm_k, tables)
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v, attention_mask)))


class WanBlock(BlockBinding):
    """Cross-attention keeps the processor that it has."""

    block = "WanTransformerBlock"
    arguments = "hidden_states", "encoder_hidden_states", "temb", "rotary_emb"
    processors = {"attn1": ("WanAttnProcessor", WanProcessor)}

    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the norms and the self-attention."""
        found = {"attn1": "WanAttention", "attn1.norm_q": "RMSNorm", "attn1.norm_k": "RMSNorm"}
        crossed = {} if _plain(block) else {"norm2": "FP32LayerNorm"}
        return {**found, **crossed, "norm1": "FP32LayerNorm", "norm3": "FP32LayerNorm"}

    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns the norms, and the queries and keys of self-attention."""
        return {"gate_norm_modulate": 2 if _plain(block) else 3, "qk_norm_rope": 1}

    def forward(
        self,
        block: Any,
        conditioning: Conditioning,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Returns the video."""
        if temb.ndim != 3:
            raise NotImplementedError(
                f"{self.block}: temb must be (B, 6, C) once accelerated, got {tuple(temb.shape)}: "
                "tokens have noise levels of their own; try undo() of what accelerate() returned"
            )
        x, (temb, row) = hidden_states, conditioning.distinct(temb, "sigma")
        own = Tables(*(block.scale_shift_table + temb.to(wide(x.dtype))).unbind(1))
        normed = modulate(block.norm1, x, own.scale, own.shift, row).out_BSC
        y = block.attn1(normed, None, None, rotary_emb)
        if _plain(block):
            x = normed = gated(x, y, own.gate, row)
        else:
            x, normed = modulate(block.norm2, x, None, None, row, y, own.gate)
        y = block.attn2(normed, encoder_hidden_states, None, None)
        x, normed = modulate(block.norm3, x, own.scale_ff, own.shift_ff, row, y)
        return gated(x, block.ffn(normed), own.gate_ff, row)

    def example(self, block: Any, draw: Draw) -> dict[str, Any]:
        """Returns three samples; with 514 text tokens if the first 2 are to be of an image."""
        attn, width = block.attn1, block.attn1.inner_dim
        tables = angles(draw, 6, width // attn.heads)
        return {
            "hidden_states": draw(3, 6, width),
            "encoder_hidden_states": draw(3, 4 if block.attn2.add_k_proj is None else 514, width),
            "temb": draw(3, 6, width),
            "rotary_emb": tuple(table[None, :, None] for table in tables),
        }


def _plain(block: Any) -> bool:
    """Tells whether cross-attention reads the residual stream as it is."""
    return type(block.norm2).__name__ == "Identity"


BLOCKS = {"blocks.*": WanBlock()}
