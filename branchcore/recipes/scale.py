"""Options that give a method a wanted number of leaves: what compares methods at equal compute."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from branchcore.recipes.branching import scaled_splits


def prime_factors(number: int) -> tuple[int, ...]:
    """Returns the prime factors in ascending order: 12 = 2 2 3, 24 = 2 2 2 3, 81 = 3 3 3 3."""
    factors: list[int] = []
    while number > 1:
        factor = next(f for f in range(2, number + 1) if number % f == 0)
        factors.append(factor)
        number //= factor
    return tuple(factors)


def _few(factors: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Returns at most `most` numbers of the same product: the smallest are multiplied."""
    found = sorted(factors)
    while len(found) > max(most, 1):
        found = sorted([found[0] * found[1], *found[2:]])
    return tuple(found)


def leaf_options(options: Collection[str], leaves: int, steps: int) -> dict[str, Any]:
    """Returns options of a recipe for `leaves` leaves per prompt (per branching step on a trunk).

    Chains get a group of that size, trees its prime factors (the first as roots where a method has
    several; products of them where there are too few steps), split as "dense" scales to `steps`,
    trunks the children nearest to 6 that divide it.

    Args:
        options: names of the recipe's options.
        leaves: at least 2.
        steps: T.

    Raises:
        ValueError: too few leaves, or a recipe whose size no option of these names sets.
    """
    if leaves < 2:
        raise ValueError(f"leaf_options: leaves must be at least 2, got {leaves}")
    factors = prime_factors(leaves)
    if "group" in options:
        return {"group": leaves}
    if "branching" in options:
        several: dict[str, int] = {}
        if "roots" in options:
            several["roots"] = factors[0] if len(factors) > 1 else 1
            factors = factors[1:] or factors
        factors = _few(factors, steps - 1)  # the last step has no noise
        splits = {"splits": scaled_splits("dense", steps, len(factors))}
        return {**several, "branching": factors, **(splits if "splits" in options else {})}
    if "trunks" in options and "children" in options:
        divisors = [d for d in range(2, leaves + 1) if leaves % d == 0]
        children = min(divisors, key=lambda d: abs(d - 6))
        return {"trunks": leaves // children, "children": children}
    raise ValueError(
        f"leaf_options: options must have 'group', 'branching' or 'trunks', got {sorted(options)}"
    )
