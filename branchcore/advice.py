"""Warnings that name a cause: what the rows of a run show, what it likely means, what to try."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from branchcore.metrics import ZERO_STD
from branchcore.objective import ClippedRatio, Objective

Row = Mapping[str, Any]
Found = Iterator[tuple[str, str]]
"""Causes and the texts that name them."""

QUIET = 20
"""Iterations that a cause must be away before it is warned of again."""
IN_A_ROW = 5
"""Iterations that a share or a spread must stay where it is to mean something."""
POINTS, APART = 10, 20
"""Evaluations of a trend; without evaluations there is a point every so many iterations."""
STEEP = 2.896
"""t of a slope over 10 points, 8 degrees of freedom, that chance exceeds once in a hundred."""
FALL = 0.1
"""Share of its mean by which diversity must fall over them."""
SPIKE, KNOWN, REMEMBERED = 10.0, 10, 50
"""Medians above which a norm is a spike; norms of which the median is taken, at least and at most.
"""
FAR, FAR_AT_MOST = 10.0, 0.5
"""Mean |ratio - 1|, in clip ranges and at most, beyond which old samples say little."""
SATURATED = 0.05
"""Share of its first spread under which a reward that has risen tells leaves apart no more."""
MASKED = 0.01
"""Share of leaves that may go without a score."""


def clip_of(objective: Objective) -> float | None:
    """Returns the smaller distance of an objective's clip range, None where no ratio is clipped."""
    clip = min(objective.clip) if isinstance(objective, ClippedRatio) else math.inf
    return clip if clip < math.inf else None


class Advice:
    """Sees every row of a run and returns what is new to warn of.

    A cause is warned of once, and again only after it was away for 20 iterations. The state is a
    function of the rows: a resumed run first shows it those that are in metrics.jsonl.

    Args:
        clip: of `clip_of`; a row's own `clip` goes before.
    """

    def __init__(self, clip: float | None = None) -> None:
        self.clip = clip
        self._rows: deque[Row] = deque(maxlen=REMEMBERED + 1)
        self._first: list[Row] = []
        self._seen = 0
        self._evaluations = _Evaluations()
        self._away: dict[str, int] = {}

    def __call__(self, row: Row) -> list[str]:
        """Returns the new warnings of a row; rows of evaluations alone are shown too."""
        self._evaluations.add(row)
        if "reward" not in row:
            return []
        self._rows.append(row)
        self._seen += 1
        if self._seen <= IN_A_ROW:
            self._first.append(row)
        found = dict(self._causes(row))
        new = [text for cause, text in found.items() if self._away.get(cause, QUIET) >= QUIET]
        away = {cause: passed + 1 for cause, passed in self._away.items()}
        self._away = {**away, **dict.fromkeys(found, 0)}
        return new

    def warn(self, row: Row) -> dict[str, Any]:
        """Warns of what is new and returns the row, with these texts as `warnings` if there are."""
        new = self(row)
        for text in new:
            warnings.warn(text, stacklevel=2)
        return {**row, **({"warnings": new} if new else {})}

    def replay(self, rows: Iterable[Row]) -> None:
        """Sees the rows that a resumed run kept; what was said of them is not said again."""
        for row in rows:
            self(row)

    def _causes(self, row: Row) -> Found:
        rows = list(self._rows)
        last = rows[-IN_A_ROW:]
        clip = row.get("clip", self.clip)
        yield from _noise_floor(row, clip)
        yield from _clip_share(row, clip)
        yield from _ratio(row, clip)
        yield from _masked(row)
        yield from _spike(rows)
        if self._seen >= IN_A_ROW:
            yield from _zero_std(last)
        if self._seen >= 2 * IN_A_ROW:
            yield from _saturated(self._first, last)
        yield from self._evaluations.collapse()


def _number(row: Row, name: str) -> float:
    """Returns a metric, NaN if the row does not have it: every comparison is then false."""
    return float(row.get(name, math.nan))


def _noise_floor(row: Row, clip: float | None) -> Found:
    floor = _number(row, "noise_floor")
    if clip is not None and floor > clip:
        yield (
            "noise_floor",
            "noise_floor: the clip range must exceed the noise floor of the log ratio, got clip "
            f"{clip:g} below {floor:.1e} (unchanged weights at another batch shape); try a larger "
            "clip, clip_floor=2 or updates=1",
        )


def _clip_share(row: Row, clip: float | None) -> Found:
    share = _number(row, "clip_share")
    if share > 0.5:
        around = "" if clip is None else f" for a clip range of {clip:g}"
        yield (
            "clip_share",
            f"clip_share: must be below half of the trained edges, got {share:.2f} (steps are too "
            f"long{around}; clipped edges have no gradient); try a smaller lr, fewer updates or a "
            "larger clip",
        )


def _ratio(row: Row, clip: float | None) -> Found:
    mean = _number(row, "ratio_dev_mean")
    limit = FAR_AT_MOST if clip is None else min(FAR * clip, FAR_AT_MOST)
    if mean > limit:
        yield (
            "ratio",
            f"ratio_dev_mean: |ratio - 1| must be below {limit:g} on average, got {mean:.2g} (the "
            "policy is far from the one that sampled); try a smaller lr, fewer updates or "
            "fast_steps",
        )


def _masked(row: Row) -> Found:
    masked = _number(row, "masked_leaves")
    every = masked + _number(row, "leaves")
    if masked > MASKED * every:
        yield (
            "masked",
            f"masked_leaves: must be at most {MASKED:.0%} of the leaves, got {masked:.0f} of "
            f"{every:.0f} (the reward fails on some images, and what it fails on is not random); "
            "try its log, more attempts or a longer time-out",
        )


