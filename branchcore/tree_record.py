"""The tree of an iteration's first prompt as a small JSON file: its shape, rewards, advantages.

Letters: M nodes = edges, L leaves, R rewards. Row i is node i and the edge into it, as in `plan`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchcore.credit import Floats
from branchcore.rewards import component_weights
from branchcore.run_records import TREES, write_record
from branchcore.stages import Batch


class TreeRecord:
    """Keeps the first prompt's tree of an iteration that asks for it, and writes it.

    Args:
        reward_weights: per component, for the total of a leaf.
    """

    def __init__(self, reward_weights: Mapping[str, float] | None) -> None:
        self._weights = reward_weights
        self._wanted = False
        self._seen: dict[str, Any] | None = None

    def expect(self, wanted: bool) -> None:
        """Says whether the iteration that begins is to be kept; forgets the one before."""
        self._wanted, self._seen = wanted, None

    def see(self, batch: Batch, prompts: Sequence[str]) -> None:
        """Takes the first prompt of an iteration's first batch; costs nothing if none is wanted.

        Args:
            batch: credited and weighed for the first update.
            prompts: (P,) its texts.
        """
        if self._wanted and self._seen is None and len(prompts):
            self._seen = tree_of(batch, str(prompts[0]), self._weights)

    def write(self, run: Path, iteration: int) -> None:
        """Writes `trees/<iteration>.json` if a tree was kept."""
        if self._seen is not None:
            text = json.dumps({"iteration": iteration, **self._seen})
            write_record(run, TREES, f"{iteration:06d}.json", text.encode())
            self._seen = None


def tree_of(
    batch: Batch, prompt: str, reward_weights: Mapping[str, float] | None
) -> dict[str, Any]:
    """Returns the tree of a batch's first prompt, ready for JSON.

    Args:
        batch: credited and weighed.
        prompt: its text.
        reward_weights: per component; None = 1 each.

    Returns:
        `prompt`, `components`, `reward_weights` (R,); of every node `parent` (-1 = root), `sigma`,
        `stochastic`, `train`, `advantage` (A+ - A-, what the objective sees), `pruned` (trained by
        the first update but for a weight of 0) and `stopped`; `leaves`, node numbers, and `rewards`
        (L, R) of them, null where there is none.
    """
    plan, scores = batch.forest.plan, batch.scores
    rows = np.flatnonzero(plan.prompt == 0)
    tree = plan.select([0])
    leaf_of = np.flatnonzero(plan.prompt[plan.leaf] == 0)
    advantage = batch.credit.advantage[rows]
    first = tree.train & (tree.update == 0)
    alive = np.asarray(batch.forest.alive)[rows]
    weights = component_weights(scores.names, reward_weights)
    return {
        "prompt": prompt,
        "components": list(scores.names),
        "reward_weights": _rounded(weights),
        "parent": tree.parent.tolist(),
        "sigma": _rounded(tree.sigma),
        "stochastic": tree.stochastic.tolist(),
        "train": tree.train.tolist(),
        "advantage": _rounded(advantage[:, 0] - advantage[:, 1]),
        "pruned": (first & alive & (batch.weight[rows] == 0.0)).tolist(),
        "stopped": (~alive).tolist(),
        "leaves": np.flatnonzero(tree.leaf).tolist(),
        "rewards": [_rounded(row) for row in scores.values[leaf_of]],
    }


def _rounded(values: Floats) -> list[float | None]:
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in values.tolist()]
