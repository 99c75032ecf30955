"""The live view as text: what it says at every size, and how it shares a terminal with others."""

import io
import logging
import math
import re
import sys
import threading

import pytest

pytest.importorskip("rich", reason="the live view needs the live extra")

from rich.console import Console
from terminals import Terminal

from branchcore import progress
from branchcore.live_view import LiveView, view
from branchcore.live_view.panel import Now, lines
from branchcore.live_view.screen import Above, Screen, everything_above
from branchcore.live_view.seen import CELLS, Curve, Seen
from branchcore.live_view.text import duration, meter, number, percent, sparkline
from branchcore.preemption import Preempted
from branchcore.progress import Bar, Nothing, Shown, chosen_view, progress_of

SIZES = [(120, 50), (99, 24), (79, 23), (60, 23), (39, 23), (39, 11), (79, 9), (24, 5), (7, 3)]
EVALUATED = {
    "eval/reward": -2.5, "eval/a": -1.0, "eval/b": -1.5, "eval/diversity": 0.25,
    "eval/judge": 0.99, "time/evaluation": 1.0,
}  # fmt: skip
ROW = {
    "reward": -2.0, "reward/a": -0.5, "reward/b": -1.5, "reward_std/a": 0.25, "reward_std/b": 0.5,
    "zero_std_share": 0.05, "ratio_dev_mean": 1.2e-5, "ratio_dev_max": 3.4e-4, "clip_share": 0.04,
    "clip_noise_share": 0.75, "noise_floor": 2.2e-6, "grad_norm": 0.25, "kl": 2e-4, "leaves": 60,
    "masked_leaves": 4, "wall_s": 2.0, "time/rollout": 1.0, "time/update": 0.5, "time/other": 0.5,
}  # fmt: skip


def shown(**changed):
    facts = {
        "title": "dance_grpo on digits", "out": "runs/first", "begun": 0, "iterations": 200,
        "checkpoint_every": 20, "evaluate_every": 50, "clip": 1e-4, "stage": lambda: "rollout",
    }  # fmt: skip
    return Shown(**facts | changed)


def seen(count=37, without=(), **changed):
    found = Seen(50)
    found.add({"iteration": 0, **EVALUATED})
    row = {name: value for name, value in (ROW | changed).items() if name not in without}
    for i in range(1, count + 1):
        found.add({"iteration": i, **row, "reward": -3.0 + i / 37})
    return found


def text(run=None, now=None, width=79, height=23, **facts):
    run = seen() if run is None else run
    picture = lines(shown(**facts), run, now or Now("rollout", 2.3, 4), width, height)
    console = Console(width=width, force_terminal=True, record=True, file=Terminal(width))
    for line in picture:
        console.print(line, soft_wrap=True)
    found = console.export_text()
    assert len(found.splitlines()) <= (height or math.inf)
    assert all(len(line) <= width for line in found.splitlines())
    return found


def line_of(found, start):
    (line,) = [x.strip() for x in found.splitlines() if x.strip().startswith(start)]
    return line


def test_everything_is_said_in_eighty_columns():
    run = seen()
    run.add({"iteration": 38, **ROW, "warnings": ["clip_share: must be below half, got 0.6"]})
    found = text(run)
    assert found.splitlines()[0] == f" dance_grpo on digits{'runs/first':>58}"
    assert "━╸─" in found
    assert found.splitlines()[1].endswith("19 %")
    assert "⠼ rollout     2 s  iteration 38 of 200 · 2.00 s each · 5 min 24 s left" in found
    assert line_of(found, "total").split()[:3] == ["total", "-2.000", "-2.500"]
    assert line_of(found, "a ").split()[:5] == ["a", "-0.500", "±", "0.250", "-1.000"]
    assert line_of(found, "total").endswith("█")
    assert "held out at 0" in found
    assert "judge 0.990" in found
    assert "ratio - 1   1.2e-05, max 3.4e-04" in found
    assert "clipped     4 %, 75 % of it noise" in found
    assert "clip range  1.0e-04, floor 2.2e-06" in found
    assert "zero std    5 % of groups" in found
    assert "diversity   0.250" in found
    assert "KL loss     2.0e-04" in found
    for stage, share in (("rollout", "1.00 s   50 %"), ("update", "0.50 s   25 %")):
        assert f"{stage:<11}  {share}  ━" in found
    assert "next checkpoint at 40, evaluation at 50" in found
    assert "4 of 64 leaves without a score" in found
    assert "! clip_share at 38: must be below half, got 0.6" in found


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_size_is_kept_to_and_says_the_most_important(width, height):
    found = text(width=width, height=height)
    assert "dance" in found
    if width > 30:
        assert "rollout" in found
        assert "37 of 200" in found
    if height > 8:
        assert "total" in found
        assert line_of(found, "total").endswith("█")
        assert "ratio" in found
    if height > 20:
        assert all(name in found for name in ("clip range", "gradient", "zero std", "update"))


