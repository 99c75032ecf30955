"""The engine for online RL of flow-matching image and video models with branching rollouts.

A recipe makes a `Plan`, the trees of all prompts as one table; `rollout` grows it to a `Forest`;
`score` asks the reward about its leaves; `recipe.credit` makes edge advantages of the scores and
`recipe.prune` edge weights; `gradient` takes the policy gradient, with one forward and backward per
parent. This is one iteration, with a policy of one linear layer:

```python
import numpy as np
import torch

import branchcore as bc


class Policy:
    latent_shape = (3, 4, 4)

    def __init__(self):
        self.module = torch.nn.Linear(48, 48)

    # (N, *latent_shape), (N,) noise levels, (N,) indices of prompts
    def velocity(self, x, sigma, prompt):
        return self.module(x.flatten(1)).view_as(x)


def reward(images, texts):
    return {"bright": images.mean(1)}


policy, prompts = Policy(), ["a red house", "a blue cat"]
uids = [0, 1]  # the prompts' places in the data: noise depends on them
recipe = bc.recipes.build("branch_mix", bc.schedule.shifted_linear(10, 3))
plan = recipe.plan(uids, seed=0, iteration=0)
forest = bc.rollout(plan, policy, uids, seed=0, iteration=0, tape=99)
texts = [prompts[i] for i in plan.prompt[plan.leaf]]
scores = bc.score(reward, forest.leaves, texts)
log_prob = forest.log_prob.double().numpy()
credit = recipe.credit(plan, scores.values, np.ones(1), log_prob)
weight = recipe.prune(plan, credit.value, 0)
bc.gradient(forest, policy, credit.advantage, weight, recipe.objective)
print(bc.draw(plan), policy.module.weight.grad.norm())
```

`Trainer` does this for a whole run, with rounds, evaluation, checkpoints and a log.

Where to go:

* `branchcore.recipes`: the published methods by name, and how they are built of `branchcore.tree`,
  `branchcore.steps`, `branchcore.credit` and `branchcore.objective`.
* `branchcore.models`: SD3, FLUX, Qwen-Image, Wan and SANA from a diffusers folder, their LoRA or
  full weights (`branchcore.models.weights`), what makes them faster (`branchcore.models.runtime`,
  `accelerate`), and the small digits model that ships with the package
  (`branchcore.models.digits`).
* `branchcore.rewards`: scorers by name, several as one, in a subprocess or behind a URL.
* `branchcore.trainer`, `branchcore.trainer_config`: a run and its settings;
  `branchcore.distributed`, `branchcore.parallel`: on many processes; `branchcore.callbacks`: shown
  in TensorBoard or W&B; `branchcore.checkpoint`: what is kept of it.
* `branchcore.hosts`, `branchcore.updates`: inside a trainer that exists, from one swapped step to
  whole iterations; `branchcore.stages`, `branchcore.gradient`: the stages alone.
* `branchcore.pruning_config`, `branchcore.unbiased`, `branchcore.prune`, `branchcore.stopping`:
  what the backward and the rollout can leave out.
* `branchcore.ops`: what the engine computes, with compiled kernels; `branchcore.reference`: the
  same in plain torch, which is the specification.

Shapes stand in round brackets, with the letters that a module's first lines explain; a name such as
`v_ND` ends in its shape. `(N, D) fp32` is a tensor of N rows of D numbers in float32.
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
