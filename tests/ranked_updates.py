"""An iteration inside a trainer on several processes, as `test_updates` starts it."""

import torch
from conftest import ToyModel

from branchcore import recipes, schedule
from branchcore.updates import updates


def gradient(ranks, uids, broken=None):
    """Returns the gradient and metrics of this process's share of some prompts."""

    def reward(images, prompts):
        if ranks is not None and ranks.rank == broken:
            raise OSError("no scorer")
        return {"mean": images.mean((1, 2))}

    mine = uids if ranks is None else ranks.share(uids)
    recipe = recipes.flow_grpo(schedule.shifted_linear(4, 3.0), group=3, kl=0.1)
    model = ToyModel(torch.float64)
    (metrics,) = updates(
        model, recipe, ["abcd"[u] for u in mine], reward, iteration=2, uids=list(mine)
    )
    names = ("reward", "loss", "kl", "edges", "leaves")
    return model.gradient(), {name: metrics[name] for name in names}
