"""Numbers for people: ticks of an axis, values in text, durations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

MINUS, DASH = "\u2212", "\u2013"


class Axis(NamedTuple):
    """A linear or logarithmic axis."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Returns where a value lies, 0 at the low end, 1 at the high end."""
        if self.log:
            span = math.log(self.high / self.low)
            return math.log(max(value, self.low) / self.low) / span
        return (value - self.low) / (self.high - self.low)


def axis_of(values: Iterable[float], *, most: int = 4, zero: bool = False) -> Axis:
    """Returns an axis with round ticks around some finite values; flat ones get room.

    Args:
        values: at least one.
        most: intervals between ticks, about.
        zero: begin at 0 where no value is below.
    """
    found = list(values)
    low, high = min(found), max(found)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(high) / 10 or 1.0
        low, high = (low if zero and low == 0.0 else low - room), high + room
    step = _round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis_of(values: Iterable[float]) -> Axis:
    """Returns a logarithmic axis with at most about five powers of ten, of positive values."""
    found = list(values)
    first = math.floor(math.log10(min(found)) + 1e-9)
    last = max(math.ceil(math.log10(max(found)) - 1e-9), first + 1)
    stride = math.ceil((last - first) / 4)
    last = first + stride * math.ceil((last - first) / stride)
    ticks = tuple(10.0**i for i in range(first, last + 1, stride))
    return Axis(ticks[0], ticks[-1], ticks, log=True)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(s for s in (1.0, 2.0, 2.5, 5.0, 10.0) if rough <= s * power * (1 + 1e-9))


def number(value: float | None, digits: int = 3) -> str:
    """Returns a value in few digits, with a true minus; a dash for none."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    size = abs(value)
    if size >= 10 ** (digits + 3) or 0 < size < 1e-4:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            text = f"{value:.{digits + 3}f}".rstrip("0")
    return text.replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """Returns a difference with its sign."""
    return ("+" if value > 0 else "") + number(value, digits)


def tick(value: float) -> str:
    """Returns a tick's value in as little room as it takes."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS)
    return number(value)


def fixed(value: float, size: float) -> str:
    """Returns a value with as many decimals as differences of a size ask for."""
    decimals = max(0, min(6, 2 - math.floor(math.log10(size))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Returns a share in percent."""
    if value is None or not math.isfinite(value):
        return DASH
    if 0 < value < 5e-4:
        return "< 0.1 %"
    digits = 0 if abs(value) >= 0.1 or value == 0 else 1
    return f"{100 * value:.{digits}f} %".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Returns a time in one or two units."""
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, small, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= size:
            rest = (whole % size) // max(size // (24 if size == 86400 else 60), 1)
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
