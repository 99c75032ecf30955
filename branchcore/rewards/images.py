"""Images as scorers want them: frames of videos, 8 bits, Pillow's bicubic, crop, normalisation.

Letters: N images or videos, F frames, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_BICUBIC = 3  # Pillow's number


class Preprocessing(NamedTuple):
    """What a `preprocessor_config.json` says of resizing, cropping and normalisation."""

    resize: int | tuple[int, int]
    """Length of the shortest edge, or (H, W)."""
    crop: tuple[int, int] | None
    """(H, W) of the centre that is kept; None = all."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, levels: Tensor) -> Tensor:
        """Returns normalised images (N, 3, h, w) of 8-bit levels (N, 3, H, W), both fp32."""
        height, width = levels.shape[-2:]
        wanted = self.resize
        if isinstance(wanted, int):
            short, long = min(height, width), max(height, width)
            other = wanted * long // short
            wanted = (wanted, other) if height <= width else (other, wanted)
        levels = _resized(levels, *wanted)
        if self.crop is not None:
            top, left = (wanted[0] - self.crop[0]) // 2, (wanted[1] - self.crop[1]) // 2
            levels = levels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (levels.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (levels / 255.0 - mean) / std


def preprocessing(where: str, config: Mapping[str, Any]) -> Preprocessing:
    """Reads the settings of a CLIP or BLIP image processor.

    Args:
        where: names the scorer in errors.
        config: of `preprocessor_config.json`, in the words of any version of transformers.

    Raises:
        ValueError: it asks for what is not done here.
    """
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(name, True):
            raise ValueError(f"{where}: {name} of the image processor must be true, got false")
    resample = config.get("resample", _BICUBIC)
    if resample != _BICUBIC:
        raise ValueError(f"{where}: resample must be {_BICUBIC} (bicubic), got {resample}")
    crops = bool(config.get("do_center_crop", "crop_size" in config))
    try:
        resize = _edges(config["size"], square=not crops)
        crop = _edges(config["crop_size"], square=True) if crops else None
        mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: the image processor must be CLIP's or BLIP's, got {dict(config)}"
        ) from error
    assert not isinstance(crop, int)
    least = (resize, resize) if isinstance(resize, int) else resize
    if crop and (crop[0] > least[0] or crop[1] > least[1]):
        raise ValueError(f"{where}: crop_size must be within size {resize}, got {crop}")
    return Preprocessing(resize, crop, mean, std)


def frames_of(where: str, images: Tensor, frames: int | None) -> Tensor:
    """Returns 8-bit levels of the frames that are scored.

    Args:
        where: names the scorer in errors.
        images: (N, 3, H, W) images or (N, F, 3, H, W) videos in [0, 1], any float dtype.
        frames: of a video; frame i is the one in the middle of the i-th of that many equal parts.

    Returns:
        (N, frames, 3, H, W) fp32, whole numbers in [0, 255]; one frame for images.

    Raises:
        ValueError: another shape, videos without `frames` or more frames than there are.
        TypeError: not floats.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(
            f"{where}: images must be (N, 3, H, W), or videos (N, F, 3, H, W), "
            f"got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(f"{where}: images must be floats in [0, 1], got {images.dtype}")
    if images.ndim == 4:
        if frames is not None:
            raise ValueError(f"{where}: frames must be None for images, got {frames}")
        images = images[:, None]
    else:
        count = images.shape[1]
        if frames is None or not 1 <= frames <= count:
            raise ValueError(
                f"{where}: frames must be in 1..{count} for videos of {count} frames, got {frames}"
            )
        images = images[:, [(2 * i + 1) * count // (2 * frames) for i in range(frames)]]
    return images.float().mul(255.0).round().clamp(0.0, 255.0)


def check_positive(where: str, **numbers: int | None) -> None:
    """Raises ValueError unless the numbers that are given are at least 1."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {value}")


def distinct(prompts: list[str]) -> tuple[list[str], Tensor]:
    """Returns the distinct prompts and (N,) int64, which of them every image has."""
    first = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(first), torch.tensor([first[prompt] for prompt in prompts])


def _resized(levels: Tensor, height: int, width: int) -> Tensor:
    """Columns, then rows, rounded to 8 bits after each: what Pillow does."""
    for size in ((levels.shape[-2], width), (height, width)):
        if tuple(levels.shape[-2:]) != size:
            levels = interpolate(levels, size, mode="bicubic", antialias=True)
            levels = levels.round().clamp(0.0, 255.0)
    return levels


def _edges(size: Any, *, square: bool) -> int | tuple[int, int]:
    if isinstance(size, int):
        return (size, size) if square else size
    if not square and "shortest_edge" in size and "longest_edge" not in size:
        return int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])
