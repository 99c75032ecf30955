"""Blocks of SANA: linear self-attention, cross-attention to text, a convolutional feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from branchcore.models.accelerate.binding import (
    BlockBinding,
    Conditioning,
    Draw,
    Tables,
    gated,
    modulate,
    normalise,
    refuse,
)
from branchcore.models.softmax_attention import heads
from branchcore.reference.edges import wide


class SanaLinearProcessor:
    """o_i = sum_j (q_i . k_j) v_j / sum_j q_i . k_j with q, k >= 0: no softmax, linear in S.

    Args:
        _replaced: diffusers' own, of which nothing is taken over.
    """

    def __init__(self, _replaced: object) -> None: ...

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Returns (B, S, C)."""
        refuse(attn, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        channels = attn.inner_dim // attn.heads
        q, k, v = heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), channels)
        q, k = normalise(q, k, attn.norm_q, attn.norm_k)
        dtype = wide(q.dtype)
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q.relu(), k.relu(), v))
        weighted = q @ (k.transpose(2, 3) @ v)
        total = q @ k.sum(2)[..., None]
        out = (weighted / (total + 1e-15)).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out.to(hidden_states.dtype)))


class SanaBlock(BlockBinding):
    """Cross-attention reads the residual stream as it is, by the processor that it has."""

    block = "SanaTransformerBlock"
    arguments = (
        *("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
        *("timestep", "height", "width"),
    )
    processors = {"attn1": ("SanaLinearAttnProcessor2_0", SanaLinearProcessor)}

    def parts(self, block: Any) -> Mapping[str, str]:
        """Returns the norms and the attentions."""
        found = {"norm1": "LayerNorm", "norm2": "LayerNorm"}
        found |= {"attn1": "Attention", "attn2": "Attention"}
        for path in self.attentions(block):
            found |= {f"{path}.norm_q": "RMSNorm", f"{path}.norm_k": "RMSNorm"}
        return found

    def calls(self, block: Any) -> Mapping[str, int]:
        """Returns the norms, and the queries and keys of self-attention where it has norms."""
        return {"gate_norm_modulate": 2, "qk_norm_rope": len(self.attentions(block))}

    def forward(
        self,
        block: Any,
        conditioning: Conditioning,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Returns the image."""
        refuse(block, attention_mask=attention_mask)
        if timestep is None or height is None or width is None:
            raise TypeError(f"{self.block}: timestep, height and width must be given, got None")
        x, (temb, row) = hidden_states, conditioning.distinct(timestep, "sigma")
        own = Tables(*(block.scale_shift_table + temb.unflatten(1, (6, -1))).unbind(1))
        y = block.attn1(modulate(block.norm1, x, own.scale, own.shift, row).out_BSC)
        x = gated(x, y, own.gate, row)
        y = block.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        x, normed = modulate(block.norm2, x, own.scale_ff, own.shift_ff, row, y)
        image = normed.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y = block.ff(image).flatten(2).transpose(1, 2)
        return gated(x, y, own.gate_ff, row)

    def example(self, block: Any, draw: Draw) -> dict[str, Any]:
        """Returns three samples, of which one has a shorter text."""
        channels = block.attn1.query_dim
        mask = draw(3, 1, 4).zero_()
        mask[1, :, 2:] = -10000.0
        return {
            "hidden_states": draw(3, 6, channels),
            "encoder_hidden_states": draw(3, 4, block.attn2.cross_attention_dim),
            "encoder_attention_mask": mask,
            "timestep": draw(3, 6 * channels),
            "height": 2,
            "width": 3,
        }


BLOCKS = {"transformer_blocks.*": SanaBlock()}
