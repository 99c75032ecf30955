"""`train` in a pseudo-terminal: the live view of a real run, a resize, Ctrl-C; no terminal."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

pytest.importorskip("rich", reason="the live view needs the live extra")
pytest.importorskip("diffusers", reason="the embedded model needs the demo extra")
pytest.importorskip("sklearn", reason="the embedded model needs the demo extra")

from terminals import Terminal

from branchcore.cli import main

WORDS = [
    "train", "--recipe", "dance_grpo", "--set", "group=3", "--set", "updates=2",
    "--set", "prompts_per_iteration=1", "--set", "evaluate_every=99", "--iterations",
]  # fmt: skip


def _with_ctrl_c():
    """What runs in the background inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Train:
    """`python -m branchcore train` in a terminal of its own.

    Args:
        words: of the command.
        width: columns.
        height: rows.
    """

    def __init__(self, words, width=80, height=24):
        self.terminal, self.raw, self._whole = Terminal(width, height), "", b""
        self._end, other = pty.openpty()
        self.resize(width, height)
        sizes = ("COLUMNS", "LINES", "BRANCHCORE_LOG")
        env = {name: value for name, value in os.environ.items() if name not in sizes}
        self.started = subprocess.Popen(
            [sys.executable, "-m", "branchcore", *map(str, words)],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**env, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
            cwd=os.path.expanduser("~"), preexec_fn=_with_ctrl_c,
        )  # fmt: skip
        os.close(other)

    def resize(self, width, height):
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        if width != self.terminal.width:
            self.terminal.resize(width, height)

    def until(self, wanted, seconds=200.0):
        """Reads until a text is on the screen; None: until the command has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if wanted is not None and wanted in self.terminal.screen:
                return
            if select.select([self._end], [], [], 0.1)[0] and not self._read():
                assert wanted is None, self.terminal.text
                assert self.started.wait(30) is not None
                os.close(self._end)
                return
        self.started.kill()
        raise AssertionError(f"{wanted!r} must come in {seconds} s, got\n{self.terminal.text}")

    def _read(self):
        try:
            found = os.read(self._end, 65536)
        except OSError:  # what Linux says when the other side is closed
            return False
        # a piece may end within a character or a sequence
        self._whole += found
        cut = max(self._whole.rfind(b"\n"), self._whole.rfind(b"\x1b[J") + 2) + 1
        self.terminal.write(self._whole[:cut].decode())
        self._whole = self._whole[cut:]
        return bool(found)


def test_a_run_is_seen_through_a_resize_until_ctrl_c(tmp_path):
    out = tmp_path / "run"
    run = Train([*WORDS, 9999, "--set", "lr=0.01", "--out", out])
    run.until(" evaluation")
    assert "iteration 0 of 9999" in run.terminal.screen
    run.until("1 of 9999")
    run.resize(40, 30)
    run.until("3 of 9999")
    os.killpg(run.started.pid, signal.SIGINT)
    run.until(None)
    assert run.started.returncode == 130, run.terminal.text
    found = run.terminal.text
    before, _, last = found.rpartition(" dance_grpo on digits")
    assert "each iteration: 1 prompts, 3 images" in before.replace("\n", "")
    assert "UserWarning: ratio_dev_mean" in before.replace("\n", "")
    assert " finished" not in found
    for said in ("stopped by Ctrl-C", "legibility", "clip range", "floor", "update"):
        assert said in last, said
    assert "! ratio_dev_mean at" in last
    assert last.endswith("\nbranchcore train: stopped by Ctrl-C")
    assert max(map(len, last.splitlines())) <= 40
    assert run.terminal.x == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 4


def test_without_a_terminal_live_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="view: live must have a terminal, got stdout that is"):
        main([*WORDS, "1", "--out", str(tmp_path / "run"), "--view", "live"])
    assert not (tmp_path / "run").exists()