def test_what_is_not_there_is_not_said():
    nothing = text(Seen(), Now("evaluation", 0.2, 0))
    assert nothing.split()[:5] == ["dance_grpo", "on", "digits", "runs/first", "─" * 71]
    assert "0 %" in nothing
    assert "evaluation" in nothing
    assert not any(word in nothing for word in ("reward", "policy", "time", "nan", "left"))
    only = Seen(50)
    only.add({"iteration": 0, **EVALUATED})
    assert line_of(text(only), "total").split() == ["total", "-2.500"]
    assert "policy" not in text(only)
    on_policy = seen(without=("noise_floor", "clip_noise_share"), ratio_dev_max=0.0)
    assert "ratio       exactly 1, on policy" in text(on_policy)
    assert "clip" not in text(on_policy)
    matching = text(on_policy, clip=None)
    assert "ratio " not in matching
    assert "gradient" in matching
    masked = text(seen(), clip=None)
    assert "noise       floor 2.2e-06" in masked
    assert "clipped" not in masked
    assert "clip range  2.0e-04, floor 2.2e-06" in text(seen(clip=2e-4))
    alone = seen(without=("reward/b", "reward_std/b"), **{"reward/a": -2.0})
    alone.add({**ROW, "iteration": 38, "reward/a": -2.0} | {"reward/b": -2.0})
    assert "total" in text(alone)
    assert "nan" not in text(seen(reward=math.nan, grad_norm=math.nan))
    single = Seen()
    single.add({"iteration": 1, "reward": -2.0, "reward/a": -2.0})
    assert "total" not in text(single)
    assert line_of(text(single, evaluate_every=None), "next") == "next checkpoint at 20"


def test_skipped_updates_are_named():
    run = seen()
    run.add({"iteration": 38, "skipped": "gradient norm must be finite, got inf", "wall_s": 1.0})
    assert "1 skipped, now: gradient norm must be finite, got inf" in text(run)
    assert line_of(text(run), "total").split()[1] == "-2.000"
    run.add({"iteration": 39, **ROW})
    assert "1 skipped · 4 of 64 leaves" in text(run)


def test_many_components_long_names_and_long_warnings_stay_inside():
    names = [f"component_of_a_long_name_{i}" for i in range(30)]
    run = seen(**{f"reward/{name}": 1e-9 for name in names})
    run.add({**ROW, "iteration": 38, "warnings": ["cause: " + "word " * 100] * 5})
    run.add({**ROW, "iteration": 39, **{f"reward/{name}": -1e9 for name in names}})
    for width, height in SIZES:
        text(run, width=width, height=height)
    assert re.search(r" reward \+2\d ", text(run, height=20))
    whole = text(run, height=None, width=100)
    assert "component_of_a_long_" in whole
    assert whole.count("cause at 38") == 2


def test_the_end_is_the_last_word():
    run = seen(200)
    found = text(run, Now("other", 0.0, 9, "finished"), height=None)
    assert "finished  iteration 200 of 200 · 2.00 s each\n" in found
    assert "100 %" in found
    assert "left" not in found
    assert "next" not in found


def test_signs_of_numbers():
    assert [number(v) for v in (0.0, -1.23456, 12345.6, 1234.5, 1e-3, 2.5e7, math.nan)] == [
        "0.000", "-1.235", "12346", "1234.5", "1.0e-03", "2.5e+07", "-",
    ]  # fmt: skip
    assert [duration(s) for s in (0.123, 9.999, 59.6, 230, 7500, 360000, math.inf)] == [
        "0.12 s", "10.00 s", "1 min 00 s", "3 min 50 s", "2 h 05 min", "4 d 4 h", "-",
    ]  # fmt: skip
    assert [percent(s) for s in (0.0, 0.001, 0.5, 1.0)] == ["0 %", "< 1 %", "50 %", "100 %"]
    assert sparkline([0.0, 1.0, 2.0, math.nan, 7.0], 9) == "▁▂▃ █"
    assert sparkline([1.0, 1.0], 9) == "▄▄"
    assert sparkline([*range(100)], 4) == "▁▃▆█"
    assert sparkline([math.nan], 9) == sparkline([1.0], 0) == sparkline([], 5) == ""
    assert meter(0.5, 5) == ("━━╸", "──")
    assert meter(7.0, 2) == ("━━", "")


