"""A tiny SANA pipeline: masked Gemma 2 text, linear self-attention, a learned variance."""

from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tiny_pipelines import parts

SIZE = {"height": 32, "width": 64}
INSTRUCTION = ["the bold house,", "on a thin cat"]
OPTIONS = {"max_text_tokens": 40, "instruction": INSTRUCTION}


def call(guidance):
    """Returns the plain pipeline's arguments."""
    return {
        "guidance_scale": guidance,
        "max_sequence_length": 40,
        "complex_human_instruction": INSTRUCTION,
        "use_resolution_binning": False,
    }


def gemma_tokenizer():
    """One token a letter; two for words of two that merge."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("r", "e"), ("re", "d")]
    tokens = [*special, "▁", "\n", *parts.LETTERS, *("".join(pair) for pair in merges)]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def gemma_encoder(tokenizer, width=32):
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, head_dim=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=16,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def deep_vae(channels=4):
    """Four times smaller, with one block of linear attention."""
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=4, scaling_factor=0.41,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (3,)), decoder_qkv_multiscales=((), (), (3,)),
    ).eval()  # fmt: skip


def build(folder):
    """Writes the pipeline into a folder."""
    with parts.seeded():
        tokenizer = gemma_tokenizer()
        transformer = SanaTransformer2DModel(
            in_channels=4, out_channels=8, num_attention_heads=4, attention_head_dim=8,
            num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, sample_size=8, patch_size=1,
            mlp_ratio=1.5, qk_norm="rms_norm_across_heads", timestep_scale=0.7,
        )  # fmt: skip
        pipe = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=gemma_encoder(tokenizer),
            vae=deep_vae(),
            transformer=parts.liven(transformer),
            scheduler=parts.euler_scheduler(),
        )
    pipe.save_pretrained(folder)
