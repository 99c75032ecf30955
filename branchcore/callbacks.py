"""Callbacks that show a run in TensorBoard or W&B; nothing of either is imported before asked for.

metrics.jsonl stays what a run is resumed from; these are copies to look at. Steps are iterations.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from branchcore.checkpoint import read_json, require
from branchcore.run_folder import write_whole

_GROUPS = {
    "reward": ("reward", "zero_std_share"),
    "policy": (
        *("ratio_dev_mean", "ratio_dev_max", "clip_share", "clip_noise_share", "clip"),
        "noise_floor",
        *("loss", "kl", "grad_norm"),
    ),
    "work": ("leaves", "edges", "parents", "model_calls", "tokens", "tflop", "mfu"),
    "time": ("cpu_s", "wall_s"),
    "memory": ("memory_gb", "rss_gb"),
}
_GROUP = {name: group for group, names in _GROUPS.items() for name in names}


def tagged(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row by tag, `group/name`; metrics with a prefix keep it as group."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name != "iteration"
    }
    return {n if "/" in n else f"{_GROUP.get(n, 'other')}/{n}": v for n, v in numbers.items()}


class TensorBoard:
    """Writes every row, with new sample grids, to `<out>/tensorboard`; a resumed run goes on there.

    Rows are flushed one by one; leave the block, or call `close`, at the end.

    Args:
        out: folder of the run, whose `samples*.png` are shown.

    Raises:
        RuntimeError: TensorBoard is not installed.
    """

    def __init__(self, out: str | Path) -> None:
        self.out, self._pictures = Path(out), _Pictures(Path(out))
        self._package = _package("torch.utils.tensorboard", "TensorBoard", "tensorboard")
        self._image = _package("PIL.Image", "Pillow", "tensorboard")
        self._writer: Any = None

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Writes a row; the first one hides what an earlier writer wrote of it and after it."""
        step = metrics["iteration"]
        if self._writer is None:
            folder = str(self.out / "tensorboard")
            self._writer = self._package.SummaryWriter(folder, purge_step=step)
        for tag, value in tagged(metrics).items():
            self._writer.add_scalar(tag, value, step)
        for text in metrics.get("warnings", ()):
            self._writer.add_text("warnings", text, step)
        for name, path in self._pictures.new().items():
            with self._image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(f"samples/{name}", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class WandB:
    """Logs every row, with new sample grids, to W&B; a resumed run goes on under its id.

    The id is in the run's folder (wandb.json), the project and the rest are W&B's own business:
    WANDB_PROJECT, WANDB_MODE=offline and so on. Steps that an interrupted run logged after its last
    checkpoint stay as they are; the resumed run makes the same ones again. Leave the block, or call
    `close`, at the end.

    Args:
        out: folder of the run, whose `samples*.png` are shown.
        project: of W&B; None = as its environment says.

    Raises:
        RuntimeError: wandb is not installed.
    """

    def __init__(self, out: str | Path, project: str | None = None) -> None:
        self.out, self.project, self._pictures = Path(out), project, _Pictures(Path(out))
        self._package = _package("wandb", "wandb", "wandb")
        _package("PIL.Image", "Pillow", "wandb")
        self._run: Any = None

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Logs a row; the first one opens the run."""
        if self._run is None:
            self._run = self._open()
        pictures = self._pictures.new().items()
        images = {f"samples/{name}": self._package.Image(str(path)) for name, path in pictures}
        self._run.log({**tagged(metrics), **images}, step=metrics["iteration"])
        for text in metrics.get("warnings", ()):
            self._run.alert(title=text.split(":")[0], text=text)

    def _open(self) -> Any:
        name = self.out / "wandb.json"
        if not name.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(name, json.dumps({"id": secrets.token_hex(8)}) + "\n")
        known, identity = read_json(name), self.out / "run.json"
        require(name, known, id=str)
        return self._package.init(
            id=known["id"],
            resume="allow",
            project=self.project,
            name=self.out.name,
            dir=str(self.out),
            config=read_json(identity) if identity.is_file() else None,
        )

    def close(self, *, failed: bool = False) -> None:
        """Ends the run and waits for its upload.

        Args:
            failed: an error ended it.
        """
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def __enter__(self) -> WandB:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=error is not None)


LOGGERS: dict[str, Callable[[Path], TensorBoard | WandB]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
"""By name on the command line."""


class _Pictures:
    """The sample grids of a run that were written since the last look."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._seen = self._now()

    def _now(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(self.out.glob("samples*.png"))}

    def new(self) -> dict[str, Path]:
        """Returns name -> file."""
        now = self._now()
        new = [path for path, written in now.items() if self._seen.get(path) != written]
        self._seen = now
        return {path.stem: path for path in new}


def _package(module: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"callbacks: {name} must be installed, got none ({error}); "
            f"try pip install 'branchcore[{extra}]'"
        ) from error
