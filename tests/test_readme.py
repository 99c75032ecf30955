"""README tells the truth: its code runs, its commands and files exist, its tables are current."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formulas import published_gradient, shake
from torch.distributed.run import get_args_parser

from branchcore import recipes, schedule
from branchcore.cli import _parser, main
from branchcore.gradient import gradient
from branchcore.models import FAMILIES
from branchcore.rollout import rollout

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
REAL, STEP, UPDATES, TREE, FOREIGN, METHOD = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_block_is_a_whole_iteration(toy):
    model = toy(torch.float32)
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
    exec(FOREIGN, names)
    after = list(model.module.parameters())
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    assert len(names["texts"]) == 32


def test_the_step_and_loss_of_a_foreign_trainer():
    scheduler = SimpleNamespace(sigmas=torch.tensor(schedule.flow_match_euler(4)).float())
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    module, x = torch.nn.Linear(6, 6), torch.randn(3, 2, 6)
    names = {
        "torch": torch, "pipeline": SimpleNamespace(scheduler=scheduler), "latents": x,
        "t": scheduler.timesteps[1], "velocity": module(x).detach(),
        "transformer": lambda latents, _: module(latents), "advantages": torch.randn(3),
        "reference_mean": torch.zeros_like(x),
    }  # fmt: skip
    exec(STEP, names)
    assert float(names["stats"].max_abs_dev) == 0.0
    assert module.weight.grad.any()


def test_the_depths_of_a_foreign_trainer(tiny_folder, tmp_path):
    peft, diffusers = (pytest.importorskip(name) for name in ("peft", "diffusers"))
    accelerate = pytest.importorskip("accelerate")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_folder("sd3"))
    pipe.transformer.requires_grad_(False)
    lora = peft.LoraConfig(r=2, target_modules=["attn.to_q"])
    pipe.transformer = peft.get_peft_model(pipe.transformer, lora)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    rows = []
    names = {
        "pipeline": pipe, "prompts": ["a cat", "a dog"], "iterations": 1, "out": tmp_path,
        "parameters": parameters, "optimizer": torch.optim.AdamW(parameters, lr=1e-3),
        "accelerator": accelerate.Accelerator(cpu=True),
        "reward": lambda images, prompts: {"mean": images.mean((1, 2, 3))},
    }  # fmt: skip
    names["accelerator"].log = rows.append
    sizes = ("512, 512, guidance=4.5", "16, 32, guidance=4.5, max_text_tokens=24")
    for code in (UPDATES, TREE):
        code = code.replace(*sizes).replace("sigmas(10)", "sigmas(6)")
        exec(code.replace("iterations=100", "iterations=1"), names)
        assert any((a != b).any() for a, b in zip(parameters, before, strict=True))
        before = [p.detach().clone() for p in parameters]
    assert rows[0]["leaves"] == 16
    assert "metrics.jsonl" in {file.name for file in tmp_path.iterdir()}
    for code in (STEP, UPDATES, TREE):
        assert len(code.splitlines()) < 40


@pytest.fixture
def added(tmp_path, monkeypatch):
    """README's example as a new file of the recipes folder, and nothing else changed."""
    (tmp_path / "random_forks.py").write_text(METHOD)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    builders, presets = recipes._discover()
    monkeypatch.setattr(recipes, "RECIPES", builders)
    monkeypatch.setattr(recipes, "PRESETS", presets)
    yield METHOD
    sys.modules.pop("branchcore.recipes.random_forks", None)


def test_a_new_method_is_one_file_of_about_thirty_lines(added, toy, capsys):
    assert len(added.splitlines()) <= 34
    recipe = recipes.build("random_forks", schedule.shifted_linear(8, 3), branching=(2, 3))
    plan = recipe.plan([4, 9], seed=5, iteration=3)
    assert plan.counts().decodes == 12
    assert (plan.select([0]).depth[plan.select([0]).train] != 0).all()
    old, model = toy(), toy()
    forest = rollout(plan, old, [4, 9], seed=5, keep_velocity=True, dtype=torch.float64)
    shake(model)
    rewards = np.random.default_rng(0).normal(size=(12, 1))
    credit = recipe.credit(plan, rewards, np.ones(1), np.zeros(len(plan)))
    ones = np.ones(len(plan))
    published_gradient(forest, model, recipe.objective, credit.advantage, ones, old=old)
    exact = model.gradient()
    model.zero_grad()
    gradient(forest, model, credit.advantage, ones, recipe.objective, anchor="rollout")
    assert float((model.gradient() - exact).norm() / exact.norm()) <= 1e-12
    main(["plan", "random_forks", "--leaves", "8"])
    assert "random_forks" in capsys.readouterr().out


def test_the_real_model_is_trained_and_sampled(tiny_folder, tmp_path):
    pytest.importorskip("peft")
    changed = {
        'height=512, width=512, guidance=4.5, device="cuda"': "height=16, width=32, "
        "max_text_tokens=24, dtype=torch.float32",
        '["pickscore=/models/pickscore", "jpeg"], device="cuda"': '["jpeg"]',
        "iterations=100, prompts_per_iteration=8": "iterations=1, prompts_per_iteration=2",
        "sigmas(10)": "sigmas(3)",
        "steps=28": "steps=2",
    }
    code = REAL
    for old, new in changed.items():
        assert old in code
        code = code.replace(old, new)
    names = {"torch": torch, "path": tiny_folder("sd3"), "prompts": ["a cat", "a dog"]}
    exec(code, names | {"out": tmp_path / "run"}, found := {})
    assert found["images"].shape == (2, 4, 3, 16, 32)
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_every_family_is_in_the_table():
    table = README.split("## Real models")[1].split("## Inside your own trainer")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(FAMILIES)
    assert all("" not in [cell.strip() for cell in cells.split("|")] for _, cells in rows)


def test_commands_have_the_options_they_are_shown_with():
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^    python -m branchcore (.+)$", text, re.MULTILINE)
    assert len(commands) > 7
    launched = re.findall(r"^(?:    |srun )torchrun (.+) -m branchcore (.+)$", text, re.MULTILINE)
    assert len(launched) == 4
    for launch, command in launched:
        words = shlex.split(launch.replace("$SLURM_NNODES", "4"))
        get_args_parser().parse_args([*words, "-m", "branchcore"])
        commands.append(command)
    for command in commands:
        args = _parser().parse_args(shlex.split(command, comments=True))
        assert args.command == command.split()[0]


def test_every_recipe_is_in_the_table():
    table = README.split("## Recipes")[1].split("## Words")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(recipes.RECIPES)


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