def _spike(rows: Sequence[Row]) -> Found:
    norms = [norm for row in rows[:-1] if math.isfinite(norm := _number(row, "grad_norm"))]
    now = _number(rows[-1], "grad_norm")
    if len(norms) >= KNOWN and now > SPIKE * median(norms) > 0.0:
        yield (
            "grad_norm",
            f"grad_norm: must be below {SPIKE:g} times its median, got {now:.3g} after a median of "
            f"{median(norms):.3g} over {len(norms)} iterations (an outlier among the rewards, or a "
            "policy that is breaking up); try a smaller max_grad_norm or lr",
        )


def _components(row: Row) -> list[str]:
    return [name.removeprefix("reward_std/") for name in row if name.startswith("reward_std/")]


def _zero_std(last: Sequence[Row]) -> Found:
    if not all(_number(row, "zero_std_share") > 0.5 for row in last):
        return
    dead = [
        name
        for name in _components(last[-1])
        if all(_number(row, f"reward_std/{name}") < ZERO_STD for row in last)
    ]
    names = " and ".join(f"reward/{name}" for name in dead)
    same = f"{names}: the same score for all leaves of a prompt"
    cause = same if dead else "prompts that are too easy or too hard"
    fix = "a reward with more levels, or weight 0 for it" if dead else "other prompts"
    share = _number(last[-1], "zero_std_share")
    yield (
        "zero_std",
        f"zero_std_share: must be below half of the (prompt, reward) groups, got {share:.2f} after "
        f"{len(last)} iterations above it ({cause}); try {fix}, more leaves per prompt or more "
        "noise",
    )


def _saturated(first: Sequence[Row], last: Sequence[Row]) -> Found:
    for name in _components(last[-1]):
        spread, mean = f"reward_std/{name}", f"reward/{name}"
        before = fmean(_number(row, spread) for row in first)
        most = max(_number(row, spread) for row in last)
        was, is_now = (fmean(_number(row, mean) for row in rows) for rows in (first, last))
        if before > ZERO_STD and most < SATURATED * before and is_now > was:
            yield (
                f"saturated/{name}",
                f"{mean}: the spread within a prompt must tell leaves apart, got {most:.2g} after "
                f"{before:.2g} at first, while the mean rose from {was:.3g} to {is_now:.3g} "
                "(saturated: there is no more to learn from it); try a smaller weight for it, a "
                "finer reward, or end here",
            )


class _Point(NamedTuple):
    """One evaluation, or the mean of some iterations."""

    iteration: float
    reward: float
    spread: Mapping[str, float]
    """Diversity by name: the evaluation's, or the std of every reward within a prompt."""


class _Evaluations:
    """The last evaluations of a run, and whether the reward rises while diversity falls."""

    def __init__(self) -> None:
        self._points: deque[_Point] = deque(maxlen=POINTS)
        self._since: list[Row] = []
        self._evaluates = False

    def add(self, row: Row) -> None:
        """Takes a row; an evaluation, or many rows without one, make a point."""
        evaluated = any(name.startswith("eval/") for name in row)
        self._evaluates |= evaluated
        self._since += [row] if "reward" in row else []
        if not evaluated and (self._evaluates or len(self._since) < APART):
            return
        reward = _number(row, "eval/reward")
        if "eval/reward" not in row and self._since:
            reward = fmean(_number(r, "reward") for r in self._since)
        spread = {"eval/diversity": _number(row, "eval/diversity")}
        if "eval/diversity" not in row:
            names = [f"reward_std/{name}" for name in _components(row)]
            spread = {name: fmean(_number(r, name) for r in self._since) for name in names}
        self._since = []
        if math.isfinite(reward) and spread and all(map(math.isfinite, spread.values())):
            self._points.append(_Point(_number(row, "iteration"), reward, spread))

    def collapse(self) -> Found:
        """Yields if the reward rises and diversity falls, by more than chance."""
        points = list(self._points)
        if len(points) < POINTS or len({frozenset(point.spread) for point in points}) > 1:
            return
        means = {name: fmean(p.spread[name] for p in points) for name in points[-1].spread}
        live = {name: mean for name, mean in means.items() if mean > 0.0}
        if not live:
            return
        at, rewards = [p.iteration for p in points], [p.reward for p in points]
        spread = [fmean(p.spread[name] / mean for name, mean in live.items()) for p in points]
        (_, up), (fall, down) = _trend(at, rewards), _trend(at, spread)
        if not (up > STEEP and down < -STEEP and fall < -FALL):
            return
        held_out = "eval/diversity" in live
        what = "eval/diversity" if held_out else "the spread of rewards within a prompt"
        yield (
            "diversity",
            f"reward: diversity must not fall while the reward rises, got {what} from "
            f"{spread[0]:.2f} to {spread[-1]:.2f} of its mean and the reward from {rewards[0]:.3g} "
            f"to {rewards[-1]:.3g} over {len(points)} points (the policy narrows to what the "
            "reward likes, its loopholes too); try a look at samples, a larger kl, a smaller lr or "
            "another reward beside it",
        )


def _trend(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns by how much a least-squares line changes, and its slope's t; 0 if y does not."""
    x_mean, y_mean = fmean(x), fmean(y)
    xx = sum((a - x_mean) ** 2 for a in x)
    yy = sum((b - y_mean) ** 2 for b in y)
    if yy <= len(y) * (1e-9 * max(map(abs, y))) ** 2:
        return 0.0, 0.0
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / xx
    rest = max(yy - slope**2 * xx, 1e-18 * yy)
    return slope * (x[-1] - x[0]), slope / math.sqrt(rest / (len(x) - 2) / xx)
