"""Pruning of a run: which prompts are rolled out, and the edge weights of every pass.

Prompt coins fall before the rollout, from a history of scores; parent coins after credit, again for
every pass. The weights multiply: recipe's pruner, prompt, parent. Letters: M rows, U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore import unbiased
from branchcore.coins import Coins, Weights
from branchcore.credit import Floats
from branchcore.gradient import live_edges
from branchcore.noise import PRUNING, host_generator
from branchcore.packing import balanced_chunks
from branchcore.plan import Ints, Plan
from branchcore.pooled_spread import PooledSpread
from branchcore.prune import BIASED
from branchcore.pruning_config import PruningConfig
from branchcore.pruning_sums import Sums
from branchcore.recipes.recipe import Recipe
from branchcore.stages import Batch
from branchcore.unbiased import Kept, Units

_MEMORY = 0.5
"""Share of its past that a prompt's running score keeps."""


class Draw(NamedTuple):
    """The prompts of an iteration after their coins, in rounds."""

    indices: Ints
    """(P,) index in the data set of every uid, dropped or not."""
    weight: Mapping[int, float]
    """1 / (1 - P) of those rolled out, by uid, ascending."""
    rounds: list[tuple[int, ...]]
    """uids of every round."""
    plans: list[Plan]
    """Of the rounds."""
    planned: list[int]
    """(updates,) trained edges, those of dropped prompts included: the normalisers."""
    spared: int
    """Rollout forwards of dropped prompts."""


