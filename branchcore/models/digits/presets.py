"""Defaults of `python -m branchcore train --model digits`, one per recipe.

T = 10 linear steps, 16 leaves per prompt, AdamW with EMA, KL to the base model. Those in `_TUNED`
were tuned on this task (bench/LOG.md has the runs); all others get the same settings, unmeasured.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from branchcore import recipes
from branchcore.models.digits.rewards import COMPONENT_WEIGHTS
from branchcore.schedule import shifted_linear

SIGMAS = shifted_linear(10)
SPLITS = (0, 2, 3, 4)


LEAVES = 16


class Preset(NamedTuple):
    """Options of a recipe and of `TrainerConfig`."""

    recipe: dict[str, Any]
    trainer: dict[str, Any]


_COMMON: dict[str, Any] = {
    "betas": (0.9, 0.99),
    "weight_decay": 0.0,
    "ema_decay": 0.95,
    "max_batch": 128,
    "reward_weights": COMPONENT_WEIGHTS,
}
_TREE: dict[str, Any] = {"splits": SPLITS, "eta": 0.7, "kl": 0.09}
# Standardised rewards keep their full weight when they saturate, as noise: legibility does at once,
# stroke after 60 iterations. Less of them brings both words right 25 iterations earlier.
_SPLITS_ONLY: dict[str, Any] = {
    **_COMMON,
    "reward_weights": {"legibility": 0.3, "stroke": 1.0, "slant": 1.5},
    "lr": 6e-4,
    "prompts_per_iteration": 30,
    "iterations": 135,
    "evaluate_every": 15,
}

# What a published default cannot be here: a schedule that is not shifted, rewards below 0.
_SUITED: dict[str, dict[str, Any]] = {
    "mix_grpo_flash": {"shift": 1.0},
    "vgpo": {"shift": 6.0},
}
_TUNED: dict[str, Preset] = {
    "branch_mix": Preset({**_TREE, "window": 0}, _SPLITS_ONLY),
    "branchcore": Preset(_TREE, _SPLITS_ONLY),
    "branch_grpo": Preset(
        {**_TREE, "eta": 0.5, "kl": 0.03},
        {**_COMMON, "lr": 8e-4, "prompts_per_iteration": 20, "iterations": 110},
    ),
    "dance_grpo": Preset(
        {"group": 16, "eta": 0.5, "kl": 0.03},
        {**_COMMON, "lr": 8e-4, "prompts_per_iteration": 12, "iterations": 160},
    ),
    "flow_grpo": Preset(
        {"group": 16, "kl": 0.03, "kl_form": "gaussian"},
        {**_COMMON, "lr": 8e-4, "prompts_per_iteration": 12, "iterations": 110},
    ),
}


def _kl_of_steps(options: Collection[str]) -> bool:
    """A weight on the KL of sampling steps, not on the velocities' of matching methods."""
    return "kl" in options and "times" not in options


def _plain(name: str) -> Preset:
    """16 leaves (per step on a trunk), a KL, and fewer prompts where a prompt has more leaves."""
    known = recipes.options_of(name)
    options = recipes.leaf_options(tuple(known), LEAVES, len(SIGMAS) - 1)
    trunk = "trunks" in known or "strides" in known
    trainer = {**_COMMON, "lr": 8e-4, "prompts_per_iteration": 4 if trunk else 12}
    return Preset(
        options | ({"kl": 0.03} if _kl_of_steps(known) else {}) | _SUITED.get(name, {}),
        {**trainer, "iterations": 160},
    )


PRESETS: dict[str, Preset] = {
    name: _TUNED[name] if name in _TUNED else _plain(name) for name in recipes.RECIPES
}
