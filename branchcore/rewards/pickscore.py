"""PickScore: a CLIP model tuned on human choices; cosine x exp(logit_scale)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from branchcore.rewards.clip import ClipCosine, ClipOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PickScore:
    """PickScore, `{"pickscore": exp(logit_scale) cos(image, prompt)}`; 77 tokens of a prompt count.

    Args:
        path: see `ClipCosine`; made for yuvalkirstain/PickScore_v1 with the processor of
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        divide_by_26: as Flow-GRPO does, to bring scores to about 0..1.
        options: of `ClipCosine`.

    Source: Kirstain et al. 2023, Pick-a-Pic, and its model card (about 20 to 24 for today's
    models); Flow-GRPO `pickscore_scorer.py` for the 26.
    """

    def __init__(
        self, path: str | Path, *, divide_by_26: bool = False, **options: Unpack[ClipOptions]
    ) -> None:
        self.cosine = ClipCosine("PickScore", path, **options)
        self.scale = self.cosine.logit_scale / (26.0 if divide_by_26 else 1.0)

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the scores, (N,) fp32."""
        return {"pickscore": self.scale * self.cosine(images, prompts)}