class Pruning:
    """Draws coins and keeps the history of prompts.

    Args:
        config: what is dropped; `PruningConfig()` drops nothing and changes no bit.
        recipe: the method.
        seed: of the run.

    Raises:
        ValueError: prompts are to be dropped, and the recipe has statistics over all of them that
            no earlier iteration can stand in for.
    """

    def __init__(self, config: PruningConfig, recipe: Recipe, seed: int) -> None:
        self.config, self.recipe, self.seed = config, recipe, seed
        self.history: dict[int, float] = {}
        self.spread = PooledSpread(recipe, config.prompts)
        """The std over all prompts that the credit takes, if it takes one."""

    def draw(self, indices: Ints, iteration: int, per_round: int | None = None) -> Draw:
        """Draws the prompts of an iteration and plans its rounds.

        Args:
            indices: (P,) index in the data set of every uid 0..P - 1.
            iteration: of the run.
            per_round: prompts of a round at most; None = all.
        """
        weight = self.prompt_weights(indices, iteration)
        uids = tuple(weight)
        rounds = [uids[lo:hi] for lo, hi in balanced_chunks(len(uids), per_round)]
        where = {"seed": self.seed, "iteration": iteration}
        plans = [self.recipe.plan(one, **where) for one in rounds]
        dropped = [uid for uid in range(len(indices)) if uid not in weight]
        without = [self.recipe.plan([uid], **where) for uid in dropped]
        updates = range(self.recipe.updates)
        planned = [sum(len(plan.trained(u)) for plan in plans + without) for u in updates]
        spared = sum(plan.counts().forwards for plan in without)
        return Draw(indices, weight, rounds, plans, planned, spared)

    def prompt_weights(self, indices: Ints, iteration: int) -> dict[int, float]:
        """Returns 1 / (1 - P) of the prompts that are rolled out, by uid.

        Those whose running score is below the mean of those that have one are dropped by chance;
        never all, since somebody is at the mean.

        Args:
            indices: (P,) index in the data set of every uid 0..P - 1.
            iteration: of the run.
        """
        known = [self.history[i] for i in indices.tolist() if i in self.history]
        bar = (1.0 - 1e-6) * float(np.mean(known)) if known else 0.0
        weight: dict[int, float] = {}
        for uid, index in enumerate(indices.tolist()):
            low = self.config.prompts > 0.0 and self.history.get(index, bar) < bar
            rate = self.config.prompts if low else 0.0
            if host_generator(self.seed, iteration, uid, PRUNING).random() >= rate:
                weight[uid] = 1.0 / (1.0 - rate)
        return weight

    def state(self) -> dict[str, Any]:
        """Returns what is remembered of prompts and of the spread, ready for JSON."""
        prompts = {str(index): score for index, score in self.history.items()}
        return {"prompts": prompts, "spread": self.spread.state()}

    def load(self, state: Mapping[str, Any], where: Path | str) -> None:
        """Takes a state back.

        Raises:
            ValueError: it is damaged; names `where`.
        """
        for index, score in state["prompts"].items():
            if not (index.isdecimal() and isinstance(score, float) and 0.0 <= score < math.inf):
                raise ValueError(
                    f"Pruning: {where} must hold a score >= 0 per prompt index, got "
                    f"{score!r} for {index!r}"
                )
        self.history = {int(index): float(score) for index, score in state["prompts"].items()}
        self.spread.load(state["spread"], where)

    def remember(self, indices: Ints, batches: Sequence[Batch]) -> None:
        """Updates the running mean |advantage| of the prompts that were rolled out."""
        for batch in batches if self.config.prompts else ():
            plan, edges = batch.forest.plan, batch.forest.plan.trained()
            size = batch.credit.advantage[edges].sum(1)
            total = np.bincount(plan.prompt[edges], size, plan.num_prompts)
            count = np.bincount(plan.prompt[edges], minlength=plan.num_prompts)
            for prompt, uid in enumerate(batch.uids):
                index, now = int(indices[uid]), float(total[prompt] / max(count[prompt], 1))
                old = self.history.get(index, now)
                self.history[index] = _MEMORY * old + (1.0 - _MEMORY) * now

    def weigh(self, batch: Batch, prompt_weight: Mapping[int, float]) -> Batch:
        """Returns a batch with the weights of its prompts and of a biased pruner multiplied in."""
        plan, weight = batch.forest.plan, batch.weight
        of_prompt = np.array([prompt_weight[uid] for uid in batch.uids])
        if self.config.rule in BIASED:
            pruner = BIASED[self.config.rule]
            weight = weight * pruner(plan, batch.credit.value, self.config.rate)
        return batch._replace(weight=weight * of_prompt[plan.prompt])

    def ahead(self, plan: Plan, uids: Sequence[int], iteration: int) -> NDArray[np.bool_] | None:
        """Returns (M,) parents that the first pass is sure to drop, or None: no tape for them.

        Only the uniform rule knows them before the rewards.
        """
        if not self.config.unbiased or self.config.needs_scores:
            return None
        units = unbiased.trained_units(plan, 0, self.recipe.objective.together)
        p = np.full(len(units.node), 1.0 - self.config.rate)
        kept = self._keep(plan, units, p, uids, iteration, 0)
        edges = units.edges[kept.weight[units.owner] == 0.0]
        dropped = np.zeros(len(plan), dtype=bool)
        dropped[plan.action[edges]] = True
        return dropped

    def weights(self, batch: Batch, *, iteration: int, update: int = 0, inner: int = 0) -> Weights:
        """Draws the edge weights of one pass over a batch; see `coins`."""
        coins = self.coins(batch, iteration=iteration, update=update, inner=inner)
        return Weights(batch.weight, Sums()) if coins is None else coins.weights(batch.weight)

    def coins(
        self, batch: Batch, *, iteration: int, update: int = 0, inner: int = 0
    ) -> Coins | None:
        """Draws the coins of one pass over a batch, None if nothing is ever dropped.

        Args:
            batch: credited; its weights are multiplied.
            iteration: of the run.
            update: which of the plan's updates.
            inner: passes of the iteration before this one; each has its own coins.

        Raises:
            ValueError: less than one parent of a prompt would stay on average, or advantages are
                not those of all planned edges.
        """
        if self.config == PruningConfig():
            return None
        plan, objective, config = batch.forest.plan, self.recipe.objective, self.config
        units = unbiased.trained_units(plan, update, objective.together)
        norm2 = unbiased.gradient_norm2(plan, units, self._slope(batch, units.edges))
        live, paid = np.zeros((2, len(units.node)), dtype=bool)
        edges = live_edges(plan, batch.credit.advantage, np.ones(len(plan)), objective, update)
        live[units.owner[np.isin(units.edges, edges)]] = True
        paid[units.owner[np.isin(units.edges, edges[batch.weight[edges] != 0.0])]] = True
        kept = Kept(np.ones(len(live)), np.ones(len(live)))
        if config.unbiased:
            p = self._probability(batch, units, norm2, paid)
            kept = self._keep(plan, units, p, batch.uids, iteration, inner)
        return Coins(units, kept, norm2, live, paid)

    def _slope(self, batch: Batch, edges: Ints) -> Floats:
        plan, (plus, minus) = batch.forest.plan, batch.credit.advantage[edges].T
        return self.recipe.objective.slope(plan, edges) * (plus - minus) * batch.weight[edges]

    def _probability(
        self, batch: Batch, units: Units, norm2: Floats, paid: NDArray[np.bool_]
    ) -> Floats:
        """(U,) keep probabilities, prompt by prompt: the same on any number of ranks."""
        rate = self.config.rate
        score = unbiased.unit_scores(units, batch.credit.advantage, self.config.score)
        if self.config.rule == "threshold":
            return unbiased.threshold_probability(score, units.prompt, rate)
        p = np.full(len(units.node), 1.0 - rate)
        for prompt in np.unique(units.prompt):
            mine = units.prompt == prompt
            if (1.0 - rate) * mine.sum() < 1.0:
                raise ValueError(
                    f"Pruning: rate must leave one of a prompt's {mine.sum()} parents on average, "
                    f"got {rate}"
                )
            mine &= paid
            if self.config.rule == "optimal" and mine.any():
                norm, cost = np.sqrt(norm2[mine]), units.cost[mine]
                p[mine] = unbiased.optimal_probability(norm, cost, 1.0 - rate, self.config.floor)
        return p

    def _keep(
        self, plan: Plan, units: Units, p: Floats, uids: Sequence[int], iteration: int, inner: int
    ) -> Kept:
        where = {"seed": self.seed, "iteration": iteration, "inner": inner}
        coin = unbiased.unit_coins(plan, units.node, uids, **where)
        fix = self.config.draw == "fixed"
        kept = unbiased.fixed(p, coin, units.prompt) if fix else unbiased.bernoulli(p, coin)
        most = self.config.cap
        return kept if most is None else Kept(np.minimum(kept.weight, most), kept.probability)
