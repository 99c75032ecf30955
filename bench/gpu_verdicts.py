"""From timed rows to verdicts: which speed targets are met, missed, or were not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

MODEL_NORMALS_PER_S = 1.2e12
"""Issue-bound rate of Philox4x32-10 with approximate Box-Muller on 132 SMs at 1.98 GHz: a model,
23.5 instructions per normal at 85 % of the issue rate; a faster measured rate replaces it."""

Row = dict[str, Any]


class Verdict(NamedTuple):
    """A target, what was wanted, and what was found; `met` None = not measured."""

    target: str
    wanted: str
    got: str
    met: bool | None


class Ceilings(NamedTuple):
    """What no implementation exceeds."""

    copy_bytes_per_s: float | None
    """None if no copy was timed: nothing is then a share of it."""
    normals_per_s: float
    """Of the model, or of philox_normal where that was faster."""
    normals_measured: float | None
    """Fastest that philox_normal was in this run."""


def ceilings(copy_bytes_per_s: float | None, rows: Iterable[Row]) -> Ceilings:
    """Takes the model's rate of normals, or a faster one that philox_normal reached in this run."""
    ours = (row for row in rows if row["op"] == "philox_normal" and not row["baseline"])
    measured = max((row["normals"] / (1e-6 * row["us"]) for row in ours), default=None)
    return Ceilings(copy_bytes_per_s, max(MODEL_NORMALS_PER_S, measured or 0.0), measured)


def with_floors(row: Row, limits: Ceilings) -> Row:
    """Adds bandwidth and shares: of the copy, of the generator, and of the larger time's floor."""
    seconds = 1e-6 * row["us"]
    rate = limits.copy_bytes_per_s
    copy = None if rate is None else row["bytes"] / rate / seconds
    rng = row["normals"] / limits.normals_per_s / seconds
    return row | {
        "gb_per_s": 1e-9 * row["bytes"] / seconds,
        "share_of_copy": copy,
        "share_of_rng": rng if row["normals"] else None,
        "share_of_floor": None if copy is None else max(copy, rng),
        "floor_of": None if copy is None else "copy" if copy >= rng else "normals",
    }


def _case(row: Row) -> tuple[str, ...]:
    return row["op"], row["size"], row["label"], row["direction"]


def fastest(rows: Sequence[Row]) -> list[Row]:
    """Keeps our fastest implementation of every case; baselines are not ours."""
    best: dict[Any, Row] = {}
    for row in rows:
        key = _case(row)
        if not row["baseline"] and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return list(best.values())


def _share(
    target: str, rows: Sequence[Row], least: float, chosen: Callable[[Row], bool]
) -> Verdict:
    found = [row for row in rows if chosen(row) and row["share_of_floor"] is not None]
    wanted = f">= {100 * least:.0f} % of the floor"
    if not found:
        return Verdict(target, wanted, "not measured", None)
    worst = min(found, key=lambda row: row["share_of_floor"])
    got = f"{100 * worst['share_of_floor']:.0f} % of {worst['floor_of']}, {_named(worst)}"
    return Verdict(target, wanted, got, worst["share_of_floor"] >= least)


def _named(row: Row) -> str:
    how = "" if row["graphed"] else ", not captured"
    return f"{row['size']} {row['label']} ({row['implementation']}{how})"


def _is(op: str, size: str = "", direction: str = "", label: str = "") -> Callable[[Row], bool]:
    def chosen(row: Row) -> bool:
        return (
            row["op"] == op
            and row["size"].startswith(size)
            and row["direction"].startswith(direction)
            and label in row["label"]
        )

    return chosen


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Judges every target on the fastest implementation; each takes its worst case.

    Args:
        rows: of `with_floors`, with their ratio to torch.compile where it was timed.
    """
    ours = fastest(rows)
    found = [
        _share("branch_step, Wan 480p", ours, 0.85, _is("branch_step", "wan-480p")),
        _microseconds("branch_step, 512 px", ours, 6.0, _is("branch_step", "sd35-512")),
    ]
    for policy in ("off policy", "on policy"):
        chosen = _is("edge_dots+ratio_loss", "wan-480p", label=policy)
        found.append(_share(f"loss, {policy}, Wan 480p", ours, 0.75, chosen))
    for direction, least in (("forward", 0.9), ("backward", 0.8)):
        chosen = _is("gate_norm_modulate", direction=direction)
        found.append(_share(f"gate_norm_modulate, {direction}", ours, least, chosen))
    chosen = _is("group_norm_silu", direction="forward")
    found.append(_share("group_norm_silu, forward", ours, 0.8, chosen))
    ops = dict.fromkeys(row["op"] for row in ours)
    compiled = (row for row in rows if row["implementation"] == "compile")
    launched = {_case(row) for row in compiled if not row["graphed"]}
    return [*found, *(_faster_than_compiled(op, ours, launched) for op in ops)]


def _microseconds(
    target: str, rows: Sequence[Row], most: float, chosen: Callable[[Row], bool]
) -> Verdict:
    found = [row for row in rows if chosen(row)]
    if not found:
        return Verdict(target, f"<= {most:g} us", "not measured", None)
    worst = max(found, key=lambda row: row["us"])
    # launched one by one, a call of microseconds is timed with its launch
    met = worst["us"] <= most if all(row["graphed"] for row in found) else None
    return Verdict(target, f"<= {most:g} us", f"{worst['us']:.2f} us, {_named(worst)}", met)


def _faster_than_compiled(op: str, rows: Sequence[Row], launched: set[Any]) -> Verdict:
    target, wanted = f"{op}, against torch.compile", "> 1x in every case"
    found = [row for row in rows if row["op"] == op and row["ratio_to_compile"] is not None]
    if not found:
        return Verdict(target, wanted, "not measured", None)
    worst = min(found, key=lambda row: row["ratio_to_compile"])
    got = f"{worst['ratio_to_compile']:.2f}x, {worst['direction']}, {_named(worst)}"
    if _case(worst) in launched:
        got += ", torch.compile not captured"
    return Verdict(target, wanted, got, worst["ratio_to_compile"] > 1.0)
