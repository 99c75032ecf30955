"""What goes wrong with a reward, by what can be done about it.

Any other exception of a reward is a fault of the moment or of a leaf: `Retrying` tries again.
"""

from __future__ import annotations


class RewardFailure(RuntimeError):
    """A batch could not be scored, and whoever was to try again has given up."""


class NoRetry(ValueError):
    """Trying again cannot mend it: an answer of the wrong shape, a request that is refused."""


class NoMapping(NoRetry, TypeError):
    """A reward returned something else than a mapping of components."""


class RetryLater(RuntimeError):
    """The scorer is busy, and may have said for how long.

    Args:
        message: what happened.
        after_s: seconds that the scorer asks for; 0 = it did not say.
    """

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


def failure(where: str, count: int, error: Exception, tries: int = 1) -> RewardFailure:
    """Returns the error of a reward that raised.

    Args:
        where: names the reward.
        count: images it was to score.
        error: what it raised at last.
        tries: how often it was called.
    """
    after = f" (tries: {tries})" if tries > 1 else ""
    return RewardFailure(f"{where}: must score {count} images, raised {told(error)}{after}")


def told(error: Exception, where: str = "") -> str:
    """Returns an exception as text; `NoRetry` says by itself what it is, and where."""
    if isinstance(error, NoRetry):
        return str(error)
    return f"{where}{': ' * bool(where)}{type(error).__name__}: {error}"
