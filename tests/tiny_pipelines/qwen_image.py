"""A tiny Qwen-Image pipeline: Qwen2.5-VL with the real prompt template, a 3D VAE."""

import re

from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
    Qwen2Tokenizer,
)

from tiny_pipelines import parts

SIZE = {"height": 16, "width": 32}
OPTIONS = {"max_text_tokens": 64}


def call(guidance):
    """Returns the plain pipeline's arguments."""
    return {"true_cfg_scale": guidance, "max_sequence_length": 64}


TEMPLATE_WORDS = (
    "system Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background: user assistant"
)


def tokenizer():
    """Words of the prompt template are single tokens, as the number that is dropped demands."""
    letters = [*parts.LETTERS, *"DĠĊ:"]
    first = ["system", "Describe", "user", "assistant"]
    template = re.findall(r"[A-Za-z]+", TEMPLATE_WORDS)
    words = first + [f"Ġ{word}" for word in [*template, *parts.WORDS] if word not in first]
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return Qwen2Tokenizer(
        vocab=vocab, merges=list(dict.fromkeys(merges)), padding_side="right",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def text_encoder(vocab_size, width=32):
    text = Qwen2_5_VLTextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    vision = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=width,
        fullatt_block_indexes=[0],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build(folder):
    """Writes the pipeline into a folder."""
    with parts.seeded():
        words = tokenizer()
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 2.0],
        ).eval()  # fmt: skip
        scheduler = parts.euler_scheduler(
            use_dynamic_shifting=True, shift=1.0, shift_terminal=0.02, max_shift=0.9,
            max_image_seq_len=8192,
        )  # fmt: skip
        pipe = QwenImagePipeline(
            transformer=parts.liven(transformer), scheduler=scheduler, vae=vae,
            text_encoder=text_encoder(len(words)), tokenizer=words,
        )  # fmt: skip
    prefix = pipe.prompt_template_encode.split("{}")[0]
    assert len(words(prefix).input_ids) == pipe.prompt_template_encode_start_idx
    pipe.save_pretrained(folder)
