"""Blocks of Stable Diffusion 3 and 3.5: joint attention, in some a second of the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from branchcore.models.accelerate.binding import (
    BlockBinding,
    Conditioning,
    Draw,
    Tables,
    finish,
    gated,
    modulate,
    normalise,
    refuse,
)
from branchcore.models.softmax_attention import JointAttention


class JointProcessor(JointAttention):
    """The same with norms fused; where there are none, diffusers' processor stays."""

    def normed(self, q: Tensor, k: Tensor, norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor]:
        """Norms queries and keys in one pass."""
        return normalise(q, k, norm_q, norm_k)


class JointBlock(BlockBinding):
    """The last block of a transformer gives its text no feed-forward and does not return it."""

    block = "JointTransformerBlock"
    arguments = "hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"
    processors = {
        "attn": ("JointAttnProcessor2_0", JointProcessor),
        "attn2": ("JointAttnProcessor2_0", JointProcessor),
    }

    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the norms and attentions."""
        found = {
            "norm1": "SD35AdaLayerNormZeroX" if block.use_dual_attention else "AdaLayerNormZero",
            "norm1.norm": "LayerNorm",
            "norm1_context.norm": "LayerNorm",
            "attn": "Attention",
            "norm2": "LayerNorm",
        }
        last = block.context_pre_only
        found["norm1_context"] = "AdaLayerNormContinuous" if last else "AdaLayerNormZero"
        found |= {} if last else {"norm2_context": "LayerNorm"}
        for path in self.attentions(block):
            found |= {f"{path}.{name}": "RMSNorm" for name in ("norm_q", "norm_k")}
            if path == "attn":
                found |= {f"attn.{name}": "RMSNorm" for name in ("norm_added_q", "norm_added_k")}
        return found | ({"attn2": "Attention"} if block.use_dual_attention else {})

    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns one call per norm and modulation, and one per normed stream of an attention."""
        norms = 3 + block.use_dual_attention + (not block.context_pre_only)
        streams = {"attn": 2, "attn2": 1}
        return {
            "gate_norm_modulate": norms,
            "qk_norm_rope": sum(streams[path] for path in self.attentions(block)),
        }

    def forward(
        self,
        block: Any,
        conditioning: Conditioning,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Returns text, None behind the last block, and image."""
        refuse(block, joint_attention_kwargs=joint_attention_kwargs, _chunk_size=block._chunk_size)
        x, text, last = hidden_states, encoder_hidden_states, block.context_pre_only
        temb, row = conditioning.distinct(temb, "node")
        norm, norm_text = block.norm1, block.norm1_context
        tables = norm.linear(norm.silu(temb)).chunk(9 if block.use_dual_attention else 6, 1)
        text_tables = norm_text.linear(norm_text.silu(temb)).chunk(2 if last else 6, 1)
        own = Tables(*tables[:6])
        # (scale, shift) in the last block, (shift, scale, ...) before
        scale, shift = text_tables[:2] if last else text_tables[1::-1]

        normed = modulate(norm.norm, x, own.scale, own.shift, row).out_BSC
        normed_text = modulate(norm_text.norm, text, scale, shift, row).out_BSC
        y, y_text = block.attn(hidden_states=normed, encoder_hidden_states=normed_text)
        if block.use_dual_attention:
            shift, scale, gate = tables[6:]
            normed = modulate(norm.norm, x, scale, shift, row).out_BSC
            x, y = gated(x, y, own.gate, row), block.attn2(hidden_states=normed)
            own = own._replace(gate=gate)
        x = finish(block.norm2, block.ff, x, y, own, row)
        if last:
            return None, x
        own = Tables(*text_tables)
        return finish(block.norm2_context, block.ff_context, text, y_text, own, row), x

    def example(self, block: Any, draw: Draw) -> dict[str, Any]:
        """Returns three samples."""
        (width,) = block.norm2.normalized_shape
        return {
            "hidden_states": draw(3, 6, width),
            "encoder_hidden_states": draw(3, 4, width),
            "temb": draw(3, width),
        }


BLOCKS = {"transformer_blocks.*": JointBlock()}
