"""The benchmark's families: proved like every plan, and on one device from prompt to reward."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import checks  # noqa: E402
import tree_throughput  # noqa: E402
from families import FAMILIES, FamilyModel  # noqa: E402
from workload import linear_reward  # noqa: E402


def test_a_family_with_guidance_passes_the_checks_of_its_plans(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checks, "WAYS", {"tape": checks.WAYS["tape"]})
    monkeypatch.setattr(checks, "LIMITS", {torch.float64: 1e-12})
    out = tmp_path / "checks.json"
    chosen = ["--model", "sd35m512-small", "--plans", "exact:branch_mix", "--leaves", "12"]
    assert tree_throughput.main([*chosen, "--steps", "7", "--check-only", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["checks"]
    assert 0 < found["a gradient fp64: exact:branch_mix, tape"]["value"] <= 1e-12
    assert f"{len(found)} of {len(found)} checks pass" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_leaves_the_device(name):
    """On the meta device: what was made elsewhere does not mix with it."""
    model, device = FamilyModel(name, torch.device("meta"), torch.bfloat16, full=False), "meta"
    weights = [t for part in (model.module, model.flow.vae) for t in part.state_dict().values()]
    assert {value.device.type for value in weights} == {device}
    view = model.with_prompts(["a", "b"])
    x, sigma = torch.empty(4, *model.latent_shape, device=device), torch.empty(4, device=device)
    prompt = sigma.long()
    v = view.released_velocity(x, sigma, prompt)
    v.float().sum().backward()
    assert v.shape == x.shape
    assert any(p.grad is not None for p in model.module.parameters())
    images = model.decode(x)
    assert images.dtype == torch.float32
    assert linear_reward(images, ["a"] * 4)["reward"].shape == (4,)
