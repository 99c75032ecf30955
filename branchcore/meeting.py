"""Where the processes of one start meet in a store that earlier starts have used too.

torchrun keeps its store when it starts processes again (`--max-restarts`), with the addresses of
the dead ones in it: gloo would call those. Its count of restarts differs between machines.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

_POLL_S = 0.05


def meet(store: Any, rank: int, world_size: int, timeout_s: float) -> str:
    """Returns a prefix of the store that only the processes of this start have.

    Rank 0 opens a new place; the others come to the newest one, and know that it is not an old one
    when they find there what they have just brought.

    Args:
        store: of `torch.distributed`, reachable for all.
        rank: of this process.
        world_size: processes that must come.
        timeout_s: seconds to wait for them.

    Raises:
        TimeoutError: not all came; names the first missing rank, where that is known.
    """
    end = time.monotonic() + timeout_s
    if rank == 0:
        place = f"start-{store.add('start', 1)}"
        for other in range(1, world_size):
            _wait(store, f"{place}/{other}", end, f"rank {other} did not come")
        names = [store.get(f"{place}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{place}/all", " ".join(names))
        return place
    mine = secrets.token_hex(8)
    while True:
        newest = store.add("start", 0)
        place = f"start-{newest}"
        store.set(f"{place}/{rank}", mine)
        while store.add("start", 0) == newest:
            if store.check([f"{place}/all"]) and mine in store.get(f"{place}/all").decode():
                return place
            _pause(end, "rank 0 did not come")


def _wait(store: Any, key: str, end: float, missing: str) -> None:
    while not store.check([key]):
        _pause(end, missing)


def _pause(end: float, missing: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(
            f"joined: all processes must start within --rank-timeout, but {missing}; "
            "try a longer one"
        )
    time.sleep(_POLL_S)
