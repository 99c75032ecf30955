"""The settings of a training run, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from branchcore.pruning_config import PruningConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """One run; everything but its length and its outputs must stay the same on resume."""

    iterations: int
    """Training iterations in all."""
    prompts_per_iteration: int
    """Prompts (trees, or groups of chains) per iteration."""
    prompts_per_round: int | None = None
    """Prompts whose tape fits in memory together; None = all."""
    max_batch: int | None = None
    """Rows of one model call at most; None = a whole wave."""
    max_tokens: int | None = None
    """Tokens of one model call of an update at most, for models that count them (`CountsTokens`):
    parents of all trees and steps fill it; with max_batch both hold. None = any."""
    tape: int | None = None
    """Trained nodes per round that keep their graph; None = all, or none where less than two thirds
    of them are to be kept after the rewards: see `masked_backward`."""
    prune: PruningConfig = field(default_factory=PruningConfig)
    """What the updates leave out; `--set prune=RULE --set prune_rate=0.5 ...`."""
    seed: int = 0
    """Names all noise and all random choices."""
    lr: float = 1e-5
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to it."""
    clip_floor: float = 0.0
    """Ratios are clipped where the log ratio is beyond so many measured noise floors, or by the
    recipe's clip range if that is wider; 0 = by the recipe's alone. See `noise_floor`."""
    ema_decay: float | None = None
    """Exponential moving average of the weights, used for evaluation; None = none."""
    fast_steps: int = 0
    """SFPO: optimizer steps on one batch before going back and one corrective step; 0 = off."""
    fast_share: float = 0.5
    """SFPO: how much of the way of the fast steps is kept; see `slow_fast`."""
    fast_limit: float = float("inf")
    """SFPO: mean |ratio - 1| at the last fast gradient above which nothing of it is kept."""
    bad_updates: int = 0
    """Iterations in a row that are skipped because a velocity, reward or gradient is not finite;
    one more is an error."""
    reward_weights: Mapping[str, float] | None = None
    """Weight per reward component; None = 1 each."""
    overlap_rewards: bool = False
    """Score a round while the next one is grown: same bits, but two rounds' tapes in memory."""
    reward_attempts: int = 3
    """Calls of a reward that fails, with growing pauses between them; see `rewards.Retrying`."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward may take; None = as long as the reward itself allows."""
    reward_max_failed: float = 0.0
    """Share of an iteration's leaves that may stay without a score and take no part; above it, and
    at 0 whatever fails, is an error."""
    checkpoint_every: int = 20
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    evaluate_every: int = 20
    """Iterations between evaluations."""

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (kind is float and isinstance(value, float))):
                raise TypeError(f"TrainerConfig: {name} must be {kind.__name__}, got {value!r}")
            if not low <= cast("float", value) <= high:
                raise ValueError(f"TrainerConfig: {name} must be in [{low}, {high}], got {value}")
        if not isinstance(self.prune, PruningConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"TrainerConfig: prune must be a PruningConfig, got {self.prune!r}")
        if not isinstance(self.overlap_rewards, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                "TrainerConfig: overlap_rewards must be True or False, "
                f"got {self.overlap_rewards!r}"
            )
        rounds = self.prompts_per_round
        if self.overlap_rewards and (rounds is None or rounds >= self.prompts_per_iteration):
            raise ValueError(
                "TrainerConfig: overlap_rewards must go with several rounds, got prompts_per_round "
                f"{rounds} of {self.prompts_per_iteration} prompts"
            )
        numbers = (int, float)
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2  # pyright: ignore[reportUnnecessaryIsInstance]
        if not pair or not all(isinstance(b, numbers) and 0.0 <= b < 1.0 for b in self.betas):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"TrainerConfig: betas must be two in [0, 1), got {self.betas!r}")
        chosen = self.reward_weights
        if chosen is not None and not (
            isinstance(chosen, Mapping) and all(isinstance(w, numbers) for w in chosen.values())  # pyright: ignore[reportUnnecessaryIsInstance]
        ):
            raise TypeError(
                f"TrainerConfig: reward_weights must map component names to numbers, got {chosen!r}"
            )


_MOST, _TINY = 2**31 - 1, 1e-30
_OPTIONAL = (
    "prompts_per_round", "max_batch", "max_tokens", "tape", "ema_decay", "reward_timeout",
)  # fmt: skip
_RANGES: dict[str, tuple[type, float, float]] = {
    "iterations": (int, 1, _MOST),
    "prompts_per_iteration": (int, 1, _MOST),
    "prompts_per_round": (int, 1, _MOST),
    "max_batch": (int, 1, _MOST),
    "max_tokens": (int, 1, _MOST),
    "tape": (int, 0, _MOST),
    "seed": (int, 0, 2**32 - 1),
    "lr": (float, _TINY, 1e3),
    "eps": (float, _TINY, 1.0),
    "weight_decay": (float, 0.0, 1e3),
    "max_grad_norm": (float, _TINY, float("inf")),
    "clip_floor": (float, 0.0, 1e3),
    "ema_decay": (float, 0.0, 1.0 - 1e-9),
    "fast_steps": (int, 0, _MOST),
    "bad_updates": (int, 0, _MOST),
    "fast_share": (float, 0.0, 1.0),
    "fast_limit": (float, 0.0, float("inf")),
    "reward_attempts": (int, 1, _MOST),
    "reward_timeout": (float, 1e-3, 1e9),
    "reward_max_failed": (float, 0.0, 1.0 - 1e-9),
    "checkpoint_every": (int, 1, _MOST),
    "keep_checkpoints": (int, 1, _MOST),
    "evaluate_every": (int, 1, _MOST),
}
