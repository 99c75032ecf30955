"""MixGRPO-Flash (arXiv 2507.21802, sec. 3.3): MixGRPO with a short higher-order tail.

After the window's last step `last`, n = int(max((T - last) ratio, 1)) noise levels replace the
schedule: shift(linspace(t, 0, n)), t the unshifted level that the window reached. DPM-Solver++
takes the n - 1 steps; its first reads the x0 prediction made in the window, its last is of first
order. The release ends at n = 1 with a noisy image; here one clean step follows unless asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from branchcore.objective import ClippedRatio
from branchcore.recipes.chains import check_group, grow_chains, ratio_of
from branchcore.recipes.credits import group_credit
from branchcore.recipes.mix_grpo import FLUX_TRAINER
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.recipes.windows import SlidingWindow
from branchcore.schedule import shifted_linear
from branchcore.steps import dpmpp, named_sde
from branchcore.tree import Tree


@keeps_options
def mix_grpo_flash(
    sigmas: Sequence[float],
    *,
    group: int = 12,
    window: int = 4,
    schedule: str = "progressive",
    interval: int = 20,
    min_interval: int = 1,
    stride: int = 1,
    start: int = 0,
    roll_back: bool = True,
    ratio: float = 0.4,
    order: int = 2,
    shift: float = 3.0,
    noisy_leaves: bool = False,
    sde: str = "flow_sde",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.0,
    log_ratio_penalty: float = 0.0,
    same_noise: bool = True,
    reward_first: bool = False,
    trimmed: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds MixGRPO-Flash; defaults are FLUX's but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule, an even grid under `shift`; FLUX: shifted_linear(25, 3).
        group: chains per prompt.
        window: stochastic steps.
        schedule: how the window moves, see `mix_grpo`; Flash is "progressive", Flash* "frozen".
        interval: iterations between moves.
        min_interval: shortest one of the linear schedule.
        stride: steps per move.
        start: first step of the first window.
        roll_back: start anew after the last window instead of staying there.
        ratio: share of the steps after the window that are left, in (0, 1]; 0.2 for Flash*.
        order: of the solver, 1 to 3.
        shift: of the schedule, so that it can be taken back for the tail.
        noisy_leaves: decode what is left of the noise where n = 1, as released.
        sde: "flow_sde" or "cps"; see `steps.named_sde`.
        noise_level: its a or eta.
        clip: PPO clip range.
        kl: weight of the KL to the base model; 0 in the script.
        log_ratio_penalty: weight of half the squared log-ratio; 0 in the script.
        same_noise: all chains of a prompt start from one root noise.
        reward_first: normalise the weighted sum of raw rewards instead of each reward.
        trimmed: lowest fraction of the group that mean and std leave out.
        updates: optimizer updates per iteration; 4 in the script.
    """
    sg = check_sigmas("mix_grpo_flash", sigmas)
    check_group("mix_grpo_flash", group)
    check_updates("mix_grpo_flash", updates, group)
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"mix_grpo_flash: ratio must be in (0, 1], got {ratio}")
    _check_shift(np.asarray(sg), shift)
    moving = SlidingWindow(
        recipe="mix_grpo_flash",
        steps=len(sg) - 1,
        window=window,
        schedule=schedule,
        interval=interval,
        min_interval=min_interval,
        stride=stride,
        start=start,
        roll_back=roll_back,
    )
    step, solver = named_sde(sde, noise_level, sg), dpmpp(order, warm_up=True)

    def grow(t: Tree, at: Moment) -> None:
        steps = moving.at(at)
        head = sg[: steps.stop + 1]
        x = grow_chains(t, head, step, steps, group=group, same_noise=same_noise, updates=updates)
        after = tail(len(sg) - 1, steps.stop - 1, ratio, shift)
        t.leaf(t.chain(x, after if after or noisy_leaves else [0.0], solver))

    return Recipe(
        name="mix_grpo_flash",
        grow=grow,
        credit=group_credit(
            ddof=1, eps=1e-8, reward_first=reward_first, trimmed=trimmed, average=True
        ),
        objective=ClippedRatio(
            ratio=ratio_of(sde), clip=(clip, clip), kl=kl, log_ratio_penalty=log_ratio_penalty
        ),
        varies=moving.varies,
        updates=updates,
        noisy_leaves=noisy_leaves,
    )


def tail(steps: int, last: int, ratio: float, shift: float) -> list[float]:
    """Returns the n - 1 noise levels after the window, down to 0; none if n = 1.

    Args:
        steps: T.
        last: last step of the window.
        ratio: share of the T - last levels that are left.
        shift: k of `k t / (1 + (k - 1) t)`.
    """
    n = int(max((steps - last) * ratio, 1))
    t = np.linspace(1.0 - (last + 1) / steps, 0.0, n)[1:]
    return (shift * t / (1.0 + (shift - 1.0) * t)).tolist()


def _check_shift(sigmas: NDArray[np.float64], shift: float) -> None:
    """Raises ValueError unless taking the shift back makes the schedule an even grid."""
    if not shift > 0.0:
        raise ValueError(f"mix_grpo_flash: shift must be positive, got {shift}")
    t = sigmas / (shift - (shift - 1.0) * sigmas)
    off = np.abs(t - np.linspace(1.0, 0.0, len(sigmas)))
    if off.max() > 1e-6:
        raise ValueError(
            "mix_grpo_flash: shift must take sigmas back to an even grid, got "
            f"{shift} (off by {off.max():.3g}); try schedule.shifted_linear(T, shift)"
        )


_SOURCE = (
    "Tencent-Hunyuan/MixGRPO, DPM-Solver++ 2M after the window (32 GPUs): 720 px, 50 steps to "
    "evaluate, guidance 3.5, full fine-tune, 300 iterations"
)
PRESETS = {
    "flux": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"updates": 4},
        trainer=FLUX_TRAINER,
        source=_SOURCE,
    ),
    "flux-star": Preset(
        sigmas=shifted_linear(25, 3.0).tolist(),
        options={"schedule": "frozen", "ratio": 0.2, "updates": 4},
        trainer=FLUX_TRAINER,
        source=_SOURCE + "; Flash*: frozen at the first steps",
    ),
}
