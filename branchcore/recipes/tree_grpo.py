"""TreeGRPO (arXiv 2512.08153): a tree of d stochastic steps inside an ODE chain.

The window i..i + d - 1 starts at random, Pr(i) = (1 - r) r^i / (1 - r^(T - d)), i < T - d, and
never holds the last step. Rewards are standardised over the prompt's leaves; an edge's advantage is
the weighted mean of those below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from branchcore.objective import ClippedRatio
from branchcore.recipes.branching import (
    check_leaves,
    check_start,
    geometric_start,
    grow_branching,
    window_factors,
)
from branchcore.recipes.chains import ratio_of
from branchcore.recipes.credits import leaf_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def tree_grpo(
    sigmas: Sequence[float],
    *,
    branching: int | Sequence[int] = 3,
    depth: int = 3,
    ratio: float = 0.5,
    trees: int = 1,
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    beta: float = 0.0,
    clip: float = 1e-4,
    kl: float = 0.0,
    start: int | None = None,
    updates: int = 1,
) -> Recipe:
    """Builds TreeGRPO; defaults are SD3.5-M's but for uniform weights.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        branching: children per node of the window, or one number per depth.
        depth: steps of the window; a sequence of branching has its own length instead.
        ratio: r of the window's start, in (0, 1]; small r favours early steps, 1 is uniform.
        trees: trees per prompt, each from its own noise; their leaves are one group.
        sde: step inside the window, a name for `steps.named_sde`.
        noise_level: its a or eta.
        beta: siblings weigh in with softmax(beta * mean log-probability); the paper's 1 counts the
            probability twice, which is biased; 0 = uniform.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none in the paper.
        start: first step of the window; None = drawn, the same for all prompts of an iteration.
        updates: optimizer updates per iteration, the trained edges dealt out at random.
    """
    sg = check_sigmas("tree_grpo", sigmas)
    num_steps = len(sg) - 1
    factors = window_factors("tree_grpo", branching, depth, num_steps)
    check_leaves("tree_grpo", factors, trees)
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"tree_grpo: ratio must be in (0, 1], got {ratio}")
    if start is not None:
        check_start("tree_grpo", start, len(factors), num_steps)
    check_updates("tree_grpo", updates)
    step = named_sde(sde, noise_level, sg)

    def grow(t: Tree, at: Moment) -> None:
        positions = num_steps - len(factors)
        first = geometric_start(ratio, positions, at.shared_rng) if start is None else start
        children = {first + j: k for j, k in enumerate(factors)}
        t.leaf(grow_branching(t, sg, children, dict.fromkeys(children, step), roots=trees))
        if updates > 1:
            t.deal_updates(updates, at.rng)

    return Recipe(
        name="tree_grpo",
        grow=grow,
        credit=leaf_credit(beta=beta),
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl),
        varies=start is None or updates > 1,
        updates=updates,
    )


_TRAINER: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01, "prompts_per_iteration": 32}
_SETTING = (
    "SD3.5-M, HPDv2, 8 GPUs, 250 iterations, batch 32; noise, clip and CFG 4.5 as third parties "
    "report them of its code"
)

PRESETS: dict[str, Preset] = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"beta": 1.0},
        trainer=_TRAINER,
        source=f"arXiv 2512.08153: {_SETTING}; HPSv2.1",
    ),
    "sd3.5-m-k4": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"branching": 4, "beta": 1.0},
        trainer=_TRAINER,
        source=f"arXiv 2512.08153: {_SETTING}; its ablation with the best HPSv2.1",
    ),
    "sd3.5-m-two-trees": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"trees": 2, "beta": 1.0},
        trainer=_TRAINER,
        source=f"arXiv 2512.08153: {_SETTING}; its ablation with two trees per prompt",
    ),
    "sd3.5-m-hps-clip": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"beta": 1.0},
        trainer={**_TRAINER, "reward_weights": {"hps": 0.8, "clip": 0.2}},
        source=f"arXiv 2512.08153: {_SETTING}; HPSv2.1 and CLIP score",
    ),
}
