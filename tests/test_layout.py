"""The layers of the design: imports point down only, optional packages stay where they belong."""

import ast
import subprocess
from pathlib import Path

import pytest

from branchcore import _dispatch, packing, reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "branchcore"
LAYERS = [
    {"_C", "kernels"},
    {"reference", "_check", "_dispatch", "testing", "noise"},
    {"ops"},
    {
        "schedule",
        "steps",
        "plan",
        "_plan_checks",
        "passes",
        "tree",
        "drawing",
        "credit",
        "prune",
        "leaf_weights",
        "unbiased",
        "packing",
    },
    {
        "masked_backward",
        "model",
        "forest",
        "idle",
        "waves",
        "rollout",
        "objective",
        "matching",
        "micro_batches",
        "gradient",
        "guidance",
    },
    {
        "recipes",
        "rewards",
        "stages",
        "updates",
        "rounds",
        "metrics",
        "checkpoint",
        "ema",
        "masters",
        "run_folder",
        "run_records",
        "run_state",
        "tree_record",
        "trainer",
        "learner",
        "noise_floor",
        "policy",
        "pace",
        "preemption",
        "distributed",
        "heartbeat",
        "meeting",
        "parallel",
        "trainer_config",
        "pruning",
        "history",
        "pruning_config",
        "pruning_sums",
        "stopping",
        "pooled_spread",
        "coins",
        "ledger",
        "gradient_norms",
        "flops",
        "plots",
        "prompt_files",
        "report",
        "slow_fast",
        "clock",
        "work_meter",
        "watch",
        "advice",
        "callbacks",
        "progress",
        "live_view",
    },
    {
        "models",
        "hosts",
        "examples",
        "run_report",
        "_machine",
        "doctor",
        "model_commands",
        "planner",
        "plan_command",
        "train_command",
        "docs_command",
        "cli",
        "__main__",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
TOP = {"pyproject.toml", "CMakeLists.txt", "csrc", "branchcore", "kernels", "tests", "bench"}


def imported(path):
    """Yields (module, name) of every import of a file, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            yield from ((node.module, alias.name) for alias in node.names)


def own_modules(path):
    for module, name in imported(path):
        parts = module.split(".")
        if parts[0] == "branchcore":
            yield parts[1] if len(parts) > 1 else name


def layer_name(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    name = layer_name(path)
    assert name in LEVEL, f"{path} has no layer: name it in LAYERS"
    for other in own_modules(path):
        if name == "examples" and other == "":
            continue  # import branchcore as bc, as users do
        assert other in LEVEL, f"{path} imports branchcore.{other}, which has no layer"
        assert LEVEL[other] <= LEVEL[name], f"{path} imports branchcore.{other} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_stay_in_their_place(path):
    for module, _ in imported(path):
        package = module.split(".")[0]
        assert package != "kernels", "always branchcore.kernels"
        if package in ("diffusers", "transformers", "peft", "sklearn"):
            places = ("models", "rewards") if package == "transformers" else ("models",)
            assert layer_name(path) in places, f"{path} imports {package}"
        if package == "matplotlib":
            assert path.stem in ("plots", "pictures"), f"{path} imports matplotlib"
        if package == "rich":
            assert layer_name(path) == "live_view", f"{path} imports rich"
        assert package not in ("tensorboard", "wandb"), f"{path}: callbacks imports it by name"


CORE = {"philox_normal", "branch_step", "edge_dots", "ratio_loss", "sde_log_prob"}
MODEL = {"gate_norm_modulate", "qk_norm_rope", "group_norm_silu"}
HOST = {"pack"}
FOLDERS = {
    "reference": (PACKAGE / "reference", ".py"),
    "cpp": (ROOT / "csrc" / "cpu", ".cpp"),
    "cuda": (ROOT / "csrc" / "cuda", ".cu"),
    "triton": (ROOT / "kernels", ".py"),
}


@pytest.mark.parametrize("implementation", FOLDERS)
def test_an_op_is_one_stem_in_every_folder(implementation):
    ops = {p.stem for p in (PACKAGE / "ops").glob("*.py")} - {"__init__"}
    assert ops == CORE | MODEL
    folder, suffix = FOLDERS[implementation]
    for op in CORE if implementation == "cuda" else ops:
        assert (folder / f"{op}{suffix}").is_file(), f"{folder} lacks {op}"
        names = [name for name in _dispatch._ops if name.startswith(op)]
        assert names, op
        assert all(implementation in _dispatch._ops[name] for name in names), names


@pytest.mark.parametrize("op", HOST)
def test_what_takes_host_integers_is_one_stem_on_the_cpu(op):
    places = [FOLDERS[name] for name in ("reference", "cpp")]
    assert all((folder / f"{op}{suffix}").is_file() for folder, suffix in places), op
    assert op not in _dispatch._ops
    assert callable(getattr(packing, op))
    assert all(hasattr(module, op) for module in (reference, _dispatch.host() or reference))


def test_kernels_is_a_namespace_folder():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_top_level_is_what_the_design_fixes():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    here = {name.split("/")[0] for name in listed.stdout.splitlines()}
    here = {name for name in here if not name.startswith(".")}
    assert TOP <= here <= TOP | {"README.md", "LICENSE"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_function_calls_exec_or_pickle(path):
    text = path.read_text()
    for forbidden in ("import pickle", "torch.load(", "exec(", "eval("):
        calls = [x for x in text.splitlines() if forbidden in x and ".eval()" not in x]
        assert not calls, f"{path}: {forbidden}"