def test_a_curve_has_a_bounded_length_and_the_right_means():
    curve = Curve()
    for i in range(8 * CELLS):
        curve.add(float(i))
    curve.add(math.inf)
    assert CELLS <= len(curve.values) < 2 * CELLS
    each = 8 * CELLS / len(curve.values)
    assert curve.values[1] - curve.values[0] == each
    assert curve.values[0] == (each - 1) / 2


def test_the_time_that_is_left_counts_evaluations_but_not_what_was_before_a_resumption():
    run = Seen(30)
    run.replay([{"iteration": i, **ROW, "wall_s": 1e4} for i in range(1, 11)])
    assert math.isnan(run.pace())
    assert run.times() == {}
    assert run.iteration == 10
    assert len(run.curve("reward")) == 10
    for i in range(11, 41):
        run.add({"iteration": i, **ROW, "wall_s": 31.0 if i == 40 else 1.0})
    assert run.pace() == pytest.approx(2.0)


FIRST = Now("rollout", 0.0, 0)


class Following(Console):
    """A console as wide as its terminal is now."""

    def __init__(self, terminal):
        super().__init__(file=io.StringIO(), force_terminal=True, color_system="standard")
        self.terminal = terminal

    @property
    def size(self):
        return type(super().size)(self.terminal.width, self.terminal.height)


@pytest.fixture
def terminal():
    return Terminal(80, 24)


def draw(screen, run=None, **facts):
    width, height = screen.size
    screen.draw(lines(shown(**facts), run or seen(), FIRST, width, height))


def test_pictures_replace_each_other_and_text_goes_above(terminal):
    screen = Screen(terminal, Following(terminal))
    for count in (1, 37, 2):
        draw(screen, seen(count))
    screen.above("one\nand two\n")
    draw(screen)
    assert terminal.text.startswith("one\nand two\n dance_grpo on digits")
    assert terminal.text.count("dance_grpo") == 1
    assert terminal.text.splitlines()[2:] == text(now=FIRST).splitlines()
    screen.draw([])
    assert terminal.text == "one\nand two"


@pytest.mark.parametrize("width", [130, 79, 60, 40, 12])
def test_a_resize_leaves_one_picture_and_what_is_above(terminal, width):
    screen = Screen(terminal, Following(terminal))
    screen.above("before\n")
    draw(screen)
    terminal.resize(width, 200)
    draw(screen)
    screen.above("after\n")
    draw(screen)
    assert terminal.text.startswith("before\nafter\n dance")
    assert terminal.text.count(" dance") == 1
    assert max(map(len, terminal.text.splitlines())) <= width
    terminal.resize(80)
    draw(screen)
    assert terminal.text.splitlines()[2:] == text(height=200, now=FIRST).splitlines()


def test_a_low_terminal_shows_the_whole_picture(terminal):
    screen = Screen(terminal, Following(terminal))
    for height in (24, 10, 6, 12):
        terminal.resize(80, height)
        draw(screen)
        draw(screen)
        assert " dance_grpo on digits" in terminal.screen
        assert terminal.screen.count(" reward ") <= 1


def test_a_terminal_that_is_closed_ends_the_drawing_only(terminal):
    screen = Screen(terminal, Following(terminal))
    draw(screen)
    terminal.is_open = False
    draw(screen)
    screen.above("lost\n")
    terminal.is_open = True
    screen.above("lost too\n")
    assert "lost" not in terminal.text


