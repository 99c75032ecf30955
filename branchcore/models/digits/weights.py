"""The weights file of the digits task: generator, classifiers, class statistics, word embeddings.

One flat safetensors file: `generator.*`, `reward_classifier.*`, `judge.*`, `statistics.mean`,
`statistics.std`, `words`, and metadata `format`, `version`, `config` (JSON of the transformer).
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from branchcore.models.digits.classifier import frozen_classifier
from branchcore.models.digits.features import FeatureStatistics

SHIPPED_WEIGHTS = Path(__file__).with_name("weights.safetensors")
FORMAT, VERSION = "branchcore digits", "1"


class DigitsWeights(NamedTuple):
    """Everything that the pretraining script makes."""

    generator: dict[str, Tensor]  # state of the transformer
    reward_classifier: nn.Sequential
    judge: nn.Sequential
    statistics: FeatureStatistics
    words: Tensor  # (16, 32) fp32, fixed embedding of each of prompts.WORDS
    config: dict[str, int]  # arguments of SD3Transformer2DModel


def write_weights(path: Path, weights: DigitsWeights) -> None:
    """Write one safetensors file."""
    tensors = {
        **_prefixed("generator", weights.generator),
        **_prefixed("reward_classifier", weights.reward_classifier.state_dict()),
        **_prefixed("judge", weights.judge.state_dict()),
        **_prefixed("statistics", weights.statistics._asdict()),
        "words": weights.words,
    }
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(weights.config)}
    path.write_bytes(save(tensors, metadata))


def read_weights(path: Path = SHIPPED_WEIGHTS) -> DigitsWeights:
    """Read a file of `write_weights`.

    Raises:
        ValueError: The file is damaged, or something else than digits weights of this version.
    """
    tensors, metadata = read_tensors(path)
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"read_weights: {path} must have format and version {(FORMAT, VERSION)}, got {found}"
        )
    try:
        return DigitsWeights(
            _part(tensors, "generator"),
            load_state(frozen_classifier(), _part(tensors, "reward_classifier"), path),
            load_state(frozen_classifier(), _part(tensors, "judge"), path),
            FeatureStatistics(tensors["statistics.mean"], tensors["statistics.std"]),
            tensors["words"],
            json.loads(metadata["config"]),
        )
    except KeyError as error:
        raise ValueError(f"read_weights: {path} must be complete, got none of {error}") from error


@functools.cache
def shipped_weights() -> DigitsWeights:
    """Read the weights that come with the package, once."""
    return read_weights(SHIPPED_WEIGHTS)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file, which must exist."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"read_tensors: {path} must be an intact safetensors file, got {error}; "
            "try to download or save it again"
        ) from error


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_state(module: ModuleT, state: Mapping[str, Tensor], source: str | Path) -> ModuleT:
    """Load a state dict that must fit exactly; the error names its source."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"load_state: {source} must hold the weights of {type(module).__name__}, got {error}"
        ) from error
    return module


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}
