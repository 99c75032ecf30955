"""A tiny FLUX.1-dev pipeline: guidance is embedded."""

from diffusers import FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tiny_pipelines import parts

SIZE = {"height": 16, "width": 32}
OPTIONS = {"max_text_tokens": 24, "embedded_guidance": 2.5}
GUIDANCES = (1.0,)


def call(guidance):
    """Returns the plain pipeline's arguments."""
    return {"true_cfg_scale": guidance, "guidance_scale": 2.5, "max_sequence_length": 24}


def build(folder, distilled=True, **scheduler):
    """Writes the pipeline into a folder."""
    with parts.seeded():
        clip, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            guidance_embeds=distilled, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        pipe = FluxPipeline(
            transformer=parts.liven(transformer),
            scheduler=parts.euler_scheduler(**{"use_dynamic_shifting": True, **scheduler}),
            vae=parts.image_vae(),
            text_encoder=parts.clip_encoder(clip, kind=CLIPTextModel),
            tokenizer=clip,
            text_encoder_2=parts.t5_encoder(t5),
            tokenizer_2=t5,
        )
    pipe.save_pretrained(folder)
