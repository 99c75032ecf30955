"""Human Preference Score v2 and v2.1: a tuned OpenCLIP ViT-H/14; the cosine as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from branchcore.rewards.clip import ClipCosine, ClipOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HPSv2:
    """HPS, `{"hps": cos(image, prompt)}`, about 0.2 to 0.4; 77 tokens of a prompt count.

    The accepted layout is that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K on the hub: a folder with
    `config.json` of a `CLIPModel` (hidden_act "gelu", projection_dim 1024), `model.safetensors`
    with its names (`text_model.*`, `vision_model.*`, `*_projection.weight`, `logit_scale`), the
    tokenizer and `preprocessor_config.json`. The published `HPS_v2.1_compressed.pt` (and
    `HPS_v2_compressed.pt`) is a pickle with OpenCLIP's names and must be converted first, as
    transformers converts any OpenCLIP ViT: q, k and v of `in_proj_*` apart, projections transposed.

    Args:
        path: see `ClipCosine`.
        times_100: the percentage that some papers print, instead of the published cosine.
        options: of `ClipCosine`.

    Source: Wu et al. 2023, Human Preference Score v2; tgxs002/HPSv2 `img_score.py` (it runs under
    fp16 autocast, and so agrees to about 1e-3).
    """

    def __init__(
        self, path: str | Path, *, times_100: bool = False, **options: Unpack[ClipOptions]
    ) -> None:
        self.cosine = ClipCosine("HPSv2", path, **options)
        self.scale = 100.0 if times_100 else 1.0

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the scores, (N,) fp32."""
        return {"hps": self.scale * self.cosine(images, prompts)}
