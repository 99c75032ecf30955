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
from branchcore.credit import Floats
from branchcore.gradient import live_edges
from branchcore.leaf_weights import edge_weight
from branchcore.noise import PRUNING, host_generator
from branchcore.packing import balanced_chunks
from branchcore.plan import Ints, Plan
from branchcore.prune import BIASED
from branchcore.pruning_config import PruningConfig
from branchcore.recipes.recipe import Recipe
from branchcore.stages import Batch
from branchcore.unbiased import Kept, Units

_MEMORY = 0.5
"""Share of its past that a prompt's running score keeps."""
_COUPLED = (("global_std", True), ("credit", "gdpo"), ("prune_pool", "call"))
"""Options of recipes under which statistics cross prompts."""


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


class Sums(NamedTuple):
    """What an iteration kept: prompts, and sums over the units that have a gradient."""

    prompts: float = 0.0
    rolled_out: float = 0.0
    parents: float = 0.0
    kept: float = 0.0
    expected: float = 0.0
    weight: float = 0.0
    weight2: float = 0.0
    added: float = 0.0
    norm2: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Returns the sums over both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Returns the shares that were kept and what they cost in variance.

        `prompts_share` was rolled out; of the parents of those, over all passes, `kept_share`, on
        average `expected_share`; `parents_saved` is what ran no training pass, `effective_parents`
        (sum w)^2 / sum w^2 of the coins' weights, `added_variance` the formula's, in sum |g|^2,
        with the norms that the rows predict (`unbiased.gradient_norm2`).
        """
        parents = max(self.parents, 1.0)
        return {
            "prompts_share": self.rolled_out / max(self.prompts, 1.0),
            "kept_share": self.kept / parents,
            "expected_share": self.expected / parents,
            "effective_parents": self.weight**2 / self.weight2 if self.weight2 else 0.0,
            "added_variance": self.added / self.norm2 if self.norm2 else 0.0,
            "parents_saved": self.parents - self.kept,
        }


class Weights(NamedTuple):
    """Edge weights of one pass."""

    weight: Floats
    """(M,) the batch's times what the coins gave."""
    sums: Sums


class Pruning:
    """Draws coins and keeps the history of prompts.

    Args:
        config: what is dropped; `PruningConfig()` drops nothing and changes no bit.
        recipe: the method.
        seed: of the run.

    Raises:
        ValueError: the recipe's statistics cross prompts, and prompts are to be dropped.
    """

    def __init__(self, config: PruningConfig, recipe: Recipe, seed: int) -> None:
        self.config, self.recipe, self.seed = config, recipe, seed
        self.history: dict[int, float] = {}
        for name, value in _COUPLED:
            if config.prompts and recipe.options.get(name) == value:
                raise ValueError(
                    f"Pruning: prompts must be 0 with {name}={value!r} of {recipe.name}, whose "
                    f"statistics are taken over all prompts of a round, got {config.prompts}; a "
                    "spread of the survivors biases the estimate"
                )

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
        whole = plans + [self.recipe.plan([uid], **where) for uid in dropped]
        updates = range(self.recipe.updates)
        planned = [sum(len(plan.trained(u)) for plan in whole) for u in updates]
        return Draw(indices, weight, rounds, plans, planned)

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

    def state(self) -> dict[str, float]:
        """Returns the running score of every prompt index seen, ready for JSON."""
        return {str(index): score for index, score in self.history.items()}

    def load(self, state: Mapping[str, Any], where: Path | str) -> None:
        """Takes a state back.

        Raises:
            ValueError: it is damaged; names `where`.
        """
        for index, score in state.items():
            if not (index.isdecimal() and isinstance(score, float) and 0.0 <= score < math.inf):
                raise ValueError(
                    f"Pruning: {where} must hold a score >= 0 per prompt index, got "
                    f"{score!r} for {index!r}"
                )
        self.history = {int(index): float(score) for index, score in state.items()}

    def remember(self, indices: Ints, batches: Sequence[Batch]) -> None:
        """Updates the running mean |advantage| of the prompts that were rolled out."""
        for batch in batches if self.config.prompts else ():
            plan, edges = batch.forest.plan, batch.forest.plan.trained()
            shown = edge_weight(plan, batch.leaf_weight)[:, None] * batch.credit.advantage
            size = shown[edges].sum(1)
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
        """Draws the edge weights of one pass over a batch.

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
            return Weights(batch.weight, Sums())
        plan, objective, config = batch.forest.plan, self.recipe.objective, self.config
        units = unbiased.trained_units(plan, update, objective.together)
        norm2 = unbiased.gradient_norm2(plan, units, self._slope(batch, units.edges))
        live, paid = np.zeros((2, len(units.node)), dtype=bool)
        edges = live_edges(plan, batch.credit.advantage, np.ones(len(plan)), objective, update)
        live[units.owner[np.isin(units.edges, edges)]] = True
        paid[units.owner[np.isin(units.edges, edges[batch.weight[edges] != 0.0])]] = True
        if not config.unbiased:
            kept = Kept(np.ones(len(live)), np.ones(len(live)))
            return Weights(batch.weight, _sums(units, kept, norm2, live, paid))
        p = self._probability(batch, units, norm2, paid)
        kept = self._keep(plan, units, p, batch.uids, iteration, inner)
        weight = batch.weight.copy()
        weight[units.edges] *= kept.weight[units.owner]
        return Weights(weight, _sums(units, kept, norm2, live, paid))

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


def _sums(
    units: Units, kept: Kept, norm2: Floats, live: NDArray[np.bool_], paid: NDArray[np.bool_]
) -> Sums:
    """Returns the sums of a pass: `paid` units are left by the recipe's pruner, then come coins."""
    weight = np.where(paid, kept.weight, 0.0)[live]
    cost, p = units.cost[live], np.where(paid, kept.probability, 0.0)[live]
    return Sums(
        parents=float(cost.sum()),
        kept=float(cost[weight > 0.0].sum()),
        expected=float(cost @ p),
        weight=float(weight.sum()),
        weight2=float(weight @ weight),
        added=unbiased.added_variance(kept.probability[paid], norm2[paid]),
        norm2=float(norm2[paid].sum()),
    )
