"""The settings of pruning, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from branchcore.prune import BIASED

UNBIASED = ("uniform", "history", "threshold", "optimal")
BELOW_MEAN = 0.5751
"""P(|A| < E|A|) of a normal A: DPPO's candidates."""
_LATE = frozenset({"threshold", "optimal", *BIASED}) - {"first_steps"}
_SHARES = {"none": 1.0, "zero_advantage": 1.0, "parent_top1": 0.5}
_FLOOR = 0.1


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Which parents of an update are dropped; on the command line `--set prune=RULE prune_rate=`.

    `stop` and `stop_rate` act in the rollout, before there are rewards, and go with any unbiased
    rule or none; see `stopping`. Leaves are weighed by 1 / (probability of being grown), so that
    sums over them keep their mean. But credit divides such sums (means and stds of rewards), and a
    ratio of unbiased sums is biased: the gradient is consistent, not unbiased.

    Raises:
        TypeError, ValueError: a value is out of range, or has no effect under the rule.
    """

    rule: str = "none"
    """uniform: all parents alike; threshold: DPPO, those whose score is below their prompt's mean;
    optimal: the least added variance for its cost; history: the same from each step's advantages in
    past iterations, so that coins fall before the rollout; or a pruner of `prune.BIASED`."""
    rate: float = 0.0
    """uniform, history, optimal: expected share of the cost that is dropped; threshold: probability
    of a candidate; biased pruners: share of the leaves that is dropped. In [0, 1)."""
    floor: float = _FLOOR
    """history, optimal: least keep probability p_min, so that no weight exceeds 1 / floor."""
    draw: Literal["bernoulli", "fixed"] = "bernoulli"
    """bernoulli: independent coins, weight 1/p; fixed: floor(rate m) of a prompt's m candidates
    without replacement, weight m / (m - floor(rate m)); for uniform and threshold, of one p."""
    score: Literal["mean", "max"] = "mean"
    """threshold: over the |advantage| of a parent's edges."""
    prompts: float = 0.0
    """Probability that a prompt whose past |advantage| is below the mean is not rolled out."""
    cap: float | None = None
    """Weights are cut to it, which biases the estimate: only with `biased`; None = never."""
    biased: bool = False
    """Says that a bias by `cap` is wanted."""
    stop: tuple[int, ...] = ()
    """Depths of the trees at which branches may end, by the score of their one-step preview;
    ascending. `--set prune_stop=4,6`."""
    stop_rate: float = 0.0
    """Expected share of the leaves of the branches at such a depth that ends there, in [0, 1);
    `floor` is the least probability of going on at each, too."""
    measure: int = 0
    """Unbiased rules: every so many iterations the gradients of up to 32 kept parents are measured,
    which tells the variance that is really added; changes nothing else. 0 = never."""

    def __post_init__(self) -> None:
        for name in (
            "rate",
            "prompts",
            "floor",
            "stop_rate",
            *(() if self.cap is None else ("cap",)),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"PruningConfig: {name} must be float, got {value!r}")
        if isinstance(self.measure, bool) or not isinstance(self.measure, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"PruningConfig: measure must be int, got {self.measure!r}")
        if self.measure < 0:
            raise ValueError(f"PruningConfig: measure must be at least 0, got {self.measure}")
        choices: dict[str, tuple[Any, ...]] = {
            "rule": ("none", *UNBIASED, *BIASED),
            "draw": ("bernoulli", "fixed"),
            "score": ("mean", "max"),
            "biased": (True, False),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PruningConfig: {name} must be from {known}, got {getattr(self, name)!r}"
                )
        for name in ("rate", "prompts", "stop_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"PruningConfig: {name} must be in [0, 1), got {getattr(self, name)}; 1 leaves "
                    "nothing that a weight could make up for"
                )
        self._check_stop()
        self._check_effects()

    def _check_stop(self) -> None:
        """Raises ValueError or TypeError unless branches stop at depths, at a rate, by any rule."""
        depths: Any = self.stop
        whole = isinstance(depths, tuple) and all(type(d) is int for d in self.stop)
        if not whole:
            raise TypeError(f"PruningConfig: stop must be a tuple of int, got {depths!r}")
        if self.stop != tuple(sorted(set(self.stop))) or min(self.stop, default=0) < 0:
            raise ValueError(f"PruningConfig: stop must be ascending depths >= 0, got {self.stop}")
        if bool(self.stop) != (self.stop_rate > 0.0):
            raise ValueError(
                f"PruningConfig: stop and stop_rate must be given together, got {self.stop} and "
                f"{self.stop_rate}"
            )
        if self.stop and self.rule in BIASED:
            raise ValueError(
                f"PruningConfig: stop must be () for rule {self.rule!r}, which ranks all branches, "
                f"got {self.stop}; try an unbiased rule"
            )

    def _check_effects(self) -> None:
        """Raises ValueError for values that the rule does not read, and for a hidden bias."""
        unread = {
            "rate": self.rate and self.rule in ("none", "zero_advantage", "parent_top1"),
            "floor": self.floor != _FLOOR
            and self.rule not in ("history", "optimal")
            and not self.stop,
            "draw": self.draw != "bernoulli" and self.rule not in ("uniform", "threshold"),
            "score": self.score != "mean" and self.rule != "threshold",
            "biased": self.biased and self.cap is None,
            "measure": self.measure and self.rule not in UNBIASED,
        }
        for name, wrong in unread.items():
            if wrong:
                raise ValueError(
                    f"PruningConfig: {name} must be left out for rule {self.rule!r} and cap "
                    f"{self.cap}, which do not read it, got {getattr(self, name)!r}"
                )
        rates = {"rate": self.rate} if self.rule in ("history", "optimal") else {}
        rates |= {"stop_rate": self.stop_rate} if self.stop else {}
        for name, rate in rates.items():
            if not 0.0 < self.floor <= 1.0 - rate:
                raise ValueError(
                    f"PruningConfig: floor must be in (0, 1 - {name}] = (0, {1.0 - rate:g}], got "
                    f"{self.floor}"
                )
        if self.cap is not None and not (self.biased and self.cap >= 1.0):
            raise ValueError(
                f"PruningConfig: cap must be None, or at least 1 with biased=True, got {self.cap} "
                "and biased={}; try floor, which bounds weights without a bias".format(self.biased)
            )

    @property
    def unbiased(self) -> bool:
        """The rule draws coins that may drop something."""
        return self.rule in UNBIASED and self.rate > 0.0

    @property
    def late(self) -> bool:
        """What is dropped is known after the rewards: too late to keep a parent off the tape."""
        return self.rule in _LATE and (self.rate > 0.0 or self.rule not in UNBIASED)

    @property
    def share(self) -> float:
        """Share of the trained parents that is kept on average; a guess where advantages decide."""
        candidates = BELOW_MEAN if self.rule == "threshold" else 1.0
        return _SHARES.get(self.rule, 1.0 - self.rate * candidates)
