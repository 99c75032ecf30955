"""branchcore: online RL of flow-matching models with branching rollouts.

The way of the data: a recipe makes a `Plan`; `rollout` grows it to a `Forest`; `score` its leaves;
`recipe.credit` makes edge advantages, `recipe.prune` edge weights; `gradient` takes the backward.
"""

import os as _os
import pkgutil as _pkgutil

# A source checkout has kernels/ beside the package, and its compiled _C may live in an installed
# copy: join both, so that `python -m pytest` in the repository root works after `pip install .`.
_here = _os.path.dirname(_os.path.abspath(__file__))
_root = _os.path.dirname(_here)
if (
    not _os.path.isdir(_os.path.join(_here, "kernels"))
    and _os.path.isdir(_os.path.join(_root, "kernels"))
    and _os.path.isfile(_os.path.join(_root, "pyproject.toml"))
):
    if _root not in __path__:
        __path__.append(_root)
    __path__ = _pkgutil.extend_path(__path__, __name__)

from branchcore import (
    credit,
    leaf_weights,
    matching,
    ops,
    packing,
    passes,
    prune,
    recipes,
    schedule,
    steps,
    unbiased,
)
from branchcore._dispatch import explain, use
from branchcore.drawing import draw
from branchcore.forest import Forest, Stop
from branchcore.gradient import Statistics, gradient
from branchcore.guidance import RewardGuided
from branchcore.model import Model, VelocityModel
from branchcore.models.accelerate import accelerate
from branchcore.noise import Noise
from branchcore.objective import ClippedRatio, MaskedRatio, Objective
from branchcore.plan import Plan
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import Scores, score
from branchcore.rollout import rollout
from branchcore.stages import Batch, accumulate, collect
from branchcore.stopping import Stopping
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig
from branchcore.tree import Tree
from branchcore.updates import updates

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ClippedRatio",
    "Forest",
    "MaskedRatio",
    "Model",
    "Noise",
    "Objective",
    "Plan",
    "Pruning",
    "PruningConfig",
    "Recipe",
    "RewardGuided",
    "Scores",
    "Statistics",
    "Stop",
    "Stopping",
    "Trainer",
    "TrainerConfig",
    "Tree",
    "VelocityModel",
    "accelerate",
    "accumulate",
    "collect",
    "credit",
    "draw",
    "explain",
    "gradient",
    "leaf_weights",
    "matching",
    "ops",
    "packing",
    "passes",
    "prune",
    "recipes",
    "rollout",
    "schedule",
    "score",
    "steps",
    "unbiased",
    "updates",
    "use",
]
