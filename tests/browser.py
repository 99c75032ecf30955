"""A headless Chromium over its DevTools protocol, with nothing but the standard library."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0"),
)


def find():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page; `events` holds all that the browser said of it."""

    def __init__(self, program):
        self.folder = tempfile.TemporaryDirectory(prefix="browser")
        command = [program, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.running = subprocess.Popen(command, **quiet)
        self.events, self.answers, self.sent, self.session = [], {}, 0, None
        self.socket = self._connect()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = session["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def _connect(self):
        port = Path(self.folder.name) / "DevToolsActivePort"
        until = time.monotonic() + 30
        while not port.exists() or port.read_text().count("\n") < 1:
            assert time.monotonic() < until, "the browser did not start"
            assert self.running.poll() is None, "the browser ended"
            time.sleep(0.05)
        number, path = port.read_text().split()[:2]
        link = socket.create_connection(("127.0.0.1", int(number)), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        link.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{number}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = link.makefile("rb")
        assert b"101" in self.stream.readline()
        while self.stream.readline().strip():
            pass
        return link

    def _send(self, text):
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        kind = bytes([0x81])
        if size < 126:
            head = kind + bytes([0x80 | size])
        elif size < 65536:
            head = kind + bytes([0x80 | 126]) + struct.pack(">H", size)
        else:
            head = kind + bytes([0x80 | 127]) + struct.pack(">Q", size)
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(data))
        self.socket.sendall(head + mask + masked)

    def _receive(self):
        text, last = b"", False
        while not last:
            first, size = self.stream.read(2)
            last, size = bool(first & 0x80), size & 0x7F
            if size == 126:
                (size,) = struct.unpack(">H", self.stream.read(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self.stream.read(8))
            text += self.stream.read(size)
        return json.loads(text)

    def _next(self):
        found = self._receive()
        if "id" in found:
            self.answers[found["id"]] = found
        else:
            self.events.append(found)

    def ask(self, method, **params):
        self.sent += 1
        number = self.sent
        asked = {"id": number, "method": method, "params": params}
        self._send(json.dumps(asked | ({"sessionId": self.session} if self.session else {})))
        while number not in self.answers:
            self._next()
        answer = self.answers.pop(number)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url, *, width, height=900, dark=False, script=True):
        """Loads a page anew and waits until it is there."""
        scale = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        self.value("1")  # what was said until now has arrived

    def value(self, expression):
        """Returns what an expression of JavaScript comes to."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def move(self, x, y):
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def requests(self):
        return [e["params"]["request"]["url"] for e in self._named("Network.requestWillBeSent")]

    def complaints(self):
        """Returns errors and whatever else was written to the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for kind in kinds for event in self._named(kind)]

    def _named(self, method):
        return [event for event in self.events if event["method"] == method]

    def screenshot(self, path, clip=None):
        whole = {"captureBeyondViewport": True}
        if clip is None:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        found = self.ask("Page.captureScreenshot", clip={**clip, "scale": 1}, **whole)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def close(self):
        self.running.terminate()
        self.running.wait(30)
        self.socket.close()
        for _ in range(50):  # a child may still be writing to its profile
            try:
                self.folder.cleanup()
                return
            except OSError:
                time.sleep(0.1)
