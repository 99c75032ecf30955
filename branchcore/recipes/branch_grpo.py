"""BranchGRPO (arXiv 2509.06040): SDE trees, fused rewards, depth-wise advantages, pruning.

xi_b = (s own_b + shared) / sqrt(1 + s^2) at splits; r_bar(n) = sum_l w_l r_l over the leaves below;
A_d(n) = (r_bar(n) - mean_d) / (std_d + 1e-8) over one tree's nodes of depth d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from branchcore import prune
from branchcore.credit import Floats
from branchcore.objective import ClippedRatio
from branchcore.plan import Plan
from branchcore.recipes.branching import (
    check_split_noise,
    check_splits,
    grow_branching,
    scaled_splits,
)
from branchcore.recipes.credits import depth_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Prune,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import shifted_linear
from branchcore.steps import dance_sde
from branchcore.tree import Tree


@keeps_options
def branch_grpo(
    sigmas: Sequence[float],
    *,
    splits: Sequence[int] | str = "dense",
    branching: int | Sequence[int] = 2,
    eta: float = 0.3,
    correlate: float | None = 4.0,
    amplify: float | None = None,
    beta: float = 0.0,
    local: bool = False,
    clip: float = 1e-3,
    kl: float = 0.0,
    pruning: str = "none",
    prune_depths: Sequence[int] = (),
    prune_share: float = 0.5,
    prune_pool: str = "tree",
    slide_interval: int | None = None,
    slide_towards: str = "leaves",
    slide_stop: int | None = None,
    last_step: str = "euler",
    updates: int = 1,
) -> Recipe:
    """Builds BranchGRPO; defaults are FLUX's (16 leaves) but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(20, 3).
        splits: split steps, or a density for `scaled_splits`.
        branching: children per split.
        eta: diffusion of the SDE.
        correlate: s of the sibling noise mixture (the paper); None = independent.
        amplify: c of the released code, c * own noise with the log-prob of c = 1; not both.
        beta: fusion temperature; 0 in the script, 1 in the paper.
        local: fuse over immediate children, as the released code does with beta.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none in the paper.
        pruning: "none", "parent_top1", "extremes", "depth", or "first_steps", which the released
            code runs under the name of width pruning, mode 1.
        prune_depths: child depths of the "depth" window; empty = the 5 past the last split.
        prune_share: share of chains that "extremes" keeps, or of a chain's steps.
        prune_pool: "tree", or "call" as the released code.
        slide_interval: iterations per move of the depth window; None = fixed. 30 in the paper.
        slide_towards: "leaves" (the paper) or "root" (the released code).
        slide_stop: depth that the window's leading edge never passes; None = the deepest trained
            depth towards the leaves, the last split's own towards the root.
        last_step: "euler": the image is the x0 read-out, the reward sees all trained noise;
            "sde": the last step is stochastic and trained too and the image is its sample.
        updates: optimizer updates per iteration, the trained edges dealt out at random; 37 for 436
            edges in the released script.
    """
    sg = check_sigmas("branch_grpo", sigmas)
    if last_step not in ("euler", "sde"):
        raise ValueError(f"branch_grpo: last_step must be 'euler' or 'sde', got {last_step!r}")
    steps = len(sg) - 1 if last_step == "sde" else len(sg) - 2
    chosen = scaled_splits(splits, len(sg) - 1) if isinstance(splits, str) else tuple(splits)
    children = check_splits("branch_grpo", chosen, branching, steps)
    sde = dance_sde(eta)
    if slide_towards not in ("leaves", "root"):
        raise ValueError(
            f"branch_grpo: slide_towards must be 'leaves' or 'root', got {slide_towards!r}"
        )
    leaves = slide_towards == "leaves"
    window = _Window(
        depths=tuple(prune_depths) or tuple(range(max(chosen) + 2, max(chosen) + 7)),
        interval=slide_interval,
        stop=slide_stop if slide_stop is not None else steps if leaves else max(chosen),
        towards_leaves=leaves,
    )
    _check_pruning(prune_share, prune_pool, window)
    check_updates("branch_grpo", updates)
    check_split_noise("branch_grpo", correlate, amplify)

    def grow(t: Tree, at: Moment) -> None:
        every = dict.fromkeys(range(steps), sde)
        t.leaf(grow_branching(t, sg, children, every, correlate=correlate, amplify=amplify))
        if updates > 1:
            t.deal_updates(updates, at.rng)

    return Recipe(
        name="branch_grpo",
        grow=grow,
        credit=depth_credit(beta=beta, local=local),
        objective=ClippedRatio(clip=(clip, clip), kl=kl),
        prune=_pruner(pruning, prune_share, prune_pool, window),
        prune_by_value=pruning in ("parent_top1", "extremes"),
        varies=updates > 1,
        updates=updates,
    )


class _Window(NamedTuple):
    """The depth window and how it moves."""

    depths: tuple[int, ...]
    interval: int | None
    stop: int
    towards_leaves: bool

    def weights(self, plan: Plan, iteration: int) -> Floats:
        depths = np.asarray(self.depths)
        if self.interval is not None:
            depths = prune.slide(
                depths,
                iteration,
                interval=self.interval,
                stop=self.stop,
                towards_leaves=self.towards_leaves,
            )
        return prune.depth_window(plan, depths)


def _check_pruning(share: float, pool: str, window: _Window) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"branch_grpo: prune_share must be in (0, 1], got {share}")
    if pool not in ("tree", "call"):
        raise ValueError(f"branch_grpo: prune_pool must be 'tree' or 'call', got {pool!r}")
    if window.interval is not None and window.interval < 1:
        raise ValueError(
            f"branch_grpo: slide_interval must be at least 1, got {window.interval}; try None"
        )


def _pruner(name: str, share: float, pool: str, window: _Window) -> Prune:
    pruners: dict[str, Prune] = {
        "none": lambda plan, _value, _iteration: prune.keep_all(plan),
        "parent_top1": lambda plan, value, _iteration: prune.parent_top1(plan, value),
        "extremes": lambda plan, value, _iteration: prune.extremes(
            plan, value, share=share, pool=pool
        ),
        "depth": lambda plan, _value, iteration: window.weights(plan, iteration),
        "first_steps": lambda plan, _value, _iteration: prune.first_steps(plan, share=share),
    }
    if name not in pruners:
        raise ValueError(f"branch_grpo: pruning must be from {tuple(pruners)}, got {name!r}")
    return pruners[name]


_ADAM: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
_PAPER: dict[str, Any] = {**_ADAM, "ema_decay": 0.995, "prompts_per_iteration": 32}
_SETTING = "arXiv 2509.06040: FLUX.1-dev, 720 px, guidance 3.5, full fine-tuning, HPSv2.1, 16 GPUs"

PRESETS: dict[str, Preset] = {
    "flux": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"beta": 1.0},
        trainer=_PAPER,
        source=_SETTING,
    ),
    "flux-width": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"beta": 1.0, "pruning": "parent_top1"},
        trainer=_PAPER,
        source=f"{_SETTING}; BranchGRPO-WidPru",
    ),
    "flux-depth": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"beta": 1.0, "pruning": "depth", "slide_interval": 30},
        trainer=_PAPER,
        source=f"{_SETTING}; BranchGRPO-DepPru, the 5 depths that its table's 8.625 passes imply, "
        "where its text has 4",
    ),
    "flux-81": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"branching": 3, "beta": 1.0},
        trainer=_PAPER,
        source=f"{_SETTING}; 81 leaves",
    ),
    "flux-256": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"branching": 4, "beta": 1.0},
        trainer=_PAPER,
        source=f"{_SETTING}; 256 leaves",
    ),
    "flux-released": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"correlate": None, "amplify": 4.0, "updates": 37},
        trainer={**_ADAM, "max_grad_norm": 1.0, "prompts_per_iteration": 16},
        source=(
            "Fredreic1849/BranchGRPO finetune_flux_branchgrpo_8gpus.sh: 720 px, guidance 3.5, full "
            "fine-tuning; 12 of 436 edges per update, of which 32 reach no reward and are left out"
        ),
    ),
}
