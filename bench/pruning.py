"""What pruning costs in variance and saves in CPU time, on the embedded digits model.

    python bench/pruning.py [--trees 20] [--rates 0.3 0.5 0.7] [--rounds 8] [--iterations 0]
        [--json bench/results/pruning.json]

Variance: BranchGRPO's trees on the digits model, the gradient of every trained parent measured by
itself. DPPO's threshold rule against optimal probabilities of the same expected cost, tree by tree,
by the exact formula sum (1/p - 1) |g|^2 with the measured norms. `rows` knows only what the engine
knows before any backward (advantages and step rows), `history` no advantage of these trees either
(of ten others, by depth), `measured` is given the norms. With --iterations the policy is trained
first, so that its KL has a gradient.

Time: process seconds of an update (coins included) at half the parents against all, same trees,
interleaved; medians of the pairs. detach = no tape, forward and backward; tape = backward only, of
whole calls where coins fall before the rollout, masked where they fall after it. The KL's reference
forward is in all.

Width: the masked backward against the whole one and against computing the kept rows again, for
transformers of diffusers' SD3 classes, 2 blocks, --rows rows, --kept of them kept.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import facts
from measure import keep_freed_memory

from branchcore import recipes, unbiased
from branchcore.models.digits.task import DigitsTask
from branchcore.pruning import Pruning
from branchcore.pruning_config import PruningConfig
from branchcore.rewards import score
from branchcore.stages import Batch, accumulate, finish, grow
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig

SEED = 11


class Tree(NamedTuple):
    """A recorded tree: its units that have a gradient."""

    score: np.ndarray
    """(U,) mean |advantage|."""
    mean: float
    """Of all planned parents, those without a gradient included."""
    rows: np.ndarray
    """(U,) squared norms that the rows predict."""
    measured: np.ndarray
    """(U,) squared norms of the gradients."""
    slope2: np.ndarray
    """(U,) what the rows alone predict of the squared norms, per squared advantage."""
    depth: np.ndarray
    """(U,) of the edges."""
    size2: np.ndarray
    """(U,) mean squared advantage of its edges."""


class Bench:
    """The digits model and BranchGRPO on it."""

    def __init__(self, iterations: int) -> None:
        self.task = DigitsTask()
        preset = self.task.presets["branch_grpo"]
        self.recipe = recipes.build("branch_grpo", self.task.sigmas, **preset.recipe)
        self.weights = preset.trainer["reward_weights"]
        if iterations:
            config = TrainerConfig(**{**preset.trainer, "iterations": iterations})
            with tempfile.TemporaryDirectory() as out:
                model = self.task.model, self.task.prompts, self.task.reward
                Trainer(*model, self.recipe, config, Path(out) / "run").run()

    def batch(self, uids: list[int], iteration: int, **options: Any) -> Batch:
        plan = self.recipe.plan(uids, seed=SEED, iteration=iteration)
        prompts = [self.task.prompts[(7 * uid) % len(self.task.prompts)] for uid in uids]
        where = {"seed": SEED, "iteration": iteration, "max_batch": 128}
        model = self.task.model
        options = {"tape": 0, **options}
        grown = grow(plan, model, self.recipe, prompts, uids, **where, **options)
        scores = score(self.task.reward, grown.images, grown.prompts)
        return finish(grown, scores, self.recipe, iteration=iteration, reward_weights=self.weights)

    def pruning(self, **options: Any) -> Pruning:
        return Pruning(PruningConfig(**options), self.recipe, SEED)

    def gradient(self, batch: Batch, weight: np.ndarray) -> torch.Tensor:
        module = self.task.model.module
        module.zero_grad(set_to_none=True)
        accumulate(batch._replace(weight=weight), self.recipe, max_batch=128)
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        return torch.cat(grads).double()

    def tree(self, uid: int) -> Tree:
        batch = self.batch([uid], iteration=0)
        plan, objective = batch.forest.plan, self.recipe.objective
        units = unbiased.trained_units(plan)
        a_E2 = batch.credit.advantage[units.edges]
        slope_E = objective.slope(plan, units.edges) * (a_E2[:, 0] - a_E2[:, 1])
        measured = np.zeros(len(units.node))
        live = np.zeros(len(units.node), dtype=bool)
        live[units.owner[a_E2.any(1)]] = True
        for unit in np.flatnonzero(live):
            one = np.zeros(len(plan))
            one[units.edges[units.owner == unit]] = 1.0
            measured[unit] = float(self.gradient(batch, one).square().sum())
        scores = unbiased.unit_scores(units, batch.credit.advantage)
        rows = unbiased.gradient_norm2(plan, units, slope_E)
        rest = self._by_depth(plan, units, a_E2.sum(1) ** 2)
        return Tree(
            scores[live], float(scores.mean()), rows[live], measured[live], *(a[live] for a in rest)
        )

    def _by_depth(self, plan: Any, units: Any, a2_E: np.ndarray) -> tuple[np.ndarray, ...]:
        count = np.bincount(units.owner)
        slope2_E = self.recipe.objective.slope(plan, units.edges) ** 2
        slope2_E *= (plan.mix[units.edges] ** 2).sum(1)
        slope2, size2 = (np.bincount(units.owner, values) for values in (slope2_E, a2_E))
        return slope2, plan.depth[units.node] + 1, size2 / count


def variances(tree: Tree, past: list[Tree], rate: float, floor: float = 0.1) -> dict[str, float]:
    """Returns added variance of each rule at the threshold rule's expected cost."""
    depths, sizes = (np.concatenate([getattr(t, n) for t in past]) for n in ("depth", "size2"))
    known = np.array([sizes[depths == d].mean() for d in tree.depth])
    low = tree.score < tree.mean * (1 - 1e-6)
    p = np.where(low, 1.0 - rate, 1.0)
    one, share = np.ones(len(p)), float(p.mean())
    norms = {"rows": tree.rows, "measured": tree.measured, "score": tree.score**2}
    norms["history"] = tree.slope2 * known
    chosen = {
        name: unbiased.optimal_probability(np.sqrt(g2), one, share, min(floor, share))
        for name, g2 in norms.items()
    }
    chosen |= {"threshold": p, "uniform": np.full(len(p), share)}
    added = {name: unbiased.added_variance(q, tree.measured) for name, q in chosen.items()}
    return {"share": share, "signal": float(tree.measured.sum()), **added}


