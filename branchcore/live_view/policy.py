"""What the policy does: its ratio against the clip range and the noise floor, gradient, spread."""

from __future__ import annotations

import math

from rich.text import Text

from branchcore.live_view.seen import Seen
from branchcore.live_view.style import LIVE, QUIET, WARN
from branchcore.live_view.text import number, percent, sparkline, tiny
from branchcore.progress import Shown

Fact = tuple[str, Text]
"""A name and what is to be said of it."""
_CURVE = 20
"""Columns of a curve at most."""


def policy_facts(shown: Shown, seen: Seen, width: int) -> list[Fact]:
    """Returns what the last iteration and the last evaluation tell, the most important first.

    Args:
        shown: what is known of the run.
        seen: its rows.
        width: columns for a fact.
    """
    if not seen.row:
        return []
    found = _ratio(shown, seen)
    norm = seen.number("grad_norm")
    if not math.isnan(norm):
        found.append(("gradient", _with_curve(norm, seen.curve("grad_norm"), width)))
    share = seen.number("zero_std_share")
    if not math.isnan(share):
        alike = Text().append(percent(share), WARN if share > 0.5 else "")
        alike.append(" of groups", QUIET)
        found.append(("zero std", alike))
    diversity = seen.held_out("diversity")
    if not math.isnan(diversity):
        curve = seen.curve("eval/diversity")
        found.append(("diversity", _with_curve(diversity, curve if curve[1:] else [], width)))
    if seen.number("kl") > 0.0:
        found.append(("KL loss", Text(tiny(seen.number("kl")))))
    return found


def _with_curve(value: float, curve: list[float], width: int) -> Text:
    room = max(0, min(_CURVE, width - 9))
    return Text(f"{number(value):<9}").append(sparkline(curve, room), LIVE)


def _ratio(shown: Shown, seen: Seen) -> list[Fact]:
    """What the ratio does, if there is one."""
    mean, most = seen.number("ratio_dev_mean"), seen.number("ratio_dev_max")
    floor, clip = seen.number("noise_floor"), seen.number("clip")
    clip = clip if shown.clip is None or not math.isnan(clip) else shown.clip
    if math.isnan(most) or (math.isnan(clip) and most == 0.0):
        return []
    if most == 0.0 and math.isnan(floor):
        return [("ratio", Text("exactly 1, on policy"))]
    found = [("ratio - 1", Text(f"{tiny(mean)}, max {tiny(most)}"))]
    if not math.isnan(clip):
        found += [("clipped", _clipped(seen))]
    limits = Text("" if math.isnan(clip) else tiny(clip))
    if not math.isnan(floor):
        between = ", " if limits else ""
        limits.append(f"{between}floor {tiny(floor)}", WARN if floor > clip else QUIET)
    return (
        [*found, ("clip range" if not math.isnan(clip) else "noise", limits)] if limits else found
    )


def _clipped(seen: Seen) -> Text:
    share, noise = seen.number("clip_share"), seen.number("clip_noise_share")
    clipped = Text().append(percent(share), WARN if share > 0.5 else "")
    if share > 0.0 and not math.isnan(noise):
        clipped.append(f", {percent(noise)} of it noise", WARN if noise > 0.5 else QUIET)
    return clipped
