"""README tells the truth: its code runs, its commands and files exist, its tables are current."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_block_is_a_whole_iteration(toy):
    model = toy(torch.float32)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before = [p.detach().clone() for p in model.module.parameters()]
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.module.parameters(), lr=1e-3),
        "uids": [3, 4],
        "prompts": ["a", "b"],
        "step": 7,
        "reward": lambda images, prompts: {"mean": images.mean(1)},
        "decode": lambda leaves: leaves,
        "reward_weights": np.ones(1),
    }
    exec(code, names)
    after = list(model.module.parameters())
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    assert len(names["texts"]) == 32


def test_named_files_exist():
    for name in re.findall(r"(?:bench|tests|branchcore|csrc)/[\w/]+\.(?:py|md|json)", README):
        assert (ROOT / name).exists(), name
    block = README.split("## Files")[1].split("### Add a method")[0]
    for name in re.findall(r"\b(\w+\.py)\b", block):
        assert list((ROOT / "branchcore").rglob(name)) or list(ROOT.glob(f"tests/{name}")), name


def test_tables_are_those_of_the_result_files():
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("the results are not part of this copy")
    check = [sys.executable, str(ROOT / "bench" / "readme.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
