"""Training and sampling of real models by the command line: runs, resume, files, clear errors."""

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="real models need the models extra")
pytest.importorskip("matplotlib", reason="the commands draw")

from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import Tiny

from branchcore import examples, recipes, rewards
from branchcore.checkpoint import load_group
from branchcore.cli import main
from branchcore.metrics import repeatable
from branchcore.models import FAMILIES, runtime
from branchcore.models.commands import task as tasks
from branchcore.models.commands.pictures import save_samples, strip, tiled
from branchcore.models.sampling import sample
from branchcore.models.weights import LORA_FILE, add_lora
from branchcore.prompt_files import read_prompts
from branchcore.run_folder import RunFolder

SIZE = ["--height", "16", "--width", "32", "--max-text-tokens", "24", "--dtype", "fp32"]
RUN = ["--recipe", "flow_grpo", "--reward", "jpeg", "--steps", "3", "--set", "group=4"]
RUN += ["--set", "prompts_per_iteration=2", "--set", "checkpoint_every=1"]
RUN += ["--eval-prompts", "2", "--eval-count", "2", "--eval-steps", "2"]


@pytest.fixture(scope="module")
def sd3(tiny_folder):
    return str(tiny_folder("sd3"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a bold cat\n\n  a thin dog \na bold cat\n")
    return str(file)


@pytest.fixture(scope="module")
def train(sd3, prompts):
    words = ["train", "--model", "sd3", "--path", sd3, "--prompts", prompts, *SIZE, *RUN]
    return lambda out, *more: main([*words, "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A run of two iterations with a LoRA of rank 4."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(out, "--lora-rank", 4, "--iterations", 2)
    return out


def rows(out):
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [repeatable(row) for row in lines]


def test_a_run_leaves_curves_samples_and_a_lora(run):
    written = {path.name for path in run.iterdir()}
    assert written == {
        *("run.json", "metrics.jsonl", "curves.png", "samples.png", "before.safetensors"),
        *("sessions.jsonl", "samples", "trees"),
        *("lora", "checkpoint-000001", "checkpoint-000002"),
    }
    evaluated = [row["iteration"] for row in rows(run) if "eval/reward" in row]
    assert evaluated == [0, 2]
    assert rows(run)[0]["eval/reward"] == rows(run)[0]["eval/jpeg"]
    facts = json.loads((run / "run.json").read_text())["facts"]
    assert facts["model"] == "sd3"
    assert facts["trained"]["r"] == 4
    assert facts["trained"]["lora_alpha"] == 8
    assert facts["rewards"] == ["jpeg"]
    assert load_file(run / "before.safetensors")["samples"].shape == (2, 2, 3, 16, 32)
    assert (run / "samples.png").stat().st_size > 1000
    assert {path.name for path in (run / "samples").iterdir()} == {
        *("000000.png", "000002.png", "grid.json")
    }
    assert {path.name for path in (run / "trees").iterdir()} == {"000001.json", "000002.json"}


def test_a_resumed_run_continues_bit_for_bit(run, train, tmp_path, capsys):
    cut = tmp_path / "cut"
    train(cut, "--lora-rank", 4, "--iterations", 1)
    assert "resumed after" not in capsys.readouterr().out
    train(cut, "--lora-rank", 4, "--iterations", 2, "--resume")
    assert "resumed after iteration 1" in capsys.readouterr().out
    assert [r["reward"] for r in rows(cut)[1:]] == [r["reward"] for r in rows(run)[1:]]
    assert rows(cut)[-1] == rows(run)[-1]
    ours, theirs = (load_file(out / "lora" / LORA_FILE) for out in (cut, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before, first = (load_file(x / "before.safetensors")["samples"] for x in (cut, run))
    assert torch.equal(before, first)


def test_a_finished_run_is_exported_again(run, train, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "lora")
    train(out, "--lora-rank", 4, "--iterations", 2, "--resume")
    ours, theirs = (load_file(x / "lora" / LORA_FILE) for x in (out, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rows(out) == rows(run)


def test_a_resumed_run_must_be_the_same(run, train):
    words = ["--lora-rank", 4, "--iterations", 2, "--resume"]
    for name, old, new in [("guidance", "4.5", 2.0), ("eval-count", "2", 3)]:
        with pytest.raises(SystemExit) as stop:
            train(run, *words, f"--{name}", new)
        key = name.replace("-", "_")
        differs = f"same facts, got {{'{key}': {old}}} where this one has {{'{key}': {new}}}"
        assert differs in str(stop.value)


def test_samples_with_and_without_the_lora_share_their_noise(run, sd3, prompts, tmp_path):
    words = ["sample", "--model", "sd3", "--path", sd3, *SIZE, "--weights", str(run)]
    more = ["--prompt", "a cat", "--prompt", "a dog", "--count", "2", "--steps", "3"]
    main([*words, *more, "--max-batch", "3", "--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").width > 2 * 2 * 32
    flags = {"path": sd3, "height": 16, "width": 32, "max_text_tokens": 24, "dtype": "fp32"}
    flags |= {"prompt": ["a cat", "a dog"], "weights": run / "lora", "steps": 3}
    task = tasks.to_sample("sd3", flags)
    base, tuned = task.panels(task.prompts, count=2, seed=None).values()
    assert base.shape == (2, 2, 3, 16, 32)
    assert 0 < float((tuned - base).abs().max()) < 0.2
    add_lora(fresh := tasks.to_sample("sd3", flags | {"steps": 3}).model)
    same = sample(fresh, ["a cat", "a dog"], count=2, steps=3)
    torch.testing.assert_close(same, base, atol=1e-5, rtol=0)


def test_samples_do_not_depend_on_the_batch(tiny_folder):
    model = Tiny("sd3", tiny_folder("sd3")).load(guidance=3.0)
    options = {"count": 3, "steps": 2, "seed": 5}
    whole = sample(model, ["a cat", "a dog"], **options)
    for most in (2, 4):
        parts = sample(model, ["a cat", "a dog"], max_batch=most, **options)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert float((whole[0, 0] - whole[0, 1]).abs().max()) > 0.05
    with pytest.raises(ValueError, match=r"count and steps must be at least 1 .* got 0, 2"):
        sample(model, ["a cat"], count=0, steps=2)


def test_full_fine_tuning_with_everything_switched_on(train, sd3, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "compile_blocks", lambda model: f"compiled {model.family.name}")
    out = tmp_path / "full"
    switches = ["--accelerate", "--attention", "native", "--checkpointing", "--fuse-decoder"]
    words = ["--full", "--reference", "--iterations", 1, "--memory", "1GB", "--compile"]
    train(out, *switches, *words)
    text = capsys.readouterr().out
    for note in ("accelerate: 2 blocks", "attention of 6 modules by 'native'", "compiled sd3"):
        assert note in text
    assert "block checkpointing" in text
    assert "fused VAE decoder" in text
    assert "16 of 16 trained nodes of a round on the tape" in text
    trained = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    model = load_group(out / "checkpoint-000001", "model")
    base = load_file(Path(sd3) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(trained[name], model[name]) for name in model)
    assert not torch.equal(trained["proj_out.weight"], base["proj_out.weight"])
    task = tasks.to_sample("sd3", {"path": sd3, "prompt": ["a"], "weights": out})
    task.weights.apply(task.model)
    name, parameter = next(iter(task.model.module.named_parameters()))
    assert torch.equal(parameter, trained[name].to(parameter.dtype))


def test_text_encoders_go_before_training(sd3, prompts):
    flags = {"path": sd3, "prompts": prompts, "reward": ("jpeg",), "height": 16, "width": 32}
    task = tasks.to_train("sd3", flags | {"max_text_tokens": 24, "guidance": 3.0})
    config = tasks.TrainerConfig(iterations=1, prompts_per_iteration=1)
    sigmas = task.load(recipes.build("flow_grpo", task.settings("flow_grpo").sigmas), config).sigmas
    np.testing.assert_allclose(sigmas, task.model.sigmas(10), atol=0)
    task.start()
    assert task.model.pipe.text_encoder_3 is None
    assert task.model.with_prompts(task.prompts).text["embeds"].shape[0] == 4
    with pytest.raises(ValueError, match="got 'a red house'"):
        task.model.with_prompts(["a red house"])


def test_a_preset_brings_steps_options_and_rates(sd3, prompts):
    flags = {"path": sd3, "prompts": prompts, "reward": ("jpeg",), "preset": "sd3.5-m"}
    sigmas, options, fields = tasks.to_train("sd3", flags).settings("flow_grpo")
    assert len(sigmas) == 11
    assert options == {"global_std": True, "updates": 2}
    assert (fields["lr"], fields["prompts_per_iteration"], fields["max_batch"]) == (3e-4, 48, 8)
    del flags["preset"]
    task = tasks.to_train("sd3", flags | {"full": True, "steps": 6})
    assert task.settings("flow_grpo").fields["lr"] == 1e-5
    assert len(task.settings("flow_grpo").sigmas) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--path", "/nowhere"], "path must be a folder or a name .* got /nowhere"),
        (["--path", "{other}"], "must be a StableDiffusion3Pipeline, got FluxPipeline"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt must be a file, got none"),
        (["--prompts", "{empty}"], "empty.txt must hold at least one prompt, got none"),
        (["--prompt-field", "text"], "field must be left out with a text file, got 'text'"),
        (["--reward", "aesthetics"], "rewards: name must be one of .* got 'aesthetics'"),
        (["--set", "tempo=1"], "--set must be NAME=VALUE .* got 'tempo=1'"),
        (["--set", "group=1"], "flow_grpo: group must be"),
        (["--frames", "5"], "--frames must be left out with --model sd3, got 5"),
        (["--reward-frames", "2"], "--reward-frames must be left out for images, got 2"),
        (["--full", "--lora-rank", "4"], r"--full must come without a LoRA, got \['--lora-rank'\]"),
        (["--reference"], "--reference must come with --full, got a LoRA"),
        (["--full"], "--full must come with --reference for flow_grpo.* try --reference or --set"),
        (["--preset", "flux"], r"--preset must come with its own schedule, got \['--steps'\] too"),
        (["--memory", "lots"], "text must be like '80GB' or '24GiB', got 'lots'"),
        (["--memory", "1MB", "--set", "tape=3"], "plan_memory: budget must be at least"),
        (["--eval-count", "0"], "--eval-count must be at least 1, got 0"),
        (["--device", "cuda"], "--device must be one that torch can use, got cuda without a GPU"),
        (["--height", "20"], "height must be a positive multiple of 16, got 20"),
        (["--width", "-16"], "width must be a positive multiple of 16, got -16"),
        (
            ["--set", 'reward_weights={{"clip": 1}}'],
            r"weights must name the components \['jpeg'\], got \['clip'\]",
        ),
        (
            ["--full", "--reference", "--set", "kl=0"],
            "--reference must come with a loss that compares with it, got flow_grpo without a KL",
        ),
        (["--lora-targets", "to_nothing"], "targets must end the names .* got 'to_nothing'"),
    ],
)
def test_errors_are_found_before_a_step(words, message, train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "empty.txt").write_text("\n \n")
    names = {"other": tmp_path, "empty": tmp_path / "empty.txt"}
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "out", *(word.format(**names) for word in words))
    assert re.search(message, str(stop.value)), stop.value
    assert not (tmp_path / "out").exists()


def test_of_two_new_runs_in_a_folder_the_second_stops_at_its_first_row(tmp_path):
    first, second = (RunFolder(tmp_path / "out", {"seed": s}, resume=False) for s in (1, 2))
    first.log({"iteration": 0})
    with pytest.raises(ValueError, match=r"out must be a new folder, got .* with another run"):
        second.log({"iteration": 0})
    first.log({"iteration": 1})
    assert [row["iteration"] for row in rows(tmp_path / "out")] == [0, 1]
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {"seed": 1}


def test_a_reward_is_tried_before_the_model_is_loaded(sd3, prompts, monkeypatch):
    seen = []

    def reward(images, texts):
        seen.append((tuple(images.shape), texts))
        raise KeyError("no face")

    monkeypatch.setattr(rewards, "build", lambda *_, **__: reward)
    flags = {"path": sd3, "prompts": prompts, "reward": ("x",), "height": 16, "width": 32}
    task = tasks.to_train("sd3", flags)
    monkeypatch.setattr(task.pipeline, "load", None)
    recipe = recipes.build("flow_grpo", task.settings("flow_grpo").sigmas)
    config = tasks.TrainerConfig(iterations=1, prompts_per_iteration=1)
    with pytest.raises(RuntimeError, match="must score 2 images, raised KeyError: 'no face'"):
        task.load(recipe, config)
    assert seen == [((2, 3, 16, 32), ["a bold cat"] * 2)]


def test_an_occupied_folder_is_found_before_anything_is_loaded(run, train):
    with pytest.raises(SystemExit, match="out must be a new folder"):
        train(run, "--lora-targets", "to_nothing", "--iterations", 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--model", "sd3"], "--path must be the folder of a sd3 pipeline, got none"),
        (["train", "--model", "sd3", "--path", "{sd3}"], "--prompts must be a file with --model"),
        (
            ["train", "--model", "sd3", "--path", "{sd3}", "--prompts", "p.txt"],
            "--reward must be given at least once, got none",
        ),
        (["train", "--path", "x"], "--path must be left out with --model digits, got 'x'"),
        (["sample", "--steps", "4"], "--steps must be left out with --model digits, got 4"),
        (
            ["sample", "--model", "sd3", "--path", "{sd3}"],
            "--prompt must be given with --model sd3",
        ),
        (
            ["sample", "--model", "sd3", "--path", "{sd3}", "--prompt", "a", "--weights", "/no"],
            "--weights must be a run with a folder lora or transformer, .* got /no",
        ),
    ],
)
def test_what_is_missing_is_named(words, message, sd3, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([word.format(sd3=sd3) for word in words] + ["--out", str(tmp_path / "out.png")])
    assert re.search(message, str(stop.value)), stop.value


def test_prompt_files_keep_order_and_duplicates(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("﻿ a cat \n\n# not a comment\r\na cat", encoding="utf-8")
    assert read_prompts(text) == ["a cat", "# not a comment", "a cat"]
    lines.write_text('{"prompt": " a dog", "caption": "x"}\n\n{"prompt": "b", "caption": "y"}\n')
    assert read_prompts(lines) == ["a dog", "b"]
    assert read_prompts(lines, field="caption") == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a"}\n\n{"text": "b"}',
            r"line 3 must be an object with 'prompt', got \['text'\]",
        ),
        ('{"prompt": "a"}\nb', "line 2 must be JSON, got"),
        ('["a"]', "line 1 must be an object with 'prompt', got list"),
        ('{"prompt": 3}', "line 1, 'prompt', must be a text, got 3"),
        ('{"prompt": " "}', "line 1, 'prompt', must be a text, got ' '"),
        ("\n", "must hold at least one prompt, got none"),
    ],
)
def test_prompt_files_name_the_line(text, message, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_prompt_files_of_other_kinds(tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_text("a")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "p.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must end in .txt, .jsonl, .parquet, got .*p.csv"):
        read_prompts(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_prompts(tmp_path / "p.txt")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"pyarrow must be installed .* try pip install pyarrow"):
        read_prompts(tmp_path / "p.parquet")


def test_prompts_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"prompt": [" a ", "b"], "n": [1, 2]}), file)
    assert read_prompts(file) == ["a", "b"]
    with pytest.raises(ValueError, match=r"must have a column 'text', got \['prompt', 'n'\]"):
        read_prompts(file, field="text")
    with pytest.raises(ValueError, match="row 1, 'n', must be a text, got 1"):
        read_prompts(file, field="n")
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="must be a Parquet file"):
        read_prompts(tmp_path / "bad.parquet")


def test_a_grid_has_every_image_in_its_place(tmp_path):
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 40, 60)
    panels = {"before": colours[None, :2], "after": colours[None, 1:]}
    assert tiled(panels["before"]).shape == (3, 40 + 2 * 4, 2 * 64 + 4)
    assert save_samples(panels, ["a $ cat"], tmp_path / "new" / "grid.png") == [
        tmp_path / "new" / "grid.png"
    ]
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png").convert("RGB"), dtype=int)
    row = pixels[-24, 180:]
    found = [tuple(colour) for colour in row if sorted(colour) == [0, 0, 255]]
    assert list(dict.fromkeys(found)) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    share = [found.count(c) / len(found) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.02)


def test_a_grid_is_never_larger_than_its_limit(tmp_path):
    for size, wanted in [((1, 17, 3, 40, 300), 4096 + 180), ((1, 1, 3, 40, 900), 908 + 180)]:
        save_samples({"base": torch.zeros(size)}, ["a"], tmp_path / "wide.png")
        assert abs(Image.open(tmp_path / "wide.png").width - wanted) < 3
    save_samples({"base": torch.zeros(9, 1, 3, 600, 300)}, ["a"] * 9, tmp_path / "tall.png")
    assert Image.open(tmp_path / "tall.png").height < 4096 + 40


def test_long_words_fit_beside_tiny_pictures(tmp_path, monkeypatch):
    seen, place = {}, Figure.savefig

    def measured(figure, path, **options):
        canvas = figure.canvas.get_renderer()
        texts = [*figure.texts, *(axis.title for axis in figure.axes)]
        seen.update({text.get_text(): text.get_window_extent(canvas) for text in texts})
        place(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", measured)
    tiny = {"base model": torch.zeros(2, 1, 3, 16, 16), "/a/$x$/long/run/lora": None}
    tiny = dict.fromkeys(tiny, tiny["base model"])
    save_samples(
        tiny, ["a thin dog on a red house " * 5, "a bold cat $a$ " * 9], tmp_path / "t.png"
    )
    above, below, left, right = seen.values()
    assert right.x0 > left.x1
    assert above.y0 > below.y1 > below.y0 > 0
    assert max(above.x1, below.x1) < 180
    assert list(seen)[3] == ".../run/lora"


def test_videos_become_a_strip_and_an_animation(tmp_path):
    video = torch.linspace(0, 1, 7).view(1, 1, 7, 1, 1, 1).expand(1, 2, 7, 3, 8, 8)
    frames = strip(video)[0, 0, 0, 0, ::8]
    torch.testing.assert_close(frames, torch.tensor([0.0, 2 / 6, 4 / 6, 1.0]))
    files = save_samples({"base": video, "tuned": video}, ["a"], tmp_path / "v.png")
    assert [file.name for file in files] == ["v.png", "v.gif"]
    animation = Image.open(files[1])
    assert (animation.n_frames, animation.size) == (7, (2 * (2 * 12 + 4), 16))
    with pytest.raises(
        ValueError, match=r"panel 'x' must be .* with R=2, got \(1, 2, 7, 3, 8, 8\)"
    ):
        save_samples({"x": video}, ["a", "b"], tmp_path / "v.png")
    with pytest.raises(ValueError, match=r"path must end in .png, got .*v.jpg"):
        save_samples({"x": video}, ["a"], tmp_path / "v.jpg")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_example_of_a_family_runs(family, tiny_folder, tmp_path):
    file = Path(examples.__path__[0]) / f"train_{family}.py"
    text = file.read_text()
    assert len(text.splitlines()) < 40
    assert [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)][1] == (
        "train"
    )
    tiny = Tiny(family, tiny_folder(family))
    guidance = {"guidance": tiny.guidances[-1], "dtype": torch.float32}
    module = importlib.import_module(f"branchcore.examples.train_{family}")
    options = {**tiny.spec.SIZE, **tiny.spec.OPTIONS, **guidance}
    module.train(str(tiny.folder), str(tmp_path), iterations=1, steps=4, **options)
    if family == "sana":
        assert (tmp_path / "transformer" / "config.json").is_file()
        return
    (lora,) = tmp_path.rglob(LORA_FILE)
    weights = load_file(lora)
    assert max(float(w.abs().max()) for name, w in weights.items() if "lora_B" in name) > 0