def variance_rows(trees: list[Tree], rates: list[float]) -> list[dict[str, Any]]:
    """Returns one row per rate: ratios to the threshold rule, of sums and by tree."""
    rows: list[dict[str, Any]] = []
    for rate in rates:
        half = len(trees) // 2
        found = [
            variances(t, trees[half:] if i < half else trees[:half], rate)
            for i, t in enumerate(trees)
        ]
        total = {name: sum(f[name] for f in found) for name in found[0]}
        rows.append(
            {
                "rate": rate,
                "share": round(total["share"] / len(trees), 4),
                "threshold_in_signal": round(total["threshold"] / total["signal"], 4),
                **{
                    f"{name}_ratio": round(total[name] / total["threshold"], 4)
                    for name in ("rows", "history", "measured", "score", "uniform")
                },
                "rows_ratio_median": round(
                    statistics.median(f["rows"] / f["threshold"] for f in found), 4
                ),
            }
        )
    return rows


def timed(bench: Bench, rounds: int, prompts: int) -> list[dict[str, Any]]:
    """Times the update at half the parents and at all, in turn."""
    half = {
        "uniform": bench.pruning(rule="uniform", rate=0.5, draw="fixed"),
        "history": bench.pruning(rule="history", rate=0.5),
        "optimal": bench.pruning(rule="optimal", rate=0.5),
        "all": bench.pruning(rule="uniform"),
    }
    rules = ("all", "uniform", "history", "optimal")
    arms = [(rule, tape) for tape in (0, 10**6) for rule in rules]
    uids = list(range(prompts))
    seconds: dict[tuple[str, int], list[float]] = {arm: [] for arm in arms}
    kept: dict[tuple[str, int], list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms if turn % 2 else arms[::-1]:
            name, tape = arm
            plan = bench.recipe.plan(uids, seed=SEED, iteration=turn)
            batch = bench.batch(
                uids,
                turn,
                tape=tape,
                off_tape=half[name].ahead(plan, uids, turn),
                masked_backward=half[name].late,
            )
            bench.task.model.module.zero_grad(set_to_none=True)
            start = time.process_time()
            weight, sums = half[name].weights(batch, iteration=turn)
            accumulate(batch._replace(weight=weight), bench.recipe, max_batch=128)
            spent = time.process_time() - start
            if turn:  # the first round warms up
                seconds[arm].append(spent)
                kept[arm].append(sums.kept / sums.parents)
    return [
        {
            "rule": name,
            "path": "tape" if tape else "detach",
            "kept_share": round(statistics.mean(kept[name, tape]), 4),
            "cpu_s": round(statistics.median(seconds[name, tape]), 4),
            "ratio": round(
                statistics.median(
                    a / b for a, b in zip(seconds[name, tape], seconds["all", tape], strict=True)
                ),
                4,
            ),
        }
        for name, tape in arms
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, r.values())) + " |" for r in rows])


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", type=int, default=20)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="of a timed update")
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    meta = facts()
    bench = Bench(args.iterations)
    trees = [bench.tree(uid) for uid in range(args.trees)]
    variance = variance_rows(trees, args.rates)
    print(f"{args.trees} trees, {sum(len(t.score) for t in trees)} parents\n{table(variance)}\n")
    times = timed(bench, args.rounds, args.prompts)
    print(table(times))
    if args.json is not None:
        result = {"meta": meta, "trees": args.trees, "iterations": args.iterations}
        result |= {"variance": variance, "times": times}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
