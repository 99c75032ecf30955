"""The lines of the live view, for any width and height: what does not fit is left out in order.

Wide terminals have the policy and the times side by side. Colours only repeat what signs say.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from branchcore.clock import STAGES
from branchcore.live_view.policy import policy_facts
from branchcore.live_view.rewards import reward_table
from branchcore.live_view.seen import Seen
from branchcore.live_view.style import HEAD, LIVE, QUIET, WARN, joined, wrapped
from branchcore.live_view.text import duration, meter, percent
from branchcore.progress import Shown

MOST, LEAST = 100, 24
"""Columns of the view at most; at least, below which lines are cut instead of made shorter."""
WIDE = 76
"""Columns from which on there are two blocks side by side."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Now(NamedTuple):
    """What runs at this moment."""

    stage: str
    """Of `clock.STAGES`."""
    seconds: float
    """Since it began."""
    tick: int
    """Counts the pictures."""
    ended: str = ""
    """How the run has ended; empty while it goes on."""


class _Level(NamedTuple):
    """How much there is room for."""

    spaced: bool = False
    measures: int = 0
    """Lines of held-out measures."""
    warnings: int = 1
    """Lines of each."""
    stages: int = len(STAGES)
    components: int = 99
    policy: int = 99


_LEVELS = (
    _Level(spaced=True, measures=3, warnings=3),
    _Level(spaced=True, measures=2, warnings=3),
    _Level(spaced=True, measures=1, warnings=3),
    _Level(spaced=True, measures=1, warnings=2, stages=6),
    _Level(spaced=True, stages=6),
    _Level(measures=2, warnings=2, stages=6),
    _Level(measures=1, stages=6),
    _Level(stages=5),
    _Level(stages=4, components=4, policy=5),
    _Level(stages=3, components=3, policy=3),
    _Level(stages=1, components=2, policy=1),
    _Level(stages=0, components=2, policy=1),
    _Level(stages=0, components=1, policy=1),
    _Level(warnings=0, stages=0, components=0, policy=0),
)


def lines(shown: Shown, seen: Seen, now: Now, width: int, height: int | None) -> list[Text]:
    """Returns the view.

    Args:
        shown: what is known of the run.
        seen: its rows.
        now: what it does.
        width: columns.
        height: lines at most; None = as many as there are.
    """
    room = max(min(width, MOST), LEAST)
    found: list[Text] = []
    for level in _LEVELS:
        blocks = [
            _head(shown, seen, now, room),
            reward_table(seen, room, level.components, level.measures),
            *_below(shown, seen, now, room, level),
            _foot(shown, seen, now, room, level),
        ]
        between = [Text()] if level.spaced else []
        full = [block for block in blocks if block]
        found = [line for block in full for line in (*between, *block)][len(between) :]
        if height is None or len(found) <= height:
            break
    return [_cut(line, min(width, room)) for line in found[:height]]


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    line.rstrip()
    return line


def _head(shown: Shown, seen: Seen, now: Now, width: int) -> list[Text]:
    """Whose run it is and how far; what it does now."""
    share = seen.iteration / shown.iterations
    title = Text().append(f" {shown.title}", HEAD)
    room = width - title.cell_len - 2
    where = shown.out if cell_len(shown.out) <= room else "…" + shown.out[1 - room :]
    if room > 8:
        title.append(" " * (room - cell_len(where) + 2) + where, QUIET)
    full, empty = meter(share, width - 8)
    bar = Text(" ").append(full, LIVE).append(empty, QUIET).append(f"{percent(share):>7}", HEAD)
    pace = seen.pace()
    left = (shown.iterations - seen.iteration) * pace
    times = [] if math.isnan(pace) else [f"{duration(pace)} each"]
    if not (now.ended or math.isnan(left)):
        times.append(f"{duration(left)} left")
    doing = Text(" ").append(_doing(now)).append("  ")
    whole = [f"iteration {seen.iteration} of {shown.iterations}", *times]
    if width >= WIDE:
        return [title, bar, doing.append(joined(whole))]
    short = Text(" ").append(joined(times))
    doing.append(f"{seen.iteration} of {shown.iterations}")
    return [title, bar, doing, *([short] if times else [])]


