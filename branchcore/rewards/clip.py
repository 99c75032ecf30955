"""CLIP score: the cosine of an image and its prompt, x 100.

Also the part that PickScore and HPSv2 share: a CLIP model that gives cosines. N images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from branchcore.rewards.images import check_positive, distinct, frames_of
from branchcore.rewards.pretrained import (
    PROCESSOR,
    WEIGHTS,
    check_folder,
    load_processor,
    load_weights,
    transformers,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ClipOptions(TypedDict, total=False):
    """How a CLIP scorer is loaded and called; see `ClipCosine`."""

    processor: str | Path | None
    batch: int
    frames: int | None
    device: torch.device | str
    dtype: torch.dtype


class ClipCosine:
    """A frozen CLIPModel: cosines of images and prompts.

    Every distinct prompt is encoded once a call; one longer than the model takes (77 tokens, ends
    included) is cut off there.

    Args:
        where: names the scorer in errors.
        path: folder of a CLIPModel in transformers' layout (config.json, model.safetensors), or its
            name on the hub.
        processor: folder or name that holds the tokenizer and preprocessor_config.json; None =
            `path`.
        batch: images and prompts per model call.
        frames: frames of a video that are scored, evenly spaced; the score is their mean.
            None for images.
        device: where the scorer lives.
        dtype: of the model; the cosine is taken in fp32.

    Raises:
        OSError, ValueError: no such model, missing files, or files of another model.
    """

    def __init__(
        self,
        where: str,
        path: str | Path,
        *,
        processor: str | Path | None = None,
        batch: int = 16,
        frames: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_clip(where, path, processor)
        check_positive(where, batch=batch, frames=frames)
        self.where, self.batch, self.frames = where, batch, frames
        self.device, self.dtype = torch.device(device), dtype
        self.processor = load_processor(where, path if processor is None else processor)
        model = load_weights(where, path, transformers(where).CLIPModel)
        self.model = model.to(self.device, dtype)
        self.logit_scale = float(self.model.logit_scale.float().exp())

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (N,) fp32 cosines on the scorer's device; see `images.frames_of` for shapes."""
        frames = frames_of(self.where, images, self.frames)
        texts, which = distinct(prompts)
        flat = frames.flatten(0, 1)
        features = torch.cat([self._image(x) for x in flat.split(self.batch)])
        words = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        wanted = torch.cat([self._text(x) for x in words])[which.to(self.device)]
        return (features.unflatten(0, frames.shape[:2]) * wanted[:, None]).sum(-1).mean(1)

    def _image(self, levels: Tensor) -> Tensor:
        pixels = self.processor.images(levels.to(self.device)).to(self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.model.visual_projection(pooled))

    def _text(self, texts: list[str]) -> Tensor:
        """Padded to the model's length, so that a text's features do not depend on the others."""
        tokens = self.processor.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return _unit(self.model.text_projection(pooled))


class ClipScore:
    """CLIP score, `{"clip": 100 cos(image, prompt)}`; at most 77 tokens of a prompt count.

    Args:
        path: see `ClipCosine`; made for openai/clip-vit-large-patch14.
        floor: take max(0, cosine), as the paper does.
        options: of `ClipCosine`.

    Source: Hessel et al. 2021, CLIPScore (2.5 max(0, cos)); the factor 100 is that of CLIP's logits
    and of torchmetrics.
    """

    def __init__(
        self, path: str | Path, *, floor: bool = False, **options: Unpack[ClipOptions]
    ) -> None:
        self.cosine = ClipCosine("ClipScore", path, **options)
        self.floor = floor

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the scores, (N,) fp32."""
        score = 100.0 * self.cosine(images, prompts)
        return {"clip": score.clamp(min=0.0) if self.floor else score}


def check_clip(where: str, path: str | Path, processor: str | Path | None) -> None:
    """Raises OSError unless the files of a CLIP scorer are there."""
    check_folder(where, path, WEIGHTS if processor is not None else (*WEIGHTS, *PROCESSOR))
    if processor is not None:
        check_folder(where, processor, PROCESSOR)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
