"""A scorer in its own interpreter and packages, behind the protocol of a reward."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from branchcore.rewards import waiting, worker
from branchcore.rewards.failures import NoRetry
from branchcore.rewards.worker_process import WorkerFailure, WorkerProcess


class SubprocessReward:
    """Calls a reward that lives in a worker process; the worker stays between calls.

    The worker calls `factory(**options)` once, which returns `reward(images, prompts) ->
    {component: (N,) numbers}`. It gets CPU tensors of the dtype they have here. A call fails when
    the worker dies (an exception in the reward ends it, too), exceeds its time or answers with
    something else; it is then killed, and the next call starts a new one: `Retrying` makes it. The
    worker's standard output and error both appear on this process's standard error.

    Args:
        factory: "module:function", the module found from the current folder or in the worker's
            packages, or "path/to/file.py:function".
        python: the interpreter, or a command that ends in one, such as ("conda", "run",
            "--no-capture-output", "-n", "scorer", "python"). It needs torch, numpy and safetensors.
        options: keyword arguments of the factory, anything JSON has.
        env: added to the environment, such as {"CUDA_VISIBLE_DEVICES": "1"}.
        start_timeout_s: for importing packages and making the scorer.
        timeout_s: for one call, without the start of a new worker.

    Raises:
        ValueError: a malformed argument.
        OSError: no such interpreter or file.
        RuntimeError: the worker did not become ready.
    """

    def __init__(
        self,
        factory: str,
        *,
        python: str | Sequence[str] = sys.executable,
        options: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 300.0,
        timeout_s: float = 300.0,
    ) -> None:
        python = [python] if isinstance(python, str) else list(python)
        check_subprocess(factory, python)
        for name, value in (("start_timeout_s", start_timeout_s), ("timeout_s", timeout_s)):
            if not value > 0.0:
                raise ValueError(f"SubprocessReward: {name} must be positive, got {value}")
        self.factory = factory
        self.start_timeout_s, self.timeout_s = start_timeout_s, timeout_s
        self._command = [*python, worker.__file__, factory, json.dumps(dict(options or {}))]
        self._env = dict(env or {})
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        try:
            self._worker = self._started()
        except WorkerFailure as error:
            raise RuntimeError(
                f"SubprocessReward: {factory} must get ready, but {error}"
            ) from error

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the components, (N,) fp32 on the CPU.

        Raises:
            RuntimeError: the worker died, was late or answered with something else.
            NoRetry: the reward returned another number of scores, or none.
            Cancelled: nobody waits for the scores any more; the worker is killed.
        """
        return self.within(images, prompts, self.timeout_s)

    def within(self, images: Tensor, prompts: list[str], timeout_s: float) -> dict[str, Tensor]:
        """Calls the reward with a time limit besides its own; see `__call__`."""
        body = save({"images": images.detach().cpu().contiguous()})
        request = worker.message({"prompts": list(prompts)}, body)
        with self._lock:
            header, answer = self._exchanged(request, min(timeout_s, self.timeout_s), len(images))
        return self._columns(header, answer, len(images))

    def close(self) -> None:
        """Ends the worker; a later call starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.end()
            self._worker = None

    def __enter__(self) -> SubprocessReward:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _started(self) -> WorkerProcess:
        new = WorkerProcess(self._command, self._env)
        try:
            new.exchange(b"", self.start_timeout_s)
        except BaseException:
            new.end(at_once=True)
            raise
        return new

    def _exchanged(
        self, request: bytes, timeout_s: float, count: int
    ) -> tuple[dict[str, Any], bytes]:
        try:
            if self._worker is None:
                self._worker = self._started()
            return self._worker.exchange(request, timeout_s)
        except BaseException as error:
            # an answer that is late belongs to no later call, so the worker goes in any case
            if self._worker is not None:
                self._worker.end(at_once=True)
            self._worker = None
            if not isinstance(error, WorkerFailure):
                raise
            waiting.check()
            raise RuntimeError(
                f"SubprocessReward: {self.factory} must score {count} images, but {error}"
            ) from error

    def _columns(self, header: Mapping[str, Any], body: bytes, count: int) -> dict[str, Tensor]:
        try:
            tensors = load(body)
        except SafetensorError as error:
            raise RuntimeError(
                f"SubprocessReward: {self.factory} must answer with safetensors, got {error}"
            ) from error
        names = header.get("names")
        if not names or set(names) != set(tensors):
            raise NoRetry(
                f"SubprocessReward: {self.factory} must return a mapping of components, got {names}"
            )
        for name in names:
            if tuple(tensors[name].shape) != (count,) or tensors[name].dtype != torch.float32:
                raise NoRetry(
                    f"SubprocessReward: {self.factory} must return ({count},) numbers for {name}, "
                    f"one per image, got {tuple(tensors[name].shape)}"
                )
        return {name: tensors[name] for name in names}


def check_subprocess(factory: str, python: Sequence[str]) -> None:
    """Raises unless the interpreter exists and the factory reads `module:function`."""
    place, _, name = factory.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(
            "SubprocessReward: factory must be 'module:function' or 'path/to/file.py:function', "
            f"got {factory!r}"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise OSError(f"SubprocessReward: factory must be in a file, got {place}, which is none")
    if not python or shutil.which(python[0]) is None:
        raise OSError(
            f"SubprocessReward: python must be a program, got {python[0] if python else 'none'}"
        )
