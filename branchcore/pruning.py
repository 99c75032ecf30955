"""Pruning of a run: which prompts are rolled out, and the edge weights of every pass.

Prompt coins fall before the rollout, from a history of scores; parent coins after credit, again for
every pass. The weights multiply: recipe's pruner, prompt, parent. Letters: M rows, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from branchcore import unbiased
from branchcore.coins import Coins, Weights
from branchcore.credit import Floats
from branchcore.distributed import Ranks
from branchcore.gradient import live_edges
from branchcore.history import History, Seen
from branchcore.leaf_weights import edge_weight
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


class Draw(NamedTuple):
    """The prompts of an iteration after their coins, in rounds."""

    indices: Ints
    """(P,) index in the data set of every uid, dropped or not."""
    weight: Mapping[int, float]
    """1 / (1 - P) of those rolled out, by uid, ascending."""
    rounds: list[tuple[int, ...]]
    """uids of every round of this process."""
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
        self.past = History()
        """What prompts and steps were worth."""
        self.spread = PooledSpread(recipe, config.prompts)
        """The std over all prompts that the credit takes, if it takes one."""

    def draw(
        self,
        indices: Ints,
        iteration: int,
        per_round: int | None = None,
        ranks: Ranks | None = None,
    ) -> Draw:
        """Draws the prompts of an iteration and plans the rounds of this process.

        Args:
            indices: (P,) index in the data set of every uid 0..P - 1.
            iteration: of the run.
            per_round: prompts of a round at most; None = all.
            ranks: among which prompts are shared out; None = this process has all.
        """
        ranks = ranks or Ranks()
        weight = self.prompt_weights(indices, iteration)
        uids = ranks.share(tuple(weight))
        rounds = [uids[lo:hi] for lo, hi in balanced_chunks(len(uids), per_round)]
        where = {"seed": self.seed, "iteration": iteration}
        plans = [self.recipe.plan(one, **where) for one in rounds]
        dropped = ranks.share([uid for uid in range(len(indices)) if uid not in weight])
        without = [self.recipe.plan([uid], **where) for uid in dropped]
        updates = range(self.recipe.updates)
        planned = [sum(len(plan.trained(u)) for plan in plans + without) for u in updates]
        spared = sum(plan.counts().forwards for plan in without)
        total = [int(n) for n in ranks.sum(np.array([*planned, spared], dtype=np.float64))]
        return Draw(indices, weight, rounds, plans, total[:-1], total[-1])

    def prompt_weights(self, indices: Ints, iteration: int) -> dict[int, float]:
        """Returns 1 / (1 - P) of the prompts that are rolled out, by uid.

        Those whose running score is below the mean of those that have one are dropped by chance;
        never all, since somebody is at the mean.

        Args:
            indices: (P,) index in the data set of every uid 0..P - 1.
            iteration: of the run.
        """
        prompts = self.past.means["prompts"]
        known = [prompts[i] for i in indices.tolist() if i in prompts]
        bar = (1.0 - 1e-6) * float(np.mean(known)) if known else 0.0
        weight: dict[int, float] = {}
        for uid, index in enumerate(indices.tolist()):
            low = self.config.prompts > 0.0 and prompts.get(index, bar) < bar
            rate = self.config.prompts if low else 0.0
            if host_generator(self.seed, iteration, uid, PRUNING).random() >= rate:
                weight[uid] = 1.0 / (1.0 - rate)
        return weight

    def state(self) -> dict[str, Any]:
        """Returns what is remembered of prompts, steps and the spread, ready for JSON."""
        return {**self.past.state(), "spread": self.spread.state()}

    def load(self, state: Mapping[str, Any], where: Path | str) -> None:
        """Takes a state back.

        Raises:
            ValueError: it is damaged; names `where`.
        """
        self.past.load(state, where)
        self.spread.load(state["spread"], where)

    def remember(self, indices: Ints, batches: Sequence[Batch], ranks: Ranks | None = None) -> None:
        """Updates what is remembered with all trained edges that any process has rolled out."""
        if not (self.config.prompts or self.config.rule == "history"):
            return
        seen = Seen()
        for batch in batches:
            plan, edges = batch.forest.plan, batch.forest.plan.trained()
            weight = edge_weight(plan, batch.leaf_weight)[edges]
            size = batch.credit.advantage[edges].sum(1)
            if self.config.prompts:
                seen.add("prompts", indices[[*batch.uids]][plan.prompt[edges]], weight * size)
            if self.config.rule == "history":
                seen.add("steps", plan.depth[edges], weight * size**2)
        self.past.remember((ranks or Ranks()).gather(seen))

    def weigh(self, batch: Batch, prompt_weight: Mapping[int, float]) -> Batch:
        """Returns a batch with the weights of its prompts and of a biased pruner multiplied in."""
        plan, weight = batch.forest.plan, batch.weight
        of_prompt = np.array([prompt_weight[uid] for uid in batch.uids])
        if self.config.rule in BIASED:
            pruner = BIASED[self.config.rule]
            weight = weight * pruner(plan, batch.credit.value, self.config.rate)
        return batch._replace(weight=weight * of_prompt[plan.prompt])

    @property
    def late(self) -> bool:
        """Some of what is dropped is known after the rewards only."""
        return self.config.late or self.recipe.prune_by_value

    def tape(self, asked: int | None) -> int | None:
        """Returns the nodes of the tape: as asked, else all unless pruning makes them a waste.

        A node on the tape costs its backward even if dropped after the rewards, where the model is
        small; one off the tape a forward and a backward if it is kept.
        """
        share = self.config.share if self.config.late else 0.5
        return 0 if asked is None and self.late and share < 2.0 / 3.0 else asked

    def ahead(self, plan: Plan, uids: Sequence[int], iteration: int) -> NDArray[np.bool_] | None:
        """Returns (M,) parents that the first pass is sure to drop, or None: no tape for them."""
        left = np.ones(len(plan))
        if not self.recipe.prune_by_value:
            left *= self.recipe.prune(plan, np.zeros(len(plan)), iteration)
        if not self.config.late and self.config.rule in BIASED:
            left *= BIASED[self.config.rule](plan, np.zeros(len(plan)), self.config.rate)
        if not self.config.late and self.config.unbiased:
            units = unbiased.trained_units(plan, 0, self.recipe.objective.together)
            kept = self._keep(plan, units, self._before(plan, units), uids, iteration, 0)
            left[units.edges] *= kept.weight[units.owner]
        edges = plan.trained(0)
        dropped = np.zeros(len(plan), dtype=bool)
        dropped[plan.action[edges[left[edges] == 0.0]]] = True
        dropped[plan.action[edges[left[edges] != 0.0]]] = False
        return dropped if dropped.any() else None

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
        if self.config.rule == "optimal":
            return self._optimal(units, norm2, paid)
        return self._before(batch.forest.plan, units)

    def _before(self, plan: Plan, units: Units) -> Floats:
        """(U,) keep probabilities that no advantage of this iteration has a part in."""
        every = np.ones(len(units.node), dtype=bool)
        if self.config.rule == "uniform":
            return self._optimal(units, np.zeros(len(every)), every)
        slope_E = self.recipe.objective.slope(plan, units.edges)
        steps = self.past.means["steps"]
        size_E = np.array([steps.get(int(d), 1.0) for d in plan.depth[units.edges]])
        norm2 = np.zeros(len(every))
        np.add.at(norm2, units.owner, slope_E**2 * size_E * (plan.mix[units.edges] ** 2).sum(1))
        return self._optimal(units, norm2, every)

    def _optimal(self, units: Units, norm2: Floats, paid: NDArray[np.bool_]) -> Floats:
        """(U,) `optimal_probability` of every prompt's units that are paid for, 1 - rate else."""
        share = 1.0 - self.config.rate
        p = np.full(len(units.node), share)
        for prompt in np.unique(units.prompt):
            mine = units.prompt == prompt
            if share * mine.sum() < 1.0:
                raise ValueError(
                    f"Pruning: rate must leave one of a prompt's {mine.sum()} parents on average, "
                    f"got {self.config.rate}"
                )
            mine &= paid
            norm, cost = np.sqrt(norm2[mine]), units.cost[mine]
            if norm.any():
                p[mine] = unbiased.optimal_probability(norm, cost, share, self.config.floor)
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
