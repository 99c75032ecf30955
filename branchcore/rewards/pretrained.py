"""Finds and loads scorers: what can be refused is, before weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from branchcore.rewards.images import Preprocessing, preprocessing

WEIGHTS = (("config.json",), ("model.safetensors", "model.safetensors.index.json"))
PROCESSOR = (
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.json", "vocab.txt"),
)


class Processor(NamedTuple):
    """What turns images and texts into a model's inputs."""

    images: Preprocessing
    tokenizer: Any


def check_folder(where: str, path: str | Path, wanted: Iterable[tuple[str, ...]]) -> None:
    """Raises OSError unless a path is a folder with the files, or looks like a name of the hub.

    Args:
        where: names the scorer in errors.
        path: a folder, or 'owner/model'.
        wanted: files; one of each tuple must be there.
    """
    folder = Path(path)
    if folder.is_file():
        raise OSError(
            f"{where}: path must be a folder in the layout of transformers, got the file {path}; "
            "try converting the checkpoint"
        )
    if not folder.is_dir():
        if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
            raise OSError(
                f"{where}: path must be a folder or a name 'owner/model' of the hub, got {path!s}"
            )
        return
    for names in wanted:
        if not any((folder / name).is_file() for name in names):
            raise OSError(f"{where}: {folder} must hold {' or '.join(names)}, got none")


def transformers(where: str) -> Any:
    """Returns the package.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            f"{where}: transformers must be installed, got none; "
            "try pip install 'branchcore[models]'"
        ) from error
    return transformers


def load_processor(where: str, path: str | Path) -> Processor:
    """Loads the tokenizer and reads the settings of the image processor.

    Raises:
        OSError: missing files, no network.
        ValueError: an image processor of another kind.
    """
    package = transformers(where)
    try:
        tokenizer = package.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise OSError(f"{where}: {path} must hold a tokenizer, got {error}") from error
    return Processor(preprocessing(where, _image_config(where, path)), tokenizer)


def load_weights(where: str, path: str | Path, cls: Any) -> Any:
    """Loads a model of a class of transformers from safetensors, frozen.

    Raises:
        OSError: no such model, damaged files, no network.
        ValueError: weights that are missing or of another shape.
    """
    try:
        model, report = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{where}: {path} must hold weights, got {error}") from error
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{where}: {path} must hold the weights of {cls.__name__}, got none that fit for "
            f"{len(wrong)}, such as {wrong[0]}"
        )
    return model.requires_grad_(False).eval()


def file_of(where: str, path: str | Path, name: str) -> Path:
    """Returns the path of one file of a folder or of a model of the hub.

    Raises:
        OSError: it is not there.
    """
    transformers(where)
    from transformers.utils.hub import cached_file

    try:
        found: Any = cached_file(str(path), name)
    except OSError as error:
        raise OSError(f"{where}: {path} must hold {name}, got {error}") from error
    return Path(found)


def _image_config(where: str, path: str | Path) -> dict[str, Any]:
    """Newer versions of transformers save it within the configuration of the whole processor."""
    old, new = PROCESSOR[0]
    try:
        return json.loads(file_of(where, path, old).read_text())
    except OSError:
        config = json.loads(file_of(where, path, new).read_text())
    if "image_processor" not in config:
        raise OSError(f"{where}: {path}/{new} must describe an image_processor, got {list(config)}")
    return config["image_processor"]
