"""ImageReward: BLIP reads the prompt with the image in view; a linear head scores its first token.

score = (mlp(text_encoder(prompt | image)[0]) - 0.16717...) / 1.03333...
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from branchcore.rewards.images import check_positive, distinct, frames_of
from branchcore.rewards.pretrained import (
    PROCESSOR,
    check_folder,
    file_of,
    load_processor,
    transformers,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
_HEAD = ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1))
_FILES = (("config.json",), ("model.safetensors",), *PROCESSOR)
# BlipForImageTextRetrieval's own heads; a converted checkpoint may still have them
_UNUSED = ("vision_proj.", "text_proj.", "itm_head.")


class ImageReward:
    """ImageReward, `{"imagereward": z-score of the head}`, about -2 to 2.

    A prompt is cut off at 35 tokens, as published. Every distinct prompt is tokenised once a call;
    it is encoded per image, because the text encoder attends to the image.

    The accepted layout is a folder, or a name on the hub, with `config.json` of a `BlipConfig`
    (vision: ViT-L/16 at 224; text: BERT-base of 30,524 tokens with encoder_hidden_size 1024),
    `model.safetensors`, a BERT tokenizer, and `preprocessor_config.json` (shortest edge 224,
    bicubic, centre crop 224, CLIP's mean and std). Weights have the names of transformers'
    `BlipForImageTextRetrieval` (`vision_model.*`, `text_encoder.*`) and
    `mlp.layers.{0,2,4,6,7}.{weight,bias}` as in the published `ImageReward.pt`, a pickle of BLIP's
    names that must be converted first, as transformers converts BLIP.

    Args:
        path: folder or name.
        batch: images per model call.
        frames: frames of a video that are scored, evenly spaced; the score is their mean.
        device: where the scorer lives.
        dtype: of BLIP; the head runs in fp32.

    Raises:
        OSError, ValueError: no such model, missing files, or files of another model.

    Source: Xu et al. 2023, ImageReward; THUDM/ImageReward `ImageReward.py`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch: int = 16,
        frames: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_imagereward(path)
        check_positive("ImageReward", batch=batch, frames=frames)
        self.batch, self.frames = batch, frames
        self.device, self.dtype = torch.device(device), dtype
        self.processor = load_processor("ImageReward", path)
        model = _model(path)
        self.vision = model["vision_model"].to(self.device, dtype)
        self.text = model["text_encoder"].to(self.device, dtype)
        self.mlp = model["mlp"].to(self.device, torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the scores, (N,) fp32."""
        frames = frames_of("ImageReward", images, self.frames)
        texts, which = distinct(prompts)
        tokens = self.processor.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        rows = which.repeat_interleave(frames.shape[1])
        parts = [
            self._score(levels, tokens.input_ids[row], tokens.attention_mask[row])
            for levels, row in zip(
                frames.flatten(0, 1).split(self.batch), rows.split(self.batch), strict=True
            )
        ]
        return {"imagereward": torch.cat(parts).view(frames.shape[:2]).mean(1)}

    def _score(self, levels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        pixels = self.processor.images(levels.to(self.device)).to(self.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return (self.mlp["layers"](read[:, 0].float())[:, 0] - MEAN) / STD


def check_imagereward(path: str | Path) -> None:
    """Raises OSError unless the files of the scorer are there."""
    check_folder("ImageReward", path, _FILES)


def _model(path: str | Path) -> Any:
    """Returns the parts that score, with their weights, frozen."""
    package = transformers("ImageReward")
    config = package.BlipConfig.from_pretrained(path)
    width = config.text_config.hidden_size
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, size in _HEAD:
        layers[str(index)] = nn.Linear(width, size)
        width = size
    model = nn.ModuleDict(
        {
            "vision_model": package.BlipVisionModel(config.vision_config),
            "text_encoder": package.BlipTextModel(config.text_config, add_pooling_layer=False),
            "mlp": nn.ModuleDict({"layers": nn.Sequential(layers)}),
        }
    )
    _load(path, model)
    return model.requires_grad_(False).eval()


def _load(path: str | Path, model: nn.Module) -> None:
    try:
        weights = load_file(file_of("ImageReward", path, "model.safetensors"))
    except SafetensorError as error:
        raise OSError(
            f"ImageReward: {path}/model.safetensors must be whole, got {error}"
        ) from error
    wanted = dict(model.state_dict())
    given = {k: v for k, v in weights.items() if not k.startswith(_UNUSED)}
    _check_names(
        path, {k: v.shape for k, v in wanted.items()}, {k: v.shape for k, v in given.items()}
    )
    model.load_state_dict(given)


def _check_names(
    path: str | Path, wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size]
) -> None:
    for name, shape in wanted.items():
        if given.get(name) != shape:
            raise ValueError(
                f"ImageReward: {path} must hold {name} of shape {tuple(shape)}, got "
                f"{tuple(given[name]) if name in given else 'none'}"
            )
    foreign = sorted(set(given) - set(wanted))
    if foreign:
        raise ValueError(
            f"ImageReward: {path} must hold vision_model, text_encoder and mlp only, got "
            f"{len(foreign)} other tensors, such as {foreign[0]}"
        )
