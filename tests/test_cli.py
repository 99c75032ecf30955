"""The command line on the embedded model: train, kill, resume, sample; clear errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("diffusers", reason="the embedded model needs the demo extra")
pytest.importorskip("sklearn", reason="the embedded model needs the demo extra")

from branchcore import recipes
from branchcore.cli import main
from branchcore.metrics import repeatable
from branchcore.model_commands import settings

FEW = ["--set", "prompts_per_iteration=2", "--set", "checkpoint_every=1"]


def command(*words):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "branchcore", *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=os.path.expanduser("~"),
    )


def test_a_reader_that_leaves_ends_a_command_without_a_word():
    done = subprocess.run(
        f"{sys.executable} -m branchcore plan branch_mix | true",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.expanduser("~"),
        check=True,
    )
    assert done.stderr == ""


def rows(out):
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [repeatable(row) for row in lines]


def test_kill_and_resume_continue_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["train", "--recipe", "branch_mix", "--iterations", 12, *FEW]
    done = command(*words, "--out", whole)
    assert done.wait(240) == 0, done.stdout.read()
    running = command(*words, "--out", cut)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (cut / "checkpoint-000003").exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait(60) == -signal.SIGKILL, "the run ended before it could be killed"
    rest = command(*words, "--out", cut, "--resume")
    text = rest.communicate(timeout=240)[0]
    assert rest.returncode == 0, text
    assert "resumed after iteration" in text
    assert rows(cut) == rows(whole)
    for name in ("curves.png", "samples.png", "run.json"):
        assert (cut / name).stat().st_size > 100
    picture = tmp_path / "sample.png"
    words = ["sample", "--weights", str(cut), "--prompt", "a bold upright seven", "--count", "2"]
    main([*words, "--out", str(picture)])
    assert picture.stat().st_size > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--recipe", "ppo"], r"name must be from .*got 'ppo'"),
        (["train", "--model", "sdxl"], r"--model must be from \('digits', 'sd3', .*got 'sdxl'"),
        (["train", "--set", "tempo=3"], r"--set must be NAME=VALUE .*got 'tempo=3'"),
        (["train", "--set", "splits=[0,12]"], r"splits must be distinct steps in 0\.\.8"),
        (["train", "--iterations", "0"], r"iterations must be in \[1, .*\], got 0"),
        (["train", "--set", "lr=abc"], r"lr must be float, got 'abc'"),
        (["train", "--set", "kl=abc"], r"kl must be float, got 'abc'"),
        (["train", "--set", "max_batch=0"], r"max_batch must be in \[1, .*\], got 0"),
        (["train", "--mixed"], r"--mixed must be left out for digits"),
        (["train", "--seed", "4294967296"], r"seed must be in \[0, .*\], got 4294967296"),
        (["sample", "--prompt", "a bold cat"], r"prompt must be .*with unknown words \['cat'\]"),
        (["sample", "--weights", "/nowhere"], r"--weights must be a run, a checkpoint or a file"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match=message):
        main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "preset_of", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["plan", "flow_grpo", "--preset", "flux"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nbranchcore plan: stopped by Ctrl-C\n"


def test_settings_split_between_recipe_and_trainer():
    options, fields = settings(["kl=0.2", "lr=1e-3", "splits=[0,1]"], "branch_mix")
    assert (options, fields) == ({"kl": 0.2, "splits": [0, 1]}, {"lr": 1e-3})


def test_explain_lists_every_op(capsys):
    main(["explain"])
    text = capsys.readouterr().out
    for op in ("philox_normal", "branch_step", "edge_dots", "ratio_loss", "sde_log_prob"):
        assert op in text


def test_plan_prints_tree_counts_and_what_the_tape_covers(capsys):
    """TempFlow at 24 leaves a step, T = 10: the counts of its published table."""
    main(["plan", "tempflow_grpo", "--leaves", "24", "--shift", "3"])
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("tempflow_grpo, T = 10, {'trunks': 4, 'children': 6}")
    numbers = [line.split()[-7:] for line in text.splitlines() if line.startswith("tempflow_grpo ")]
    assert numbers == [["1116", "216", "36", "216", "36", "1224", "1.00"]]
    chains = [x.split()[-7:] for x in text.splitlines() if x.startswith("  as independent")]
    assert chains[0][:4] == ["2160", "216", "216", "216"]
    assert "The tape covers 36 of 36 trained parents in 1 update(s)." in text
    assert "6 of ~*" in text


def test_plan_of_a_preset_and_its_later_updates(capsys):
    main(["plan", "dance_grpo", "--preset", "flux"])
    text = capsys.readouterr().out
    assert "dance_grpo, T = 16" in text
    covered, parents = map(int, re.findall(r"tape covers (\d+) of (\d+)", text)[0])
    assert covered < parents
    assert f"{parents - covered} need a training forward of their own" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "grpo"], "recipes: name must be from .*got 'grpo'"),
        (["plan", "dance_grpo", "--preset", "sdxl"], "preset must be from .*got 'sdxl'"),
        (
            ["plan", "dance_grpo", "--preset", "flux", "--steps", "8"],
            r"--preset must come with its own schedule, got \['--steps'\] too",
        ),
        (["plan", "dance_grpo", "--leaves", "1"], "leaves must be at least 2, got 1"),
        (["plan", "dance_grpo", "--set", "lr=3"], r"--set must name options from .*got \['lr'\]"),
        (["plan", "flow_grpo", "--steps", "0"], "steps must be at least 1, got 0"),
        (
            ["plan", "flow_grpo", "--iteration", "-1"],
            r"iteration must be in \[0, 2\*\*32\), got -1",
        ),
        (["plan", "vgpo", "--preset", "flux"], r"preset must be from \('sd3.5-m',\), got 'flux'"),
        (["plan", "multi_grpo", "--preset", "flux"], "preset must be left out, as it has none"),
        (["plan", "g2rpo", "--set", "strides=3"], "strides must be Sequence.int., got 3"),
        (["plan", "tree_grpo", "--set", "branching=[2.5]"], "branching must be int | Sequence"),
        (["plan", "branch_grpo", "--set", "beta=NaN"], "beta must be finite, got nan"),
        (["plan", "branch_grpo", "--set", "amplify=4"], "got 4.0 and 4; try correlate=None"),
        (["plan", "branch_grpo", "--set", "prune_share=2"], "prune_share must be in"),
        (["plan", "branch_grpo", "--steps", "1"], "sigmas must decrease from 1 to 0 in at least 2"),
    ],
)
def test_plan_names_what_is_wrong(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert re.search(message, str(stop.value)), stop.value


def test_leaves_override_a_preset_and_options_override_both(capsys):
    main(["plan", "dance_grpo", "--preset", "hunyuan-video", "--leaves", "12"])
    assert "'group': 12" in capsys.readouterr().out
    words = ["--preset", "hunyuan-video", "--leaves", "12", "--set", "group=10"]
    main(["plan", "dance_grpo", *words])
    assert "'group': 10" in capsys.readouterr().out


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize(("leaves", "steps"), [(2, 8), (7, 9), (12, 10)])
def test_plan_knows_every_recipe_at_any_size(name, leaves, steps, capsys):
    main(["plan", name, "--leaves", str(leaves), "--steps", str(steps)])
    text = capsys.readouterr().out
    decodes = next(x for x in text.splitlines() if x.startswith(f"{name} ")).split()[4]
    assert int(decodes) % leaves == 0


@pytest.mark.parametrize(("steps", "schedule"), [(2, "linear"), (2, "exponential"), (3, "random")])
def test_short_schedules_have_windows_too(steps, schedule, capsys):
    words = ["--set", f"schedule={schedule}", "--set", "window=1", "--leaves", "4"]
    main(["plan", "mix_grpo", "--steps", str(steps), *words])
    assert "~*" in capsys.readouterr().out


def test_other_forwards_are_counted(capsys):
    """A KL costs one reference forward per trained parent; a lagging sampler one old forward."""
    columns = {}
    for name, words in {
        "no KL": ["flow_grpo", "--set", "kl=0"],
        "KL": ["flow_grpo"],
        "lag": ["diffusion_nft", "--set", "kl=0"],
        "no lag": ["diffusion_nft", "--set", "kl=0", "--set", "lag=0"],
        "preference": ["dgpo", "--set", "kl=0"],
    }.items():
        main(["plan", *words, "--leaves", "4"])
        row = [x for x in capsys.readouterr().out.splitlines() if x.startswith(words[0] + " ")]
        columns[name] = [int(x) for x in row[-1].split()[1:6]]
    assert [columns[n][4] for n in columns] == [0, 36, 36, 0, 16]
    assert [columns[n][2] for n in columns] == [36, 36, 36, 36, 16]