def _doing(now: Now) -> Text:
    if now.ended:
        return Text().append(now.ended, HEAD)
    seconds = int(now.seconds)
    since = "" if not seconds else f"{seconds} s" if seconds < 60 else duration(seconds)
    sign = SPINNER[now.tick % len(SPINNER)]
    return Text().append(f"{sign} {now.stage:<10}", LIVE).append(f"{since:>5}", QUIET)


def _below(shown: Shown, seen: Seen, now: Now, width: int, level: _Level) -> list[list[Text]]:
    """The policy and the times, side by side where there is room."""
    if width < WIDE:
        return [_policy(shown, seen, width, level), _times(seen, now, width, level)]
    half = width // 2 - 1
    left = _policy(shown, seen, half, level)
    right = _times(seen, now, width - half - 1, level)
    both: list[Text] = []
    for i in range(max(len(left), len(right))):
        line = left[i] if i < len(left) else Text()
        line.truncate(half, overflow="ellipsis", pad=True)
        both.append(line.append(" ").append(right[i] if i < len(right) else Text()))
    return [both]


def _policy(shown: Shown, seen: Seen, width: int, level: _Level) -> list[Text]:
    facts = policy_facts(shown, seen, width - 15)[: level.policy]
    found = [Text("   ").append(f"{name:<12}").append(value) for name, value in facts]
    return [Text().append(" policy", HEAD), *found] if facts else []


def _times(seen: Seen, now: Now, width: int, level: _Level) -> list[Text]:
    """Mean seconds and shares of the stages in the last iterations."""
    times = seen.times()
    total = sum(times.values())
    if not total or not level.stages:
        return []
    worth = [s for s in times if times[s] >= 0.005 * total or s == now.stage]
    kept = set(sorted(worth, key=lambda stage: -times[stage])[: level.stages])
    found = [Text().append(" time", HEAD).append(" per iteration", QUIET)]
    room = max(0, min(20, width - 31))
    for stage in (stage for stage in times if stage in kept):
        runs = stage == now.stage and not now.ended
        line = Text("   ").append(f"{stage:<11}", LIVE if runs else "")
        share = times[stage] / total
        line.append(f"{duration(times[stage]):>8} ").append(f"{percent(share):>6}  ", QUIET)
        found.append(line.append(meter(share, room)[0], LIVE))
    return found


def _foot(shown: Shown, seen: Seen, now: Now, width: int, level: _Level) -> list[Text]:
    """What comes next, what was lost, and what there is to worry about."""
    found: list[Text] = []
    if not now.ended and seen.iteration < shown.iterations:
        line = Text().append(" next ", QUIET).append(_next(shown, seen.iteration))
        found.append(line if line.cell_len <= width else line[5:])
    masked = seen.number("masked_leaves")
    lost = [f"{masked:.0f} of {masked + seen.number('leaves'):.0f} leaves without a score"]
    lost = lost if masked > 0.0 else []
    if seen.skipped:
        reason = f", now: {seen.reason}" if seen.reason else ""
        lost.insert(0, f"{seen.skipped} skipped{reason}")
    if lost:
        found.append(Text(" ").append(joined(lost, WARN)))
    for iteration, text in list(seen.warnings)[-2:] if level.warnings else []:
        cause, _, rest = text.partition(": ")
        said = wrapped(f"{cause} at {iteration}: {rest}", width - 3, level.warnings)
        first = Text().append(f" ! {cause}", WARN).append(said[0][len(cause) :])
        found += [first, *(Text(f"   {line}") for line in said[1:])]
    return found


def _next(shown: Shown, done: int) -> str:
    at = {"checkpoint": shown.checkpoint_every, "evaluation": shown.evaluate_every}
    due = {
        what: min((done // every + 1) * every, shown.iterations)
        for what, every in at.items()
        if every
    }
    if len(set(due.values())) == 1:
        return f"{' and '.join(due)} at {due['checkpoint']}"
    return ", ".join(f"{what} at {iteration}" for what, iteration in due.items())
