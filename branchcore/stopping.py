"""Stopping branches inside the rollout: previews, keep probabilities, coins, weights of leaves.

At a checkpoint every branch shows x0 = x - sigma v, the Euler edge to sigma 0 with the velocity it
has just got; previews are decoded, scored by the run's reward and standardised per prompt (one that
could not be scored counts as an average one). A branch
of c leaves and score z that got here with probability q goes on with the p of the least added
variance, sum (1/p - 1) (c z / q)^2, for a share 1 - rate of the leaves; what stops is not grown,
decoded or scored. Leaves weigh 1 / product of p.

Sums over leaves keep their mean, whatever the previews say, and so does the gradient of fixed
advantages. Means and stds of rewards are ratios of such sums: credit is consistent, its bias falls
with the number of a prompt's branches, but not unbiased. Letters: M rows, N nodes, D elements.
Source: derived here; Pro-GRPO, arXiv 2512.15347, has the preview, and keeps without weights the
subset of the largest variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from branchcore.clock import Clock, untimed
from branchcore.credit import Floats, standardize
from branchcore.forest import Stop, stoppable
from branchcore.leaf_weights import without
from branchcore.model import Model, decoded
from branchcore.noise import STOPPING_LANE
from branchcore.plan import Ints, Plan
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.recipe import Recipe
from branchcore.rewards import OneAtATime, Reward, component_weights, score
from branchcore.trainer_config import TrainerConfig
from branchcore.unbiased import bernoulli, node_coins, optimal_probability

_RANKED = ("parent_top1", "extremes")
"""Pruners of recipes that rank branches: a stopped one has no rank."""


class Stopping:
    """Stops branches of a run.

    Args:
        config: with `stop` and `stop_rate`.
        recipe: the method.
        reward: of leaves and of their previews.
        seed: of the run.
        reward_weights: per component; None = 1 each.

    Raises:
        ValueError: the recipe's terms need all branches, or its trees have too few to stop any.
    """

    def __init__(
        self,
        config: PruningConfig,
        recipe: Recipe,
        reward: Reward,
        *,
        seed: int,
        reward_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.config, self.reward, self.seed = config, reward, seed
        self.reward_weights = reward_weights
        check_recipe(config, recipe)
        check_branches(config, recipe.plan([0], seed=seed, iteration=0))

    def previews(
        self,
        plan: Plan,
        model: Model,
        prompts: Sequence[str],
        uids: Sequence[int],
        iteration: int,
        max_batch: int | None = None,
        clock: Clock = untimed,
    ) -> Previews:
        """Returns the checkpoints of one rollout.

        Args:
            plan: the trees.
            model: decodes previews.
            prompts: (P,) texts.
            uids: (P,) global sample positions.
            iteration: of the run.
            max_batch: previews per decode; None = all at once.
            clock: times the stages decode and reward.

        Raises:
            ValueError: a prompt has too few branches, or none, at a checkpoint.
        """
        check_branches(self.config, plan)
        return Previews(self, plan, model, prompts, uids, iteration, max_batch, clock)


class Previews:
    """The checkpoints of one rollout, and with what probability its branches passed them."""

    def __init__(
        self,
        run: Stopping,
        plan: Plan,
        model: Model,
        prompts: Sequence[str],
        uids: Sequence[int],
        iteration: int,
        max_batch: int | None,
        clock: Clock,
    ) -> None:
        self.run, self.plan, self.model = run, plan, model
        self.prompts, self.uids, self.iteration = prompts, uids, iteration
        self.max_batch, self.clock = max_batch, clock
        self.probability = np.ones(len(plan))
        self.components: tuple[str, ...] = ()

    @property
    def stop(self) -> Stop:
        """What `rollout` takes."""
        return Stop(self.run.config.stop, self.choose)

    def choose(self, depth: int, nodes: Ints, x0: Tensor) -> NDArray[np.bool_]:
        """Returns (N,) which branches go on.

        Args:
            depth: of the checkpoint.
            nodes: (N,) rows.
            x0: (N, D) their previews.

        Raises:
            RuntimeError, ValueError, TypeError: the reward failed.
        """
        del depth
        run, plan = self.run, self.plan
        texts = [str(self.prompts[int(i)]) for i in plan.prompt[nodes]]
        with self.clock("decode"):
            images = decoded(self.model, x0, self.max_batch)
        with self.clock("reward"):
            scores = score(run.reward, images, texts)
        self.components = scores.names
        weights = component_weights(scores.names, run.reward_weights)
        known = without(None, scores.masked)
        owner = plan.prompt[nodes].astype(np.int64)
        size = np.abs(standardize(scores.values, owner, ddof=0, weight_n=known) @ weights)
        if scores.masked is not None:
            size[scores.masked] = size[~scores.masked].mean()
        p = self._probability(nodes, size)
        where = {"seed": run.seed, "iteration": self.iteration, "lane": STOPPING_LANE}
        kept = bernoulli(p, node_coins(plan, nodes, self.uids, **where))
        self.probability[nodes] = p
        return kept.weight > 0.0

    def _probability(self, nodes: Ints, size: Floats) -> Floats:
        """(N,) keep probabilities, prompt by prompt: the same on any number of ranks."""
        plan, config = self.plan, self.run.config
        cost, p = plan.leaves_below[nodes].astype(np.float64), np.ones(len(nodes))
        norm = size * cost / self.reach()[nodes]
        for prompt in np.unique(plan.prompt[nodes]):
            mine, share = plan.prompt[nodes] == prompt, 1.0 - config.stop_rate
            p[mine] = optimal_probability(norm[mine], cost[mine], share, config.floor)
        return p

    def reach(self) -> Floats:
        """Returns (M,) the product of the probabilities at and above every node."""
        plan, reach = self.plan, self.probability.copy()
        for lo, hi in plan.levels()[1:]:
            reach[lo:hi] *= reach[plan.parent[lo:hi]]
        return reach

    def leaf_weight(self, alive: NDArray[np.bool_]) -> Floats:
        """Returns (L,) 1 / reach of the leaves that were grown, 0 of the others.

        Args:
            alive: (M,) of the forest.
        """
        return np.where(alive, 1.0 / self.reach(), 0.0)[self.plan.leaf]


def check_recipe(config: PruningConfig, recipe: Recipe) -> None:
    """Raises ValueError if terms of a recipe need all branches."""
    if recipe.objective.together:
        raise ValueError(
            f"Stopping: stop must be () with {recipe.name}, whose loss is no sum over images: it "
            f"couples those of equal {' and '.join(recipe.objective.together)}, got {config.stop}"
        )
    best, size = recipe.options.get("best_of"), recipe.options.get("group")
    ranked = {"best_of": best} if best not in (None, size) else {}
    pruner = recipe.options.get("pruning")
    ranked |= {"pruning": pruner} if pruner in _RANKED else {}
    for name, value in ranked.items():
        raise ValueError(
            f"Stopping: stop must be () with {name}={value!r} of {recipe.name}, which ranks all "
            f"branches, got {config.stop}"
        )


def check_branches(config: PruningConfig, plan: Plan) -> None:
    """Raises ValueError unless a branch of every prompt passes each checkpoint on average."""
    share = 1.0
    for depth in config.stop:
        share *= 1.0 - config.stop_rate
        count = np.bincount(plan.prompt[stoppable(plan, depth)])
        fewest = int(count[count > 0].min())
        if share * fewest < 1.0:
            raise ValueError(
                f"Stopping: stop_rate must leave one of a prompt's {fewest} branches at depth "
                f"{depth} on average, got {config.stop_rate}; try a later depth"
            )


def stopping_of(
    config: TrainerConfig, recipe: Recipe, reward: Reward
) -> tuple[Reward, Stopping | None]:
    """Returns what a run calls to score leaves, and its stopping if there is any.

    Where rewards overlap with the next rollout, its previews wait for them.

    Raises:
        ValueError: see `Stopping`.
    """
    if not config.prune.stop:
        return reward, None
    reward = OneAtATime(reward) if config.overlap_rewards else reward
    weights = config.reward_weights
    return reward, Stopping(config.prune, recipe, reward, seed=config.seed, reward_weights=weights)
