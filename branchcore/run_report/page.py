"""The page: sections in the order in which one asks, nothing that has to be loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from branchcore.checkpoint import check_writable
from branchcore.run_folder import write_whole
from branchcore.run_report import facts, series
from branchcore.run_report.chart import chart_values, draw_chart
from branchcore.run_report.markup import Child, Markup, join, script_json, tag
from branchcore.run_report.read import Run, read_run
from branchcore.run_report.sample_rows import chosen, draw_samples
from branchcore.run_report.series import Chart
from branchcore.run_report.stage_bars import draw_stages
from branchcore.run_report.tree_picture import draw_tree, farthest

TREES = 6
"""Most trees of a page."""
# What the page may do: run its own script, use its own style, show the pictures that it holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of a run; returns the file.

    Args:
        run: its folder.
        out: the page; None = report.html in that folder.

    Raises:
        ValueError: no run, or no whole row yet.
        OSError: the page cannot be written.
    """
    text = page(read_run(run), now=datetime.now(timezone.utc))
    out = run / "report.html" if out is None else out
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return out


def page(run: Run, *, now: datetime) -> str:
    """Returns the report of a run as HTML.

    Args:
        run: the run.
        now: when the report is written, with its time zone.
    """
    charts: list[Chart] = []

    def drawn(found: Sequence[Chart]) -> Markup | None:
        charts.extend(found)
        parts = [draw_chart(chart, *_span(run)) for chart in found]
        wide = " wide" if len(parts) % 3 == 1 or len(parts) == 2 else ""
        return tag("div", *parts, cls=f"charts{wide}") if parts else None

    sections = [
        ("warnings", "Warnings", "", facts.warnings_of(run)),
        ("reward", "Reward", _REWARD, drawn(series.reward_charts(run))),
        ("held-out", "Held-out measures", "", drawn(series.held_out_charts(run))),
        ("samples", "Samples", _SAMPLES, draw_samples(run.grid)),
        ("tree", "The first prompt's tree", _TREE, _trees(run)),
        ("policy", "Policy", "", drawn(series.policy_charts(run, facts.clip_of(run)))),
        ("time", "Time and machine", "", _machine(run, drawn)),
        ("settings", "Settings", "", facts.settings_of(run)),
    ]
    shown = [(key, title, note, body) for key, title, note, body in sections if body is not None]
    links = [tag("a", title, href=f"#{key}") for key, title, _, _ in shown]
    body = [_section(*section) for section in shown]
    known = script_json(json.dumps([chart_values(chart, *_span(run)) for chart in charts]))
    return "<!doctype html>\n" + tag(
        "html",
        _head(run),
        tag(
            "body",
            tag("main", _top(run, now), tag("nav", *links), _headlines(run), *body, _foot(now)),
            tag("script", known, type="application/json", id="charts"),
            tag("script", Markup(_file("script.js"))),
        ),
        lang="en",
    )


_REWARD = (
    "Line: mean over an iteration's leaves. Band: mean standard deviation within a prompt. "
    "Dots: the same measure on held-out noise."
)
_SAMPLES = "The same prompts from the same held-out noise, over the run."
_TREE = (
    "Noise falls from left to right. Trained edges are blue where their advantage is positive and "
    "red where it is negative, the stronger the larger; thin grey edges are not trained, dotted "
    "ones pruned or stopped. Bars show each leaf's total reward beside the tree's mean."
)


def _span(run: Run) -> tuple[int, int]:
    return run.rows[0]["iteration"], run.done


def _file(name: str) -> str:
    return (files("branchcore.run_report") / name).read_text(encoding="utf-8")


def _head(run: Run) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{run.path.resolve().name}: report"),
        tag("style", Markup(_file("style.css"))),
    )


def _top(run: Run, now: datetime) -> Markup:
    word, sentence = facts.state_of(run, now)
    recipe, model = run.identity.get("recipe"), run.identity.get("facts")
    parts = ((recipe, "name"), (model, "model"))
    named = [part.get(key) for part, key in parts if isinstance(part, dict)]
    what = " on ".join(str(name) for name in named if name)
    resumed = sum(bool(session.get("after")) for session in run.sessions)
    again = f", resumed {resumed} time{'s' * (resumed > 1)}" if resumed else ""
    return tag(
        "header",
        tag("p", what or "training run", cls="kind"),
        tag("h1", run.path.resolve().name),
        tag("p", tag("span", word, cls=f"state {word.split()[0]}"), f" {sentence}{again}."),
        *[tag("p", note, cls="note") for note in run.notes],
    )


def _headlines(run: Run) -> Markup:
    tiles = [
        tag(
            "div",
            tag("dt", h.label),
            tag("dd", h.value, cls="bad" if h.bad else None),
            tag("dd", h.note, cls="quiet") if h.note else None,
        )
        for h in facts.headlines(run)
    ]
    return tag("dl", *tiles, cls="headlines")


def _section(key: str, title: str, note: str, body: Child) -> Markup:
    said = tag("p", note, cls="lead") if note else None
    return tag("section", tag("h2", title), said, body, id=key)


def _trees(run: Run) -> Markup | None:
    if not run.trees:
        return None
    times = chosen(list(run.trees), TREES)
    reach = max(farthest(run.trees[at]) for at in times)
    buttons: list[Markup] = []
    pictures: list[Markup] = []
    for at in times:
        tree, last = run.trees[at], at == times[-1]
        pressed = {"aria_pressed": "true" if last else "false"}
        buttons.append(tag("button", at, type="button", data_at=at, **pressed))
        caption = tag("figcaption", f"iteration {at}: ", tag("q", tree["prompt"]))
        picture = draw_tree(tree, reach)
        pictures.append(tag("figure", caption, picture, data_at=at, hidden=not last))
    choice = tag("div", tag("span", "iteration"), *buttons, cls="choice", hidden=True)
    return tag("div", choice if len(times) > 1 else None, *pictures, cls="trees")


def _machine(run: Run, drawn: Any) -> Markup | None:
    parts = [part for part in (draw_stages(run), drawn(series.work_charts(run))) if part]
    return join(*parts) if parts else None


def _foot(now: datetime) -> Markup:
    when = now.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return tag("footer", f"Written by branchcore on {when}. This page loads nothing.")
