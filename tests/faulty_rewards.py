"""Rewards, workers and servers that fail as they are told to; what they leave is seen."""

import contextlib
import http.server
import json
import math
import os
import threading
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load


def leaves(count):
    """Images whose value is their number from 1, and prompts that know it."""
    return torch.arange(1.0, count + 1.0)[:, None], [f"p{i}" for i in range(count)]


def means(images, prompts):
    """Two components; refuses images that have got other prompts than their own."""
    assert not torch.is_grad_enabled()
    assert [int(p[1:]) + 1 for p in prompts] == images[:, 0].tolist()
    return {"a": images.mean(1), "b": 2.0 * images.mean(1)}


class Failing:
    """`means`, but its first calls fail, and all calls with one of the bad leaves.

    how: "raise"; "nan" for the bad leaves alone; "poison": Inf for the whole batch.
    """

    def __init__(self, first=0, bad=(), error=None, how="raise"):
        self.left, self.bad, self.how = first, {i + 1.0 for i in bad}, how
        self.error = error or OSError("gone")
        self.sizes = []

    def __call__(self, images, prompts):
        self.sizes.append(len(images))
        good = means(images, prompts)
        bad = torch.tensor([x in self.bad for x in images[:, 0].tolist()])
        failed, self.left = self.left > 0, max(0, self.left - 1)
        if self.how == "raise" and (failed or bad.any()):
            raise self.error
        if self.how == "nan":
            good["b"][bad | failed] = math.nan
        if self.how == "poison" and (failed or bad.any()):
            good["a"][:] = math.inf
        return good


class Hanging:
    """`means`, but its first calls wait until they are let go."""

    def __init__(self, first):
        self.left, self.go, self.inside = first, threading.Event(), []

    def __call__(self, images, prompts):
        self.left -= 1
        if self.left >= 0:
            self.inside.append(threading.current_thread())
            self.go.wait()
        return means(images, prompts)

    def let_go(self):
        self.go.set()
        for thread in self.inside:
            thread.join(5.0)


@contextlib.contextmanager
def nothing_left_behind():
    """Fails if its block leaves a thread or a process, a zombie too."""
    before = threads(), children()
    yield
    end = time.monotonic() + 5.0
    while (threads(), children()) != before and time.monotonic() < end:
        time.sleep(0.05)  # a thread that has done its work may still be on its way out
    assert (threads(), children()) == before


def threads():
    """Threads of this process, without the one that a progress bar keeps."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


def children():
    """Process ids of this process's children."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has just ended
            found |= set((task / "children").read_text().split())
    return found


def alive(pid):
    """Runs, and is no zombie."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


class Request(http.server.BaseHTTPRequestHandler):
    """Leaves the answer to the server's `act`."""

    def do_POST(self):
        self.server.requests.append(self)
        self.server.act(self)

    def read(self):
        """Returns the images and prompts that were sent."""
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        (self.server.folder / "body").write_bytes(self.body)
        with safe_open(self.server.folder / "body", "pt") as file:
            prompts = json.loads(file.metadata()["prompts"])
        return load(self.body)["images"], prompts

    def answer(self, text, status=200, **headers):
        text = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        for name, value in ({"Content_Length": len(text)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with `act(request)`, in a thread; closing waits for all of them."""

    daemon_threads = False

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Request)
        self.folder, self.requests, self.act = folder, [], None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/score?model=a"

    def handle_error(self, *_):
        """Says nothing: clients hang up in these tests."""

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


FAKE_WORKER = """
import importlib.util, json, os, signal, struct, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
output, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
options = json.loads(sys.argv[3])
folder = Path(options["folder"])
time.sleep(options.get("start_s", 0.0))

def send(header, body=b""):
    output.write(worker.message(header, body))
    output.flush()

send({"ready": True})
while (request := worker._receive(sys.stdin.buffer)) is not None:
    prompts = request[0]["prompts"]
    with (folder / "calls").open("a") as file:
        file.write(f"{os.getpid()} {len(prompts)}\\n")
    first = len((folder / "calls").read_text().splitlines()) == 1
    if "bad" in prompts:
        os._exit(9)
    if "once" in prompts and first:
        time.sleep(60)
    if "orphan" in prompts and first:
        child = os.fork()
        if child == 0:
            time.sleep(60)
        (folder / "orphan").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    shape = {"dtype": "F32", "shape": [len(prompts)], "data_offsets": [0, 4 * len(prompts)]}
    head = json.dumps({"len": shape}).encode()
    body = b"".join(struct.pack("<f", len(p)) for p in prompts)
    send({"names": ["len"]}, struct.pack("<Q", len(head)) + head + body)
"""
"""A worker of `SubprocessReward` that imports no torch, so that it starts in no time.

Its reward is the length of a prompt. It writes its pid and the number of images of every call.
"""
