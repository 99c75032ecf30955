"""A tiny Stable Diffusion 3.5 pipeline: dual attention in block 0, as SD3.5-medium has."""

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tiny_pipelines import parts

SIZE = {"height": 16, "width": 32}
OPTIONS = {"max_text_tokens": 24}


def call(guidance):
    """Returns the plain pipeline's arguments."""
    return {"guidance_scale": guidance, "max_sequence_length": 24}


def build(folder):
    """Writes the pipeline into a folder."""
    with parts.seeded():
        clip, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32,
            joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        pipe = StableDiffusion3Pipeline(
            transformer=parts.liven(transformer),
            scheduler=parts.euler_scheduler(),
            vae=parts.image_vae(),
            text_encoder=parts.clip_encoder(clip),
            tokenizer=clip,
            text_encoder_2=parts.clip_encoder(clip),
            tokenizer_2=clip,
            text_encoder_3=parts.t5_encoder(t5),
            tokenizer_3=t5,
        )
    pipe.save_pretrained(folder)
