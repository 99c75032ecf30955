"""Curves: every metric of a run is on the picture, in a panel of its own scale."""

import json

import pytest

from branchcore.plots import curves, panels, read_metrics

ROWS = [
    {"iteration": 0, "eval/both_right": 0.1, "eval/slant_right": 0.2, "eval/judge": 1, "eval/a": 0},
    {"iteration": 1, "reward": -2.0, "reward/a": -2.0, "kl": 0.0, "grad_norm": 1.0, "cpu_s": 2.5},
]  # fmt: skip


def test_panels_group_what_shares_a_scale():
    got = panels(ROWS)
    assert got["reward, held-out noise"] == ["eval/a"]
    assert got["held-out: share right"] == ["eval/both_right", "eval/slant_right"]
    assert got["held-out: judge"] == ["eval/judge"]
    assert "ratio deviation" not in got


def test_curves_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_metrics(log) == ROWS
    assert curves(log, tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
