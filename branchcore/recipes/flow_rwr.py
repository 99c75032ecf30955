"""Flow-RWR (arXiv 2501.13918), online: flow matching to images weighed by exp of their reward.

loss = mean min(exp(z / temperature), cap) mean (v - u)^2, z the reward standardised within the
prompt; the paper exponentiates the raw reward, the released code multiplies by it, which ascends
where it is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

from branchcore.matching import RewardWeighted
from branchcore.recipes.chains import (
    FLOW_GRPO_TRAINER,
    check_group,
    check_times,
    logit_normal,
    renoise_at,
)
from branchcore.recipes.credits import exponential_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler
from branchcore.steps import dpmpp
from branchcore.tree import Tree


@keeps_options
def flow_rwr(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    times: int | None = None,
    order: int = 1,
    shift: float = 3.0,
    temperature: float = 1.0,
    cap: float = 20.0,
    kl: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds online Flow-RWR; the sampling is that of `flow_dpo`.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(40).
        group: images per prompt.
        times: re-noised states per image, at levels drawn from a logit-normal per image; None =
            int(0.99 T).
        order: of the solver, 1 (Euler) to 3.
        shift: of the drawn levels, 3 for SD3.5.
        temperature: of the weights; 1 in the paper.
        cap: bound on the weights; not published, e^3 or three standard deviations.
        kl: weight of mean |v - v_base|^2; none published.
        updates: optimizer updates per iteration, whole images dealt to them.
    """
    sg = check_sigmas("flow_rwr", sigmas)
    check_group("flow_rwr", group)
    check_updates("flow_rwr", updates, group)
    count = check_times("flow_rwr", times, len(sg) - 1, shift)
    solver = dpmpp(order, warm_up=True)

    def grow(t: Tree, at: Moment) -> None:
        leaves = t.leaf(t.chain(t.roots(group), sg[1:], solver))
        levels = [logit_normal(at.rng, group, shift) for _ in range(count)]
        renoise_at(t, leaves, levels, updates=updates)

    return Recipe(
        name="flow_rwr",
        grow=grow,
        credit=exponential_credit(temperature=temperature, cap=cap),
        objective=RewardWeighted(kl=kl),
        varies=True,
        updates=updates,
    )


PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(40).tolist(),
        options={},
        trainer=FLOW_GRPO_TRAINER,
        source="yifan123/flow_grpo, reward-weighted mode: 512 px, CFG 4.5, LoRA 32/64; offline in "
        "the paper, with lr 5e-6 and batches of 64",
    ),
}
