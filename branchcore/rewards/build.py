"""Rewards by name, for command lines: `build(["pickscore=/models/pickscore", "jpeg"])`.

A spec is `NAME[=VALUE][,OPTION=VALUE]...`:

    clip=PATH         CLIP score                   options processor, device
    pickscore=PATH    PickScore                    options processor, device
    hpsv2=PATH        HPS v2 or v2.1, named hps    options processor, device
    imagereward=PATH  ImageReward                  option device
    jpeg              -kB as a JPEG
    jpeg_incompressibility
    subprocess=module:function                     options python, timeout, name
    http://HOST:PORT/PATH, https://...             options timeout, dtype, name; a comma is %2C
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from branchcore.rewards.clip import ClipScore, check_clip
from branchcore.rewards.combined import Rewards
from branchcore.rewards.hpsv2 import HPSv2
from branchcore.rewards.http_reward import DTYPES, HttpReward
from branchcore.rewards.imagereward import ImageReward, check_imagereward
from branchcore.rewards.jpeg import JpegCompressibility
from branchcore.rewards.pickscore import PickScore
from branchcore.rewards.scores import Reward
from branchcore.rewards.subprocess_reward import SubprocessReward, check_subprocess

_CLIP = {"clip": ClipScore, "pickscore": PickScore, "hpsv2": HPSv2}
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_CLIP, ("processor", "device")),
    "imagereward": ("device",),
    "jpeg": (),
    "jpeg_incompressibility": (),
    "subprocess": ("python", "timeout", "name"),
    "http": ("timeout", "dtype", "name"),
}
_WITHOUT_VALUE = ("jpeg", "jpeg_incompressibility")


class _Spec(NamedTuple):
    kind: str
    value: str
    options: dict[str, str]

    @property
    def name(self) -> str:
        """Under which the reward is combined: published recipes weight `hps`."""
        return self.options.get("name", "hps" if self.kind == "hpsv2" else self.kind)


def build(
    specs: str | Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 16,
    frames: int | None = None,
) -> Reward:
    """Makes the rewards that specs name; see the module.

    Args:
        specs: one or more; several are combined by `Rewards`.
        device: of scorers that name none.
        dtype: of their models.
        batch: images per model call.
        frames: of a video, per scorer; a subprocess gets the whole video.

    Raises:
        ValueError, OSError: a malformed spec, a missing path or file; found before any is loaded.
    """
    parsed = [_parsed(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    names = [spec.name for spec in parsed]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"rewards: specs must name one reward or more, each once, got {names}; "
            "try the option name of subprocess and http"
        )
    for spec in parsed:
        _check(spec)
    made = {spec.name: _made(spec, device, dtype, batch, frames) for spec in parsed}
    return made[names[0]] if len(made) == 1 else Rewards(made)


def kind_of(spec: str) -> str:
    """Returns what a spec is of, whatever its value and options; a URL's host may change.

    Raises:
        ValueError: an unknown or malformed one.
    """
    return _parsed(spec).kind


def _parsed(text: str) -> _Spec:
    first, *rest = text.split(",")
    is_url = re.match(r"https?://", first) is not None
    kind, _, value = ("http", "", first) if is_url else first.partition("=")
    if kind not in _OPTIONS:
        raise ValueError(f"rewards: name must be one of {', '.join(_OPTIONS)}, got {kind!r}")
    if bool(value) == (kind in _WITHOUT_VALUE):
        wanted = kind if kind in _WITHOUT_VALUE else f"{kind}=..."
        raise ValueError(f"rewards: spec must read {wanted!r}, got {text!r}")
    options: dict[str, str] = {}
    for part in rest:
        name, _, given = part.partition("=")
        if name not in _OPTIONS[kind] or not given:
            known = ", ".join(_OPTIONS[kind]) or "none"
            raise ValueError(f"rewards: options of {kind} must be {known}, got {part!r}")
        options[name] = given
    return _Spec(kind, value, options)


def _check(spec: _Spec) -> None:
    if spec.kind in _CLIP:
        check_clip(f"rewards: {spec.kind}", spec.value, spec.options.get("processor"))
    elif spec.kind == "imagereward":
        check_imagereward(spec.value)
    elif spec.kind == "subprocess":
        check_subprocess(spec.value, [spec.options.get("python", sys.executable)])
        _limits(spec)
    elif spec.kind == "http":
        _http(spec)


def _made(
    spec: _Spec, device: torch.device | str, dtype: torch.dtype, batch: int, frames: int | None
) -> Reward:
    device = spec.options.get("device", device)
    if spec.kind in _CLIP:
        return _CLIP[spec.kind](
            spec.value,
            processor=spec.options.get("processor"),
            batch=batch,
            frames=frames,
            device=device,
            dtype=dtype,
        )
    if spec.kind == "imagereward":
        return ImageReward(spec.value, batch=batch, frames=frames, device=device, dtype=dtype)
    if spec.kind == "subprocess":
        return SubprocessReward(
            spec.value,
            python=spec.options.get("python", sys.executable),
            **_limits(spec),
        )
    if spec.kind == "http":
        return _http(spec)
    return JpegCompressibility(incompressibility=spec.kind != "jpeg", frames=frames)


def _http(spec: _Spec) -> HttpReward:
    return HttpReward(spec.value, dtype=spec.options.get("dtype", DTYPES[0]), **_limits(spec))


def _limits(spec: _Spec) -> dict[str, Any]:
    """Returns the time limit that a spec names; the reward has a default of its own."""
    if "timeout" not in spec.options:
        return {}
    try:
        return {"timeout_s": float(spec.options["timeout"])}
    except ValueError as error:
        raise ValueError(
            f"rewards: timeout of {spec.kind} must be a number of seconds, got {spec.options}"
        ) from error
