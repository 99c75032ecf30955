"""One worker process seen from here: starts it, exchanges messages in time, ends it."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import IO, Any

from branchcore.rewards import worker
from branchcore.rewards.waiting import ended_by

_TAIL_LINES = 15
_GRACE_S = 5.0
_CHUNK = 2**20
_LOOK_S = 0.5


class WorkerFailure(RuntimeError):
    """A worker died, took too long or answered with something else than a message."""


class WorkerProcess:
    """A running worker; it ends with this object, and with the interpreter at the latest.

    Args:
        command: its argument list.
        env: added to this process's environment.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        # A group of its own: a Ctrl-C goes to the trainer, and a kill also takes its children.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **env},
            start_new_session=True,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._stdin, self._stdout = stdin, stdout
        os.set_blocking(stdin.fileno(), False)
        os.set_blocking(stdout.fileno(), False)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reader = Thread(target=_pass_on, args=(self._process.stderr, self._tail), daemon=True)
        self._reader.start()
        self._end = weakref.finalize(self, _end, self._process, self._reader)

    def exchange(self, request: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """Sends a message, if there is one, and returns the next.

        Raises:
            WorkerFailure: there was none within the time.
            Cancelled: nobody waits for it any more.
        """
        with ended_by(partial(_kill, self._process)):
            return self._exchanged(request, timeout_s)

    def _exchanged(self, request: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        deadline = time.monotonic() + timeout_s
        unsent, received = memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(self._stdin, selectors.EVENT_WRITE)
            while (left := deadline - time.monotonic()) > 0.0:
                ready = selector.select(min(left, _LOOK_S))
                # what a dead worker leaves behind may keep its output open
                if not ready and self._process.poll() is not None:
                    raise self._death()
                for key, _ in ready:
                    if key.fileobj is self._stdin:
                        unsent = unsent[self._write(unsent) :]
                        if not unsent:
                            selector.unregister(self._stdin)
                        continue
                    chunk = os.read(self._stdout.fileno(), _CHUNK)
                    if not chunk:
                        raise self._death()
                    received += chunk
                    answer = self._parsed(received)
                    if answer is not None:
                        return answer
        raise WorkerFailure(f"the worker timed out after {timeout_s:g} s{self._last_words()}")

    def end(self, *, at_once: bool = False) -> None:
        """Ends the process and waits for it; an idle worker goes by itself when its input ends."""
        if at_once:
            _kill(self._process)
        self._end()

    def _write(self, unsent: memoryview) -> int:
        try:
            return os.write(self._stdin.fileno(), unsent[:_CHUNK])
        except BrokenPipeError:
            raise self._death() from None

    def _parsed(self, received: bytearray) -> tuple[dict[str, Any], bytes] | None:
        try:
            return worker.parse(received)
        except ValueError as error:
            raise WorkerFailure(
                f"the worker returned garbage: {error}{self._last_words()}"
            ) from None

    def _death(self) -> WorkerFailure:
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return WorkerFailure(f"the worker closed its output{self._last_words()}")
        return WorkerFailure(f"the worker died with exit code {code}{self._last_words()}")

    def _last_words(self) -> str:
        self._reader.join(0.2)
        return "; its last words:\n" + "\n".join(self._tail) if self._tail else ""


def _pass_on(pipe: IO[bytes], tail: deque[str]) -> None:
    with pipe:
        for line in pipe:
            text = line.decode(errors="replace").rstrip()
            tail.append(text)
            sys.stderr.write(f"{text}\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the worker's group, be it that only its children are left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], reader: Thread) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        _kill(process)
        process.wait()
    process.stdout.close()
    reader.join(_GRACE_S)
