"""Plans an iteration's waves, tape and rounds from a byte model and a budget.

The byte model is exact bookkeeping of what the trainer, the rollout and the gradient keep, with
four measured lines for what the model's own calls need (`live_bytes.measure`). Letters: N rows of
a call, M nodes of the plan, D latent elements, P prompts of a round.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from branchcore.model import Model
from branchcore.models.sizing.live_bytes import CallBytes, measure
from branchcore.models.sizing.memory_need import Need, check_trained, rollout_calls
from branchcore.packing import balanced_chunks
from branchcore.plan import Ints, Plan
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig

MARGIN = 0.1
"""Share of a budget that stays free: gaps of the allocator, kernels' workspaces, the driver."""


def bytes_of(text: str) -> int:
    """Reads a size such as "80GB", "24 GiB" or "512MB".

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"bytes_of: text must be like '80GB' or '24GiB', got {text!r}")
    return round(
        float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
    )


class MemoryPlan(NamedTuple):
    """What was chosen, and what it needs."""

    config: TrainerConfig
    """With prompts_per_round, max_batch and tape chosen."""
    budget: int
    """Bytes, the free share included."""
    usable: int
    """Bytes without it, and without what is reserved for others."""
    fixed: Mapping[str, int]
    """Bytes that are there all the time."""
    phases: Mapping[str, int]
    """Peak bytes of every part of an iteration."""
    trained: int
    """Trained nodes of a round, without those that pruning drops before the rollout."""
    decode_batch: int | None
    """Images per call of the decoder, for the model's attribute of this name; None = as many as
    rows, where a model takes no number."""
    limit: str
    """What a larger budget would change first."""

    @property
    def peak(self) -> int:
        """Predicted most bytes of tensors at any time."""
        return max(self.phases.values())

    def __str__(self) -> str:
        config, phase = self.config, max(self.phases, key=self.phases.__getitem__)
        fixed = ", ".join(f"{name} {_gb(size)}" for name, size in self.fixed.items() if size)
        decoded = "" if self.decode_batch is None else f", {self.decode_batch} decoded at once"
        return "\n".join(
            [
                f"memory: {_gb(self.peak)} of {_gb(self.budget)} ({_gb(self.usable)} usable), most "
                f"in the {phase}",
                f"  always there: {fixed}",
                "  " + ", ".join(f"{name} {_gb(size)}" for name, size in self.phases.items()),
                f"  chosen: {config.prompts_per_round} of {config.prompts_per_iteration} prompts "
                f"per round, {config.max_batch} rows per call, {config.tape} of {self.trained} "
                f"trained nodes of a round on the tape{decoded}",
                f"  limit: {self.limit}",
            ]
        )


def plan_memory(
    model: Model,
    recipe: Recipe,
    config: TrainerConfig,
    budget: int,
    *,
    prompt: str,
    cost: CallBytes | None = None,
    reserved: int = 0,
    margin: float = MARGIN,
    keep: Collection[str] = (),
    adjust: Callable[[Need], Need] = lambda need: need,
) -> MemoryPlan:
    """Chooses prompts per round, rows per call and taped nodes: the fastest that fits.

    Work is counted in rows of a forward: a call of N rows is N + 1, a backward twice that, and a
    trained node that is on no tape one more forward. The plan is that of iteration 0. Images are
    decoded in calls of what then fits.

    Args:
        model: as it will run, what is trained switched on; on any device, also "meta".
        recipe: of the run.
        config: of the run; its prompts_per_round, max_batch and tape are replaced.
        budget: bytes of the device.
        prompt: one that the model knows or can encode.
        cost: of this model as it is, if `live_bytes.measure` was called before.
        reserved: bytes for others on the device, a reward model say.
        margin: share of the budget that stays free.
        keep: which of prompts_per_round, max_batch and tape stay as they are in the configuration.
        adjust: changes what is always there, where weights are spread over several devices.

    Returns:
        MemoryPlan; print it.

    Raises:
        ValueError: a budget too small for one node, or too small for a group of edges that the
            objective keeps together, or no trainable weights.
    """
    check_trained(model)
    need = adjust(Need.of(model, recipe, config, cost or measure(model, prompt)))
    apart = hasattr(model, "decode_batch")
    if apart:
        need = need._replace(decode_batch=1)
    usable = math.floor(budget * (1.0 - margin)) - reserved
    options = list(_options(need, usable, keep))
    if not options:
        if keep and next(iter(_options(need, usable)), None) is not None:
            raise ValueError(_too_much(need, keep, budget))
        plan, rows = need.plan(1), need.least_rows
        short = max(need.phases(plan, config.prompts_per_iteration, rows, 0).values())
        what = "one node" if rows == 1 else f"one group of {rows} nodes"
        raise ValueError(
            f"plan_memory: budget must be at least {_gb((short + reserved) / (1.0 - margin))} for "
            f"{what} at a time, got {_gb(budget)}; try a LoRA, checkpointing or a smaller size"
        )
    best = min(options, key=lambda option: (option.work, option.rows))
    plan = need.plan(best.prompts)
    trained = len(need.taped(plan))
    chosen = dataclasses.replace(
        config, prompts_per_round=best.prompts, max_batch=best.rows, tape=best.tape
    )
    rounds = len(balanced_chunks(config.prompts_per_iteration, best.prompts))
    if apart:
        need = _widest_decode(need, plan, rounds, best, usable)
    return MemoryPlan(
        config=chosen,
        budget=budget,
        usable=usable,
        fixed=need.fixed,
        phases=need.phases(plan, rounds, best.rows, best.tape),
        trained=trained,
        decode_batch=need.decode_batch,
        limit=_limit(best, trained, plan, rounds),
    )


def _too_much(need: Need, keep: Collection[str], budget: int) -> str:
    config = need.config
    if "max_batch" in keep and (config.max_batch or need.least_rows) < need.least_rows:
        return (
            f"plan_memory: max_batch must be at least {need.least_rows}, the nodes that the "
            f"objective keeps together, got {config.max_batch}"
        )
    given = ", ".join(f"{name}={getattr(config, name)}" for name in keep)
    return (
        f"plan_memory: {' and '.join(keep)} must leave an iteration within the budget of "
        f"{_gb(budget)}, got {given}; try less, or leave them to the planner"
    )


def predict_memory(
    model: Model, recipe: Recipe, config: TrainerConfig, *, prompt: str
) -> dict[str, int]:
    """Returns the peak bytes of every part of an iteration of these very settings."""
    check_trained(model)
    need = Need.of(model, recipe, config, measure(model, prompt))
    rounds = balanced_chunks(config.prompts_per_iteration, config.prompts_per_round)
    plan = need.plan(max(hi - lo for lo, hi in rounds))
    tape = len(need.taped(plan)) if config.tape is None else config.tape
    return need.phases(plan, len(rounds), config.max_batch or len(plan), tape)


class Option(NamedTuple):
    """One way to run an iteration."""

    work: float
    prompts: int
    rows: int
    tape: int


def _options(need: Need, usable: int, keep: Collection[str] = ()) -> Iterable[Option]:
    """Yields what fits: for every round size and call size the largest tape."""
    total, config = need.config.prompts_per_iteration, need.config
    fewest = 2 if config.overlap_rewards else 1
    parts = {-(-total // rounds) for rounds in range(fewest, total + 1)}
    if "prompts_per_round" in keep:
        parts = {min(total, config.prompts_per_round or total)}
    for prompts in sorted(parts):
        plan, rounds = need.plan(prompts), -(-total // prompts)
        widest = max(hi - lo for lo, hi in plan.levels())
        sizes = {2**i for i in range(widest.bit_length())} | {widest, need.least_rows}
        if "max_batch" in keep:
            sizes = {config.max_batch or len(plan)}
        for rows in sorted(size for size in sizes if size >= need.least_rows):

            def fits(tape: int, plan: Plan = plan, rounds: int = rounds, rows: int = rows) -> bool:
                return max(need.phases(plan, rounds, rows, tape).values()) <= usable

            nodes = need.taped(plan)
            asked = len(nodes) if config.tape is None else min(config.tape, len(nodes))
            least = asked if "tape" in keep and not need.lags else 0
            if fits(least):
                most = least if "tape" in keep or need.lags else len(nodes)
                tape = most if most == least else _largest(most, fits)
                yield Option(rounds * _work(need, plan, rows, nodes[:tape]), prompts, rows, tape)


def _widest_decode(need: Need, plan: Plan, rounds: int, best: Option, usable: int) -> Need:
    def fits(images: int) -> bool:
        phases = need._replace(decode_batch=images).phases(plan, rounds, best.rows, best.tape)
        return max(phases.values()) <= usable

    most = min(best.rows, int(plan.leaf.sum()))
    return need._replace(decode_batch=max(1, _largest(most, fits)))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _work(need: Need, plan: Plan, rows: int, taped: Ints) -> float:
    """Returns the work of a round in rows of a forward."""
    work = 0.0
    for level in rollout_calls(plan, rows, taped):
        work += sum((count + 1) * (3 if on_tape else 1) for count, on_tape in level.calls)
    left = sum(len(need.left(plan, update, taped)) for update in range(plan.num_updates))
    return work + sum(3 * (hi - lo + 1) for lo, hi in balanced_chunks(left, rows))


def _limit(best: Option, trained: int, plan: Plan, rounds: int) -> str:
    widest = max(hi - lo for lo, hi in plan.levels())
    if best.tape < trained:
        return f"the tape: {trained - best.tape} trained nodes of a round are computed twice"
    if rounds > 1:
        return f"the tape: {rounds} rounds of {best.prompts} prompts, each whole on the tape"
    if best.rows < widest:
        return f"rows per call: {best.rows} of a wave's {widest}"
    return "none: everything fits at once"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