def test_prints_and_logs_stand_above(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger, handler = logging.getLogger("branchcore.a_test"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    screen = Screen(terminal, Following(terminal))
    try:
        with everything_above(screen):
            draw(screen)
            print("printed")
            logger.warning("logged")
            print("10 %", end="\r")
            print("half a line", end="")
            thread = threading.Thread(target=lambda: print(", the rest", file=sys.stderr))
            thread.start()
            thread.join()
            assert not sys.stdout.isatty()
            assert sys.stderr.encoding == "utf-8"
            draw(screen)
        assert sys.stdout is sys.stderr is handler.stream is terminal
    finally:
        logger.removeHandler(handler)
    above = terminal.text.split(" dance_grpo")[0].splitlines()
    assert above == ["printed", "logged", ", the rest", "half a line"]
    assert terminal.text.count(" dance_grpo") == 1


def test_a_forked_process_writes_for_itself(terminal, monkeypatch):
    screen = Screen(terminal, Following(terminal))
    stream = Above(screen, terminal)
    draw(screen)
    with screen._lock, monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        stream.write("from the child")
    assert terminal.text.endswith("\nfrom the child")
    stream.write("above\n")
    assert terminal.text.startswith("above\n dance_grpo")


@pytest.fixture
def at(terminal, monkeypatch):
    """A live view in a terminal that is also stdout and stderr."""
    monkeypatch.setattr(view, "EVERY_S", 0.005)

    def live(**facts):
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        return LiveView(shown(**facts), terminal)

    return live


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (None, "finished"),
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (Preempted("SIGTERM"), "stopped by SIGTERM"),
        (ValueError("reward failed"), "ended by ValueError"),
    ],
)
def test_the_last_picture_stays_however_a_run_ends(at, terminal, error, wanted):
    drawn = threading.Event()

    def stage():
        if threading.current_thread().name == "live view":
            drawn.set()
        return "update"

    found = None
    try:
        with at(stage=stage) as live:
            live.row({"iteration": 0, **EVALUATED})
            assert drawn.wait(20.0)
            print("a line")
            live.row({"iteration": 1, **ROW})
            if error is not None:
                raise error
    except BaseException as raised:
        found = raised
    assert found is error
    assert sys.stdout is sys.stderr is terminal
    assert not any(thread.name == "live view" for thread in threading.enumerate())
    assert terminal.text.startswith("a line\n dance_grpo on digits")
    assert f" {wanted}  iteration 1 of 200" in terminal.text
    assert terminal.text.count(" reward ") == 1
    print("the shell")
    assert terminal.text.endswith("\nthe shell")


def test_a_resumed_run_goes_on_with_its_curves(at, terminal):
    rows = [{"iteration": i, **ROW, "reward": i / 10} for i in range(1, 9)]
    with at(begun=8, rows=rows):
        pass
    assert "iteration 8 of 200\n" in terminal.text
    assert line_of(terminal.text, "total").endswith("▁▂▃▄▅▆▇█")


class NoTerminal(Terminal):
    def isatty(self):
        return False


def asked(monkeypatch, view="auto", stdout=None, stderr=None, term="xterm", rich=True):
    monkeypatch.setattr(sys, "stdout", stdout or Terminal())
    monkeypatch.setattr(sys, "stderr", stderr or Terminal())
    monkeypatch.setenv("TERM", term)
    found = object() if rich else None
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: found)
    return chosen_view(view)


def test_a_terminal_gets_the_live_view_and_a_file_a_bar(monkeypatch, caplog):
    ascii_terminal = Terminal()
    ascii_terminal.encoding = "ascii"
    lacks = [
        ({"stdout": NoTerminal()}, "a terminal, got stdout that is none; try --view bar"),
        ({"stderr": NoTerminal()}, "a terminal, got stderr that is none; try --view bar"),
        ({"stdout": ascii_terminal}, "a terminal of UTF-8, got ascii; try PYTHONIOENCODING"),
        ({"term": "dumb"}, "a terminal that moves its cursor, got TERM=dumb; try --view bar"),
    ]
    for lack, wanted in lacks:
        assert asked(monkeypatch, **lack) == "bar"
        with pytest.raises(RuntimeError, match=f"^view: live must have {wanted}"):
            asked(monkeypatch, "live", **lack)
    assert asked(monkeypatch) == asked(monkeypatch, "live") == "live"
    assert asked(monkeypatch, "bar") == "bar"
    assert asked(monkeypatch, "none", stdout=NoTerminal()) == "none"
    assert not caplog.messages
    assert asked(monkeypatch, rich=False) == "bar"
    hint = "rich, got none; try pip install 'branchcore[live]'"
    assert caplog.messages == [f"view: a bar, as the live view must have {hint}"]
    with pytest.raises(RuntimeError, match=r"rich, got none; try pip install 'branchcore\[live\]'"):
        asked(monkeypatch, "live", rich=False)
    with pytest.raises(ValueError, match=r"view: must be one of \('auto', .*\), got 'tv'"):
        asked(monkeypatch, "tv")


def test_the_bar_moves_by_iterations_and_names_what_is_skipped(capsys):
    bar = progress_of("bar", shown(begun=5, iterations=7))
    assert isinstance(bar, Bar)
    with bar:
        bar.row({"iteration": 0, **EVALUATED})
        bar.row({"iteration": 6, **ROW})
        bar.row({"iteration": 7, "skipped": "gradient norm must be finite"})
        bar._bar.refresh()
    shows = capsys.readouterr().err
    assert "7/7" in shows
    assert shows.rstrip().endswith("gradient norm must be finite]")
    nothing = progress_of("none", shown())
    assert isinstance(nothing, Nothing)
    with nothing as silent:
        silent.row({"iteration": 1, **ROW})
    assert capsys.readouterr() == ("", "")
