"""The words of a report: how far the run is, its headline numbers, warnings, settings, versions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple, cast

from branchcore.run_report.markup import Markup, join, tag
from branchcore.run_report.read import Run
from branchcore.run_report.scale import duration, number, percent, signed


class Headline(NamedTuple):
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""
    bad: bool = False


def headlines(run: Run) -> list[Headline]:
    """Returns the numbers that tell most, as far as the run has them."""
    found = [
        _change(run, "eval/reward", "held-out reward"),
        _change(run, "reward", "training reward"),
    ]
    shares = [n for row in run.rows for n in row if n.startswith("eval/") and n.endswith("_right")]
    if shares:
        name = shares[0]
        found.append(_change(run, name, name.removeprefix("eval/").replace("_", " "), share=True))
    found.append(_change(run, "eval/diversity", "held-out diversity"))
    found += [_pace(run), _saved(run), _mean(run, "mfu", "MFU"), _skipped(run)]
    return [headline for headline in found if headline is not None]


def _change(run: Run, name: str, label: str, *, share: bool = False) -> Headline | None:
    values = [(at, v) for at, v in run.values(name) if math.isfinite(v)]
    if not values:
        return None
    first, last = values[0][1], values[-1][1]
    shown = percent(last) if share else number(last)
    if len(values) == 1:
        return Headline(label, shown, f"at iteration {values[0][0]}")
    before = percent(first) if share else number(first)
    change = f"{signed(100 * (last - first), 2)} points" if share else signed(last - first, 2)
    return Headline(label, shown, f"{change} from {before}")


def _pace(run: Run) -> Headline | None:
    rows = [row for row in run.rows if row["iteration"] > 0]
    seconds = [row["wall_s"] for row in rows if isinstance(row.get("wall_s"), (int, float))]
    if not seconds:
        return None
    whole = sum(float(v) for _, v in run.values("wall_s"))
    return Headline(
        "per iteration", duration(sum(seconds) / len(seconds)), f"{duration(whole)} in all"
    )


def _mean(run: Run, name: str, label: str) -> Headline | None:
    values = [v for _, v in run.values(name) if math.isfinite(v)]
    if not values:
        return None
    return Headline(label, percent(sum(values) / len(values)), "mean over iterations")


def _saved(run: Run) -> Headline | None:
    return _mean(run, "work_saved", "work saved by pruning")


def _skipped(run: Run) -> Headline | None:
    skipped = [row for row in run.rows if "skipped" in row]
    if not skipped:
        return None
    return Headline("skipped updates", str(len(skipped)), "not finite, see below", bad=True)


def state_of(run: Run, now: datetime) -> tuple[str, str]:
    """Returns how far a run is: a word and a sentence.

    Args:
        run: the run.
        now: when the report is written.
    """
    goal = run.goal
    if goal is None:
        return "length not known", f"{run.done:,} iterations are logged"
    if run.done >= goal:
        return "finished", f"{goal:,} iterations"
    written = datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime, timezone.utc)
    ago = duration(max((now - written).total_seconds(), 0.0))
    return "in progress", (
        f"{run.done:,} of {goal:,} iterations; the last row was written {ago} before this page, "
        "so the run goes on or was stopped"
    )


WARNING = re.compile(
    r"^(?P<name>[\w/]+): (?P<what>.*?)(?: \((?P<why>.*)\))?; try (?P<fix>.*)$", re.S
)


def warnings_of(run: Run) -> Markup | None:
    """Returns the warnings of a run with cause and cure, and its skipped updates."""
    items: list[Markup] = []
    for row in run.rows:
        at = tag("span", f"iteration {row['iteration']}", cls="when")
        texts = row.get("warnings")
        if isinstance(texts, list):
            items += [_warning(str(text), at) for text in cast("list[Any]", texts)]
        if "skipped" in row:
            name = tag("h3", "skipped update", at)
            items.append(tag("li", name, tag("p", str(row["skipped"]))))
    return tag("ul", *items, cls="warnings") if items else None


def _warning(text: str, at: Markup) -> Markup:
    found = WARNING.match(text)
    if found is None:
        return tag("li", tag("h3", "warning", at), tag("p", text))
    why, fix = found["why"], found["fix"]
    return tag(
        "li",
        tag("h3", found["name"], at),
        tag("p", _sentence(found["what"])),
        tag("p", tag("b", "Likely cause "), _sentence(why)) if why else None,
        tag("p", tag("b", "Try "), _sentence(fix, capital=False)),
    )


def _sentence(text: str, *, capital: bool = True) -> str:
    first = text[:1].upper() if capital else text[:1]
    return f"{first}{text[1:]}".rstrip(".") + "."


def settings_of(run: Run) -> Markup | None:
    """Returns what identifies the run, in tables, with its starts and versions."""
    identity = run.identity
    recipe, prompts = _part(identity, "recipe"), _part(identity, "prompts")
    tables = [
        ("recipe", recipe),
        ("trainer", _part(identity, "config")),
        ("model and rewards", _part(identity, "facts")),
        ("prompts", prompts),
    ]
    parts = [_table(title, entries) for title, entries in tables if entries]
    parts += _sessions(run)
    return tag("div", *parts, cls="tables") if parts else None


def _sessions(run: Run) -> list[Markup]:
    """Returns the starts of a run and the versions of the last one."""
    if not run.sessions:
        return []
    rows: list[Markup] = []
    for session in run.sessions:
        started = str(session.get("started", "?")).replace("T", " ").replace("+00:00", " UTC")
        after = session.get("after", 0)
        what = f"resumed after iteration {after}" if after else "begun"
        processes = session.get("processes", 1)
        with_ = f"{processes} process{'es' * (processes != 1)}, {session.get('device', '?')}"
        rows.append(tag("tr", tag("th", started, scope="row"), tag("td", f"{what}; {with_}")))
    versions = _part(run.sessions[-1], "versions")
    starts = tag("div", tag("h3", "starts"), tag("table", *rows))
    return [starts, *([_table("versions", versions)] if versions else [])]


def _part(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = facts.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _table(title: str, entries: Mapping[str, Any]) -> Markup:
    rows = [
        tag("tr", tag("th", _name(name), scope="row"), tag("td", _value(value)))
        for name, value in flat(entries).items()
    ]
    return tag("div", tag("h3", title), tag("table", *rows))


def _name(name: str) -> Markup:
    """Returns a name that may break where its words end."""
    parts = re.split(r"(?<=[._])", name)
    return join(*(child for part in parts for child in (part, Markup("<wbr>"))))


def flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested entries under names with dots."""
    found: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict) and value:
            found |= flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _value(value: Any) -> Markup:
    if value is None:
        return tag("span", "none", cls="quiet")
    if isinstance(value, float):
        return join(f"{value:.6g}")
    if isinstance(value, list) and len(cast("list[Any]", value)) > 0:
        numbers = [f"{x:.6g}" if isinstance(x, float) else json.dumps(x) for x in value]
        return join(", ".join(numbers))
    return join(value if isinstance(value, str) else json.dumps(value))


def clip_of(run: Run) -> float | None:
    """Returns the clip range of the recipe, the smaller side, None if it has none."""
    clip = _part(run.identity, "recipe").get("clip")
    sides = cast("list[Any]", clip) if isinstance(clip, list) else [clip]
    known = [float(s) for s in sides if isinstance(s, (int, float)) and math.isfinite(s)]
    return min(known) if known else None
