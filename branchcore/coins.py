"""What fell in one pass over pruned parents, and the edge weights it makes. U units of one coin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore.credit import Floats
from branchcore.pruning_sums import Sums, sums_of
from branchcore.unbiased import Kept, Units


class Weights(NamedTuple):
    """Edge weights of one pass."""

    weight: Floats
    """(M,) the batch's times what the coins gave."""
    sums: Sums


class Coins(NamedTuple):
    """Coins of one pass and the units that they are about; arrays are (U,)."""

    units: Units
    kept: Kept
    norm2: Floats
    """Squared gradient norms that the rows predict."""
    live: NDArray[np.bool_]
    """The unit has a gradient."""
    paid: NDArray[np.bool_]
    """And is left by what drops edges before the coins: the recipe's pruner, a biased one."""

    def weights(self, weight_M: Floats) -> Weights:
        """Returns (M,) edge weights times those of the units, and what the pass sums up to."""
        weight, units = weight_M.copy(), self.units
        weight[units.edges] *= self.kept.weight[units.owner]
        return Weights(weight, sums_of(units, self.kept, self.norm2, self.live, self.paid))
