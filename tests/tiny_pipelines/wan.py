"""A tiny Wan 2.1 text-to-video pipeline: three axes of rotary positions, causal video VAE."""

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny_pipelines import parts

SIZE = {"height": 32, "width": 48, "num_frames": 5}
OPTIONS = {"max_text_tokens": 24}


def call(guidance):
    """Returns the plain pipeline's arguments."""
    return {"guidance_scale": guidance, "max_sequence_length": 24}


def umt5_encoder(tokenizer, width=32):
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1,
        num_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def video_vae(channels=4):
    """Eight times smaller in space, four in time."""
    return AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    ).eval()  # fmt: skip


def build(folder):
    """Writes the pipeline into a folder."""
    with parts.seeded():
        tokenizer = parts.t5_tokenizer()
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
            out_channels=4, text_dim=32, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=umt5_encoder(tokenizer),
            vae=video_vae(),
            scheduler=parts.euler_scheduler(),
            transformer=parts.liven(transformer),
        )
    pipe.save_pretrained(folder)
