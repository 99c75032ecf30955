"""TensorBoard and W&B: what they are shown, resumed runs, missing packages, nothing unasked for."""

import json
import struct
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

from branchcore.callbacks import TensorBoard, WandB, tagged
from branchcore.cli import main

ROW = {
    "iteration": 3, "reward": 1.0, "reward/a": 0.5, "reward_std/a": 0.1, "kl": 0.25, "leaves": 24,
    "time/rollout": 2.0, "wall_s": 4.0, "tflop": 8.0, "rss_gb": 0.5, "eval/reward": 16.0,
    "kept_share": 32.0, "warnings": ["clip_share: too much"],
}  # fmt: skip
TAGS = {
    "reward/reward": 1.0, "reward/a": 0.5, "reward_std/a": 0.1, "policy/kl": 0.25,
    "work/leaves": 24.0, "time/rollout": 2.0, "time/wall_s": 4.0, "work/tflop": 8.0,
    "memory/rss_gb": 0.5, "eval/reward": 16.0, "other/kept_share": 32.0,
}  # fmt: skip


def row(iteration, value=0.0, **more):
    return {"iteration": iteration, "reward": value, **more}


def picture(path, shade, size=(6, 4)):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", size, (shade, 0, 0)).save(path)


def test_metrics_are_grouped_by_prefix():
    assert tagged(ROW) == TAGS


def events(folder):
    """Reads what TensorBoard would show."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), {"images": 0, "scalars": 0, "tensors": 0})
    return shown.Reload()


def scalars(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_tensorboard_shows_scalars_warnings_and_new_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    picture(tmp_path / "samples.png", 1)
    with TensorBoard(tmp_path) as callback:
        assert not (tmp_path / "tensorboard").exists()
        callback(ROW)
        picture(tmp_path / "samples.png", 2)
        picture(tmp_path / "samples_b.png", 3, size=(2, 8))
        picture(tmp_path / "curves.png", 4)
        callback(row(4))
        callback(row(5))
        shown = events(tmp_path / "tensorboard")  # before it is closed: every row is flushed
    seen = {tag: shown.Scalars(tag)[0].value for tag in shown.Tags()["scalars"]}
    assert seen == pytest.approx(TAGS, rel=1e-6)
    assert scalars(tmp_path / "tensorboard", "reward/reward") == [(3, 1.0), (4, 0.0), (5, 0.0)]
    assert shown.Tags()["tensors"] == ["warnings/text_summary"]
    said = shown.Tensors("warnings/text_summary")
    assert [(s.step, s.tensor_proto.string_val[0]) for s in said] == [(3, b"clip_share: too much")]
    assert sorted(shown.Tags()["images"]) == ["samples/samples", "samples/samples_b"]
    for name, size, shade in (("samples", (6, 4), 2), ("samples_b", (2, 8), 3)):
        (image,) = shown.Images(f"samples/{name}")
        assert (image.step, (image.width, image.height)) == (4, size)
        assert np.asarray(opened(image.encoded_image_string))[0, 0].tolist() == [shade, 0, 0]


def opened(data):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data))


def test_a_resumed_run_goes_on_in_tensorboard_and_hides_what_it_makes_again(tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path) as callback:
        for iteration in range(1, 8):
            callback(row(iteration, value=1.0))
    with TensorBoard(tmp_path) as callback:
        for iteration in range(5, 10):  # its last checkpoint was of iteration 4
            callback(row(iteration, value=2.0))
    expected = [(i, 1.0 if i < 5 else 2.0) for i in range(1, 10)]
    assert scalars(tmp_path / "tensorboard", "reward/reward") == expected


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.alerts, self.exit_code = options, [], [], None

    def log(self, values, step):
        self.logged.append((step, values))

    def alert(self, title, text):
        self.alerts.append((title, text))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    """A module wandb that only remembers."""
    package = ModuleType("wandb")
    package.runs, package.__spec__ = [], ModuleSpec("wandb", None)

    def init(**options):
        package.runs.append(FakeRun(options))
        return package.runs[-1]

    package.init, package.Image = init, lambda path: f"image of {path}"
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_wandb_is_shown_rows_by_iteration_pictures_and_alerts(tmp_path, fake):
    (tmp_path / "run.json").write_text('{"recipe": {"name": "x"}}')
    with WandB(tmp_path, project="p") as callback:
        assert fake.runs == []
        callback(ROW)
        picture(tmp_path / "samples.png", 2)
        callback(row(4))
        callback(row(5))
    (run,) = fake.runs
    path = tmp_path / "samples.png"
    assert run.logged == [
        (3, TAGS),
        (4, {"reward/reward": 0.0, "samples/samples": f"image of {path}"}),
        (5, {"reward/reward": 0.0}),
    ]
    assert run.alerts == [("clip_share", "clip_share: too much")]
    assert run.exit_code == 0
    stored = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert run.options == {
        "id": stored, "resume": "allow", "project": "p", "name": tmp_path.name,
        "dir": str(tmp_path), "config": {"recipe": {"name": "x"}},
    }  # fmt: skip


def test_a_resumed_run_has_the_same_wandb_id(tmp_path, fake):
    for first in (1, 5):
        with WandB(tmp_path) as callback:
            callback(row(first))
    with WandB(tmp_path / "other") as callback:
        callback(row(1))
    one, same, other = (run.options["id"] for run in fake.runs)
    assert one == same != other
    assert len(one) >= 8
    (tmp_path / "wandb.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wandb.json must have a id, got nothing"):
        WandB(tmp_path)(row(1))


def fails(callback):
    with callback:
        callback(row(1))
        raise KeyError


def test_wandb_is_told_of_a_failure(tmp_path, fake):
    with pytest.raises(KeyError):
        fails(WandB(tmp_path))
    assert fake.runs[0].exit_code == 1


def records(folder):
    """Reads the history that wandb kept offline: LevelDB's log format after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    whole, at, found = file.read_bytes(), 7, []
    part = b""
    while at + 7 <= len(whole):
        length, kind = struct.unpack_from("<HB", whole, at + 4)
        part += whole[at + 7 : at + 7 + length]
        at += 7 + length
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        if kind in (1, 4):  # a whole record, or the last part of one
            record, part = Record.FromString(part), b""
            items = record.history.item
            found.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return [items for items in found if items]


