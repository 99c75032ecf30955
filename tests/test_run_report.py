"""The report of a run: what it reads, draws, and says of damaged or absent parts."""

import itertools
import json
import math
import os
import re
from datetime import datetime, timezone
from html.parser import HTMLParser

import made_run
import pytest

from branchcore.cli import main
from branchcore.run_report import page, read_run, write_report
from branchcore.run_report.chart import HEIGHT, UNITS, draw_chart
from branchcore.run_report.facts import state_of
from branchcore.run_report.markup import Markup, tag
from branchcore.run_report.sample_rows import chosen
from branchcore.run_report.scale import axis_of, duration, fixed, log_axis_of, number, percent, tick
from branchcore.run_report.series import POINTS, Chart, Series, policy_charts, thinned
from branchcore.run_report.stage_bars import bars_of
from branchcore.run_report.tree_picture import LEFT, RIGHT, farthest, layout_of, totals

NOW = datetime(2026, 5, 4, tzinfo=timezone.utc)
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("PIL.Image")
    return made_run.make(tmp_path_factory.mktemp("runs") / "whole", sessions=2)


class Elements(HTMLParser):
    """Tags, attributes and texts of a page, with unbalanced ones refused."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in ("meta", "link", "br", "img", "wbr", "input"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        for name in self.open[-1:]:
            self.words[name] = self.words.get(name, "") + text


def test_what_users_wrote_stays_text(run):
    text = page(read_run(run), now=NOW)
    elements = Elements(text)
    names = [name for name, _ in elements.found]
    assert names.count("script") == 2
    assert names.count("img") == 0
    assert made_run.HOSTILE in elements.words["span"]
    assert elements.words["q"] == made_run.HOSTILE * 4
    for _, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes)
        links = [attributes.get("src"), attributes.get("href"), attributes.get("xlink:href")]
        assert all(link is None or link.startswith(("#", "data:")) for link in links)
    styles = elements.words["style"]
    assert all(
        link.startswith("data:image/png;base64,") for link in re.findall(r"url\((.*?)\)", styles)
    )
    policy = next(a["content"] for n, a in elements.found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


def test_a_page_has_the_numbers_of_its_run(run):
    words = Elements(page(read_run(run), now=NOW)).words
    assert "finished" in words["span"]
    assert "resumed 1 time" in words["p"]
    for number_ in ("3", "2", "50 %", "0.4", "3 s", "31 %", "40 %"):
        assert number_ in words["dd"], number_
    assert "+4 from " + MINUS + "1" in words["dd"]
    assert "Must be below half of the trained edges, got 0.61." in words["p"]
    assert (
        "Steps are too long for a clip range of 0.001; clipped edges have no gradient."
        in words["p"]
    )
    assert "A smaller lr" not in words["p"]
    assert "a smaller lr, fewer updates or a larger clip." in words["p"]
    assert "gradient: must be finite, got NaN <b>" in words["p"]
    assert "resumed after iteration 10; 2 processes, cuda, GPU <1>" in words["td"]
    assert "2.13.0" in words["td"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: None, r"must be the folder of a run, got .*: no such folder"),
        (lambda out: out.mkdir(), "a folder without metrics.jsonl; try a folder that"),
        (lambda out: begun(out), "a run without a row; try after its first iteration"),
        (lambda out: log(out, ""), "must hold at least one whole row, got none"),
        (lambda out: log(out, '{"iteration": 1, "rew\n[3]\n'), "at least one whole row, got none"),
        (lambda out: log(out, '{"reward": 1}\n{"iteration": true}\n'), "one whole row, got none"),
    ],
)
def test_what_is_no_run_is_one_clear_error(tmp_path, make, message, capsys):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=f"report: .*{message}"):
        read_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=f"branchcore report: report: .*{message}"):
        main(["report", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "report.html").exists()


def begun(out):
    out.mkdir()
    (out / "run.json").write_text("{}")


def log(out, text):
    out.mkdir()
    (out / "metrics.jsonl").write_text(text)


def test_damaged_rows_are_counted_and_the_whole_ones_shown(tmp_path):
    whole = '{"iteration": 2, "reward": 1.0}\n{"iteration": 1, "reward": 0.5}\n'
    odd = b'{"iteration": 3, "rew\n\xff\xfe\n7\n\n{"reward": 4}\n{"iteration": 2, "reward": 8.0}'
    log(tmp_path / "run", "")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(whole.encode() + odd)
    run = read_run(tmp_path / "run")
    assert run.values("reward") == [(1, 0.5), (2, 8.0)]
    assert run.notes == (
        "3 of 7 rows of metrics.jsonl were damaged and are left out.",
        "1 rows of metrics.jsonl have no iteration and are left out.",
        "run.json is missing: the configuration is not known.",
    )
    words = Elements(page(run, now=NOW)).words
    assert all(note in words["p"] for note in run.notes)
    assert "length not known" in words["span"]
    assert "samples" not in words.get("h2", "").lower()


def test_records_that_cannot_be_drawn_are_left_out_by_name(tmp_path):
    pytest.importorskip("PIL.Image")
    out = made_run.make(tmp_path / "run")
    good = made_run.tree()
    bad = {
        1: {**good, "parent": [-1, 0, 0, 1, 1, 2, 6]},
        10: {**good, "leaves": [3, 4, 5, 7]},
        20: {key: value for key, value in good.items() if key != "sigma"},
        30: {**good, "advantage": ["<b>"] * 7},
    }
    for at, record in bad.items():
        (out / "trees" / f"{at:06d}.json").write_text(json.dumps(record))
    (out / "trees" / "000025.json").write_text(json.dumps(good))
    (out / "trees" / "000031.json").write_text(json.dumps(good))  # its row is yet to come
    (out / "samples" / "grid.json").write_text("{")
    (out / "run.json").write_text("[1]")
    run = read_run(out)
    assert list(run.trees) == [25]
    assert run.grid is None
    assert [n for n in run.notes if n.startswith("trees/")] == [
        f"trees/{at:06d}.json is damaged and left out." for at in bad
    ]
    assert "samples/grid.json" not in run.notes[0]
    assert "run.json is damaged: the configuration is not known." in run.notes
    Elements(page(run, now=NOW))


def test_a_run_in_progress_says_so(tmp_path):
    out = made_run.make(tmp_path / "run", iterations=12, goal=1500, samples=False, trees=False)
    os.utime(out / "metrics.jsonl", (NOW.timestamp() - 150, NOW.timestamp() - 150))
    run = read_run(out)
    word, sentence = state_of(run, NOW)
    assert word == "in progress"
    assert sentence.startswith("12 of 1,500 iterations; the last row was written 2 min 30 s before")
    words = Elements(page(run, now=NOW)).words
    assert "Samples" not in words["h2"]
    assert "tree" not in words["h2"]
    (out / "metrics.jsonl").write_text(json.dumps(made_run.row(0)) + "\n")
    assert "Held-out measures" in Elements(page(read_run(out), now=NOW)).words["h2"]


def test_the_command_writes_where_it_is_told(run, tmp_path, capsys):
    main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")])
    assert capsys.readouterr().out == f"wrote {tmp_path}/new/page.html\n"
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n<html ")
    assert made_run.PROMPTS[2] in text
    assert write_report(run) == run / "report.html"
    with pytest.raises(OSError, match="out must be a folder that can be written"):
        write_report(run, run / "metrics.jsonl" / "page.html")


def test_curves_go_through_their_values():
    y = (0.0, 2.0, None, 1.0, 4.0)
    series = Series("training", (0, 5, 10, 15, 20), y, spread=(0.0, 1.0, None, 0.0, 0.0))
    figure = draw_chart(Chart("reward", (series,)), 0, 20)
    (path,) = re.findall(r'class="curve c0" d="(.*?)"', figure)
    assert path == f"M0 {UNITS:g}L250 500M750 750L{UNITS:g} 0"
    (band,) = re.findall(r'class="band c0" d="(.*?)"', figure)
    assert band == "M0 1000L250 250L250 750L0 1000ZM750 750L1000 0L1000 0L750 750Z"
    rules = re.findall(r'class="rule" x1="0" x2="100%" y1="(.*?)"', figure)
    assert [float(r) for r in rules] == [HEIGHT * (1 - i / 4) for i in range(5)]
    assert "training from 0 to 4" in figure


def test_ratios_far_apart_get_a_logarithmic_axis(run):
    (chart,) = [c for c in policy_charts(read_run(run), 0.001) if c.title.startswith("ratio")]
    assert [s.label for s in chart.series] == ["mean", "largest", "noise floor", "clip range"]
    assert chart.series[3].y == (0.001, 0.001)
    figure = draw_chart(chart, 0, 30)
    assert "log scale" in figure
    (clip,) = re.findall(r'class="curve level dashed" d="M\S+ (\S+)L\S+ (\S+)"', figure)
    axis = log_axis_of([2e-5, 1e-4, 1e-2])
    expected = UNITS * (1 - math.log(1e-3 / axis.low) / math.log(axis.high / axis.low))
    assert [float(y) for y in clip] == pytest.approx([expected] * 2, abs=0.05)


def test_long_runs_are_thinned_to_means_and_maxima():
    values = [(i, float(i % 4)) for i in range(4 * POINTS)]
    x, y = thinned(values)
    assert len(x) == POINTS
    assert set(y) == {1.5}
    assert x[:2] == (1.5, 5.5)
    assert set(thinned(values, largest=True)[1]) == {3.0}
    assert thinned([(1, math.nan), (2, 3.0)]) == ((1, 2), (None, 3.0))
    gaps = [(at, math.nan if at % 2 else v) for at, v in values]
    assert set(thinned(gaps)[1]) == {1.0}
    assert thinned([]) == ((), ())


@pytest.mark.parametrize("values", [(0.0, 1.0), (-3.2, -0.11), (5.0, 5.0), (0.0,), (1e-9, 3e-9)])
@pytest.mark.parametrize("zero", [False, True])
def test_an_axis_holds_its_values_between_few_round_ticks(values, zero):
    axis = axis_of(values, zero=zero)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert axis.low < axis.high
    assert 3 <= len(axis.ticks) <= 7
    assert not zero or axis.low <= 0.0 <= axis.high
    (step,) = {f"{b - a:.6e}" for a, b in itertools.pairwise(axis.ticks)}
    assert float(step.split("e")[0]) in (1.0, 2.0, 2.5, 5.0)
    assert axis.share(axis.low) == 0.0
    assert axis.share(axis.high) == 1.0


def test_numbers_are_written_for_people():
    assert [number(x) for x in (0.0, 1234.6, -0.12345, 12.34, 1e-7, 2.5e9)] == [
        *("0", "1,235", f"{MINUS}0.123", "12.3", f"1.0e{MINUS}7", "2.5e9")
    ]
    assert [number(x) for x in (None, math.nan, -math.inf)] == [*"\N{EN DASH}" * 2, f"{MINUS}∞"]
    assert [percent(x) for x in (0.0, 1e-5, 0.0123, 0.5, -0.2)] == [
        *("0 %", "< 0.1 %", "1.2 %", "50 %", f"{MINUS}20 %")
    ]
    assert [duration(x) for x in (2e-4, 0.25, 12.34, 90, 3600, 90000, 100000)] == [
        *("0.2 ms", "250 ms", "12.3 s", "1 min 30 s", "1 h", "1 d 1 h", "1 d 3 h")
    ]
    assert [tick(x) for x in (0.0, 7.5e-4, 0.25)] == ["0", f"7.5e{MINUS}4", "0.25"]
    assert [fixed(-2.8, size) for size in (2.0, 0.03, 400.0)] == [
        *(f"{MINUS}2.80", f"{MINUS}2.8000", f"{MINUS}3")
    ]


def test_a_tree_is_laid_out_without_crossings():
    parent = [-1, -1, 0, 0, 1, 2, 2, 3, 4]
    at = layout_of(parent)
    ends = [node for node in range(len(parent)) if node not in parent]
    by_height = sorted(ends, key=lambda node: at.y[node])
    assert by_height == [5, 6, 7, 8]  # depth first: of 2, of 3, then of the other root
    gaps = [at.y[b] - at.y[a] for a, b in itertools.pairwise(by_height)]
    assert gaps == pytest.approx([at.row] * 3)
    for node, up in enumerate(parent):
        below = [child for child in range(len(parent)) if parent[child] == node]
        if below:
            assert at.y[node] == (at.y[below[0]] + at.y[below[-1]]) / 2
        assert up < 0 or at.x[up] < at.x[node]
    assert (min(at.x), max(at.x)) == (LEFT, RIGHT)
    assert max(at.y) < at.height


def test_a_leaf_without_a_score_has_no_total():
    tree = made_run.tree()
    assert totals(tree) == [2.0, 4.0, -2.0, None]
    assert farthest(tree) == pytest.approx(2.0 + 4.0 / 3.0)


def test_time_is_the_mean_of_the_iterations_of_a_bar(tmp_path):
    rows = [
        {"iteration": i, "wall_s": 1.0, "time/rollout": float(i), "time/update": 1.0}
        for i in range(1, 97)
    ]
    log(tmp_path / "run", "".join(json.dumps(row) + "\n" for row in rows))
    bars = bars_of(read_run(tmp_path / "run"))
    assert [(bars[i].first, bars[i].last) for i in (0, -1)] == [(1, 2), (95, 96)]
    assert len(bars) == 48
    assert bars[0].seconds == {"rollout": 1.5, "update": 1.0}


def test_first_and_last_are_always_among_the_chosen():
    assert chosen(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert chosen([3, 4], 5) == [3, 4]


def test_markup_is_escaped_once():
    inner = tag("i", "<&'\"")
    assert inner == "<i>&lt;&amp;&#x27;&quot;</i>"
    assert tag("p", inner, "<", cls='"', data_x=1.5, hidden=False, open=True) == (
        f'<p class="&quot;" data-x="1.5" open>{inner}&lt;</p>'
    )
    assert isinstance(inner, Markup)
    assert tag("line", x1=0) == '<line x1="0"/>'


def test_a_report_of_other_fields_is_still_a_page(run):
    """Rows of a later version: unknown metrics, texts and objects where numbers were."""
    known = read_run(run)
    odd = {"iteration": 31, "reward": "high", "eval/new": {"x": 1}, "time/rollout": "?", "kl": None}
    rows = [*known.rows, odd | {"wall_s": None, "warnings": "text", "reward/new": 0.5}]
    text = page(known._replace(rows=rows), now=NOW)
    words = Elements(text).words
    assert "new" in words["h3"]
