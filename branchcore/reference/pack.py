"""Dense prompt packing in plain Python: the specification of `packing.pack`.

The oldest item opens a pack; then, as long as one of the W oldest fits, the longest of these joins.
Which items are the W oldest is looked up anew only when the oldest has left: so at most W - 1
younger items go before an item once it is the oldest. Looking after every item instead gives no
such bound: of [5, 9, 1, 1, 1, 1, 1] at capacity 10 and W = 2, all ones would go before the 9.

Source: DPPO (Dense Prompt Packing), which names a greedy choice in a window; the rest is ours.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, window: int) -> list[list[int]]:
    """Returns the items of every pack in the order in which they joined; ties go to the oldest."""
    queue = list(range(len(lengths)))
    packs: list[list[int]] = []
    while queue:
        packs.append([queue.pop(0)])
        room = capacity - lengths[packs[-1][0]]
        seen = queue[:window]
        while fitting := [item for item in seen if lengths[item] <= room]:
            longest = max(fitting, key=lengths.__getitem__)
            packs[-1].append(longest)
            room -= lengths[longest]
            was_oldest = longest == queue[0]
            queue.remove(longest)
            seen.remove(longest)
            if was_oldest:
                seen = queue[:window]
    return packs