def test_wandb_itself_keeps_the_rows_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for first in (3, 5):
        with WandB(tmp_path / "run", project="branchcore") as callback:
            callback(ROW | {"iteration": first})
            picture(tmp_path / "run" / "samples.png", first)
            callback(row(first + 1, value=7.0))
            folder = tmp_path / "run" / "wandb" / "latest-run"
            ids.append(callback._run.id)
        folder, end = folder.resolve(), time.monotonic() + 20.0
        while len(records(folder)) < 2 and time.monotonic() < end:
            time.sleep(0.05)  # its service writes on for a moment after the end
        one, two = records(folder)
        assert {tag: one[tag] for tag in TAGS} == TAGS
        assert (one["_step"], two["_step"]) == (first, first + 1)
        assert two["reward/reward"] == 7.0
        assert two["samples/samples._type"] == "image-file"
        time.sleep(1.0)  # its folders are named by the second
    assert ids[0] == ids[1] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]


@pytest.fixture
def missing(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] in ("tensorboard", "wandb") or name == "torch.utils.tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)


@pytest.mark.parametrize(("name", "called"), [("tensorboard", "TensorBoard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_clear_error_before_anything_else(tmp_path, missing, name, called):
    message = f"callbacks: {called} must be installed, got none"
    with pytest.raises(RuntimeError, match=message):
        {"tensorboard": TensorBoard, "wandb": WandB}[name](tmp_path)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(out), "--iterations", "1", "--log", name])
    assert message in str(stop.value)
    assert f"try pip install 'branchcore[{name}]'" in str(stop.value)
    assert not out.exists()


def test_the_command_line_knows_no_other_name(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--out", "x", "--log", "mlflow"])
    assert "choose from" in capsys.readouterr().err


def test_the_command_line_logs_a_run_and_its_resumption(tmp_path, fake):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    out, small = tmp_path / "run", ["--set", "prompts_per_iteration=2"]
    words = ["train", "--recipe", "dance_grpo", "--out", str(out), *small]
    words += ["--log", "tensorboard", "--log", "wandb", "--log", "tensorboard"]
    main([*words, "--iterations", "1"])
    main([*words, "--iterations", "2", "--resume"])
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in lines] == [0, 1, 2]
    shown = scalars(out / "tensorboard", "policy/grad_norm")
    assert shown == [(r["iteration"], pytest.approx(r["grad_norm"], rel=1e-6)) for r in lines[1:]]
    images = events(out / "tensorboard").Images("samples/samples")
    assert [image.step for image in images] == [1, 2]
    first, second = fake.runs
    assert [step for step, _ in first.logged] == [0, 1]
    assert [step for step, _ in second.logged] == [2]
    assert first.options["config"]["recipe"]["name"] == "dance_grpo"
    assert first.exit_code == second.exit_code == 0


def test_nothing_is_imported_unless_asked_for():
    code = "import sys, branchcore.cli, branchcore.callbacks as c, branchcore.trainer\n"
    code += "seen = {'tensorboard', 'wandb', 'torch.utils.tensorboard', 'PIL'} & set(sys.modules)\n"
    code += "assert not seen, seen"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_logging_changes_no_bit_of_a_row(tmp_path, fake):
    """Callbacks are shown the row as it is in metrics.jsonl."""
    given = dict(ROW)
    with WandB(tmp_path) as callback:
        callback(given)
    assert given == ROW
