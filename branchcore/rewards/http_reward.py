"""A scorer behind a URL: one POST per batch, in a format that any language reads.

Request: a file of safetensors with the tensor `images` (N, ...), float32 as decoded or uint8
levels, whose metadata holds `prompts`, a JSON list of N texts; Content-Type
application/octet-stream. Response, status 200: a JSON object {component: N numbers}; null or NaN
for an image that cannot be scored. Letters: N images.
"""

from __future__ import annotations

import json
import math
import socket
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from branchcore.rewards import waiting
from branchcore.rewards.failures import NoRetry, RetryLater

DTYPES = ("float32", "uint8")
_BUSY = (408, 425, 429)
_SPARE_BYTES, _IMAGE_BYTES = 2**16, 2**10
_SHOWN = 200


class _Response(NamedTuple):
    status: int
    reason: str
    after: str | None
    """Retry-After."""
    body: bytes
    """At most one byte more than is taken."""


class HttpReward:
    """Calls a reward that a server has; see the module for what is sent and what must come back.

    Calls again where that can help are the part of `Retrying`: after connection errors, no answer
    in time, statuses 408, 425, 429 and 5xx (whose Retry-After it keeps to), an answer that is no
    JSON. Other statuses, redirections too, and answers of another shape raise `NoRetry`. Every call
    is a connection of its own, without proxies.

    Args:
        url: `http://host[:port]/path` or `https://...`
        timeout_s: for one call.
        dtype: "float32", images as they are decoded, or "uint8": round(255 x) of images in [0, 1],
            a quarter of the bytes.

    Raises:
        ValueError: a malformed argument.
    """

    def __init__(self, url: str, *, timeout_s: float = 300.0, dtype: str = "float32") -> None:
        _check_url(url)
        if not 0.0 < timeout_s < math.inf:
            raise ValueError(f"HttpReward: timeout_s must be positive and finite, got {timeout_s}")
        if dtype not in DTYPES:
            raise ValueError(f"HttpReward: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.url, self.timeout_s, self.dtype = url, timeout_s, dtype

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns the components, (N,) float64 on the CPU.

        Raises:
            RuntimeError: no answer, or none that can be read; `RetryLater` from a busy server.
            NoRetry: the server refuses, or returned something else than N numbers per component.
            Cancelled: nobody waits for the scores any more.
        """
        return self.within(images, prompts, self.timeout_s)

    def within(self, images: Tensor, prompts: list[str], timeout_s: float) -> dict[str, Tensor]:
        """Calls the server with a time limit besides its own; see `__call__`."""
        count, limit = len(images), min(timeout_s, self.timeout_s)
        if self.dtype == "uint8":
            images = (images.detach().float() * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)
        sent = images.detach().to("cpu", getattr(torch, self.dtype)).contiguous()
        body = save({"images": sent}, {"prompts": json.dumps(list(prompts))})
        most = _SPARE_BYTES + _IMAGE_BYTES * count
        try:
            response = waiting.in_thread(partial(_post, self.url, body, most, limit), limit)
        except (OSError, HTTPException) as error:
            raise RuntimeError(
                f"{self._must(count)}, got {type(error).__name__}: {error}"
            ) from error
        self._check_status(response, count)
        if len(response.body) > most:
            raise NoRetry(f"{self._must(count)} in at most {most} bytes, got more")
        return self._columns(response.body, count)

    def _must(self, count: int) -> str:
        return f"HttpReward: {self.url} must score {count} images"

    def _check_status(self, response: _Response, count: int) -> None:
        if response.status == 200:
            return
        shown = response.body[:_SHOWN].decode(errors="replace").strip()
        text = f"{self._must(count)}, got {response.status} {response.reason}: {shown}"
        if response.status in _BUSY or response.status >= 500:
            raise RetryLater(text, _seconds(response.after))
        raise NoRetry(text)

    def _columns(self, body: bytes, count: int) -> dict[str, Tensor]:
        try:
            answer: Any = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RuntimeError(
                f"{self._must(count)} and answer with JSON, got {body[:_SHOWN]!r}"
            ) from error
        if not isinstance(answer, dict) or not answer:
            raise NoRetry(
                f"{self._must(count)} and return components by name, got {body[:_SHOWN]!r}"
            )
        columns: dict[str, Tensor] = {}
        for name, column in cast("dict[str, Any]", answer).items():
            if not isinstance(column, list) or len(cast("list[Any]", column)) != count:
                size = len(cast("list[Any]", column)) if isinstance(column, list) else "no list"
                raise NoRetry(f"{self._must(count)} with as many numbers for {name}, got {size}")
            numbers = [self._number(name, x, count) for x in cast("list[Any]", column)]
            columns[name] = torch.tensor(numbers, dtype=torch.float64)
        return columns

    def _number(self, name: str, value: Any, count: int) -> float:
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise NoRetry(f"{self._must(count)} with numbers for {name}, got {value!r}"[:_SHOWN])
        try:
            return float(value)
        except OverflowError:
            return math.inf


def _check_url(url: str) -> None:
    """Raises ValueError unless it is an HTTP address without a user, whose password would show."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good, parts = False, urlsplit("")
    plain = url.isascii() and url.isprintable() and " " not in url
    if not (good and plain) or parts.username is not None or parts.fragment:
        shown = url.rpartition("@")[2]
        raise ValueError(f"HttpReward: url must be http://host[:port]/path, got {shown!r}")


def _post(url: str, body: bytes, most: int, timeout_s: float) -> _Response:
    """Sends the body; the answer is read up to a byte more than it may have."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.netloc, timeout=timeout_s)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Content-Type": "application/octet-stream", "Connection": "close"}
    try:
        connection.connect()
        # the connection forgets its socket as soon as an answer has begun
        with waiting.ended_by(partial(_hang_up, connection.sock)):
            # a server may refuse, say why and close before it has read everything
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", target, body, headers)
            answer = connection.getresponse()
            received = answer.read(most + 1)
            after = answer.getheader("Retry-After")
            return _Response(answer.status, answer.reason, after, received)
    finally:
        connection.close()


def _hang_up(connected: socket.socket) -> None:
    """Makes whatever reads from or writes to a socket return at once."""
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _seconds(after: str | None) -> float:
    """Returns the seconds from now that Retry-After, a number or a date, says; 0 if nothing."""
    if after is None:
        return 0.0
    with suppress(ValueError, OverflowError):
        wait = float(after) if after.strip().isdigit() else _until(after)
        return max(0.0, wait)
    return 0.0


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
