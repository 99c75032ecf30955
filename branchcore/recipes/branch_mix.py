"""BranchGRPO-Mix (arXiv 2509.06040, sec. 3): SDE at splits and in a window of steps, ODE elsewhere.

Only stochastic steps are trained. As released, step i is in the window iff i mod stride < window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from branchcore.objective import ClippedRatio
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
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import shifted_linear
from branchcore.steps import dance_sde
from branchcore.tree import Tree


@keeps_options
def branch_mix(
    sigmas: Sequence[float],
    *,
    splits: Sequence[int] | str = "dense",
    branching: int | Sequence[int] = 2,
    window: int = 4,
    stride: int = 30,
    eta: float = 0.3,
    correlate: float | None = 4.0,
    amplify: float | None = None,
    beta: float = 0.0,
    local: bool = False,
    clip: float = 1e-3,
    kl: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds BranchGRPO-Mix; defaults are the FLUX script's but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(20, 3).
        splits: split steps, or a density for `scaled_splits`.
        branching: children per split.
        window: stochastic steps at the start of every stride; 0 = splits only.
        stride: period of the window over the steps.
        eta: diffusion of the SDE.
        correlate: s of the sibling noise mixture; None = independent.
        amplify: c of the released code's split noise; not both.
        beta: fusion temperature; see `branch_grpo`.
        local: fuse over immediate children, as the released code does with beta.
        clip: PPO clip range.
        kl: weight of the KL to the base model.
        updates: optimizer updates per iteration; 6 for 68 edges in the released script.
    """
    sg = check_sigmas("branch_mix", sigmas)
    if window < 0 or stride < 1:
        raise ValueError(
            f"branch_mix: window must be >= 0 and stride >= 1, got {window} and {stride}"
        )
    steps = len(sg) - 2
    chosen = scaled_splits(splits, len(sg) - 1) if isinstance(splits, str) else tuple(splits)
    children = check_splits("branch_mix", chosen, branching, steps)
    sde_steps = {i for i in range(steps) if i in children or i % stride < window}
    check_updates("branch_mix", updates)
    check_split_noise("branch_mix", correlate, amplify)
    sde = dance_sde(eta)

    def grow(t: Tree, at: Moment) -> None:
        window_steps = dict.fromkeys(sde_steps, sde)
        t.leaf(grow_branching(t, sg, children, window_steps, correlate=correlate, amplify=amplify))
        if updates > 1:
            t.deal_updates(updates, at.rng)

    return Recipe(
        name="branch_mix",
        grow=grow,
        credit=depth_credit(beta=beta, local=local),
        objective=ClippedRatio(clip=(clip, clip), kl=kl),
        varies=updates > 1,
        updates=updates,
    )


_ADAM: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}

PRESETS: dict[str, Preset] = {
    "flux": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"beta": 1.0},
        trainer={**_ADAM, "ema_decay": 0.995, "prompts_per_iteration": 32},
        source=(
            "arXiv 2509.06040: FLUX.1-dev, 720 px, guidance 3.5, full fine-tuning, HPSv2.1, "
            "16 GPUs; the window as in the released script"
        ),
    ),
    "flux-released": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={"correlate": None, "amplify": 4.0, "updates": 6},
        trainer={**_ADAM, "max_grad_norm": 1.0, "prompts_per_iteration": 16},
        source=(
            "Fredreic1849/BranchGRPO finetune_flux_branchgrpo_8gpus.sh with MIX_ODE_SDE_TREE: "
            "720 px, guidance 3.5, full fine-tuning, 12 of 68 edges per update"
        ),
    ),
}
