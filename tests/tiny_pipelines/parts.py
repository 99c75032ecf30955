"""What tiny pipelines have in common: tokenizers made from scratch, encoders, a VAE, a seed."""

import string
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ["a", "bold", "thin", "red", "blue", "cat", "dog", "house", "of", "the", "on", "seven"]
LETTERS = list(string.ascii_lowercase + string.digits + ",.")


@contextmanager
def seeded(seed=0):
    """Random weights within the block depend on the seed only, and nothing outside on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def liven(module):
    """Draws every weight that starts at zero, and widens the rest: modulation must matter."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4 / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    return module


def clip_tokenizer():
    ends = [f"{letter}</w>" for letter in LETTERS]
    tokens = [*LETTERS, *ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def clip_encoder(tokenizer, width=16, projection=16, kind=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        projection_dim=projection, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -3.0)]
    pieces += [(letter, -6.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer, width=32):
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1,
        num_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def image_vae(channels=4):
    """Twice smaller latents, so that tiny images have latents of some size."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, sample_size=32, shift_factor=0.06,
        scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def euler_scheduler(**options):
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})
