"""The worker of `SubprocessReward`: `python worker.py module:function '{"option": 1}'`.

Runs in an environment of its own: needs Python 3.10, torch, numpy and safetensors, not branchcore.
A message is MAGIC, two lengths (8 bytes each, big-endian), JSON of the first length, and bytes of
safetensors of the second. Replies go to the standard output the process started with; whatever
else prints there goes to standard error instead. An exception ends the worker.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

MAGIC = b"BCR1"
HEAD = struct.Struct(">4sQQ")


def message(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Returns the bytes of a message."""
    text = json.dumps(header).encode()
    return HEAD.pack(MAGIC, len(text), len(body)) + text + body


def parse(received: bytes | bytearray) -> tuple[dict[str, Any], bytes] | None:
    """Returns the header and body of a message, or None while some of it is missing.

    Raises:
        ValueError: it is no message.
    """
    start = bytes(received[: len(MAGIC)])
    if start != MAGIC[: len(start)]:
        raise ValueError(f"got {bytes(received[:60])!r}")
    if len(received) < HEAD.size:
        return None
    _, text, body = HEAD.unpack_from(received)
    whole = HEAD.size + text + body
    if len(received) > whole:
        raise ValueError(f"got {len(received) - whole} bytes more than the message has")
    if len(received) < whole:
        return None
    view = memoryview(received)[HEAD.size :]
    return json.loads(bytes(view[:text])), bytes(view[text:])


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Reads one message; None at the end of the input."""
    received = pipe.read(HEAD.size)
    if len(received) < HEAD.size:
        return None
    _, text, body = HEAD.unpack(received)
    return parse(received + pipe.read(text + body))


def _factory(spec: str) -> Callable[..., Callable[..., Any]]:
    """Finds `module:function` or `path/to/file.py:function`."""
    import importlib
    import importlib.util

    place, _, name = spec.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    found = importlib.util.spec_from_file_location("branchcore_scorer", place)
    if found is None or found.loader is None:
        raise ImportError(f"worker: {place} must be a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return getattr(module, name)


def _serve(inputs: IO[bytes], outputs: IO[bytes], reward: Callable[..., Any]) -> None:
    import torch
    from safetensors.torch import load, save

    outputs.write(message({"ready": True}))
    outputs.flush()
    while (request := _receive(inputs)) is not None:
        header, body = request
        with torch.no_grad():
            result = reward(load(body)["images"], header["prompts"])
        columns = {
            name: torch.as_tensor(column).detach().to("cpu", torch.float32).contiguous()
            for name, column in result.items()
        }
        outputs.write(message({"names": list(columns)}, save(columns)))
        outputs.flush()


def main() -> None:
    """Serves until the input ends."""
    inputs, outputs = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    _serve(inputs, outputs, _factory(sys.argv[1])(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    # Python put this file's folder first, where neighbours may hide packages of the same name
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.getcwd(), *(place for place in sys.path if place != here)]
    main()
