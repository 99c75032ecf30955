"""Flow-DPO (arXiv 2501.13918), online: the best against the worst image of a prompt.

Both are re-noised at the same level with the same noise; with D = mean (v - u)^2 - mean
(v_base - u)^2, loss = -log sigmoid(-(beta / 2) (D_best - D_worst)), beta constant. A prompt whose
images all tie trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from branchcore.matching import Preference
from branchcore.recipes.chains import FLOW_GRPO_TRAINER, check_group, check_times, logit_normal
from branchcore.recipes.credits import pair_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler
from branchcore.steps import dpmpp, renoise
from branchcore.tree import Tree


@keeps_options
def flow_dpo(
    sigmas: Sequence[float],
    *,
    group: int = 24,
    times: int | None = None,
    order: int = 1,
    shift: float = 3.0,
    beta: float = 100.0,
    kl: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds online Flow-DPO; defaults are yifan123/flow_grpo's for SD3.5-M.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(40).
        group: images per prompt, of which two are trained.
        times: levels per pair, drawn from a logit-normal; None = int(0.99 T), as released.
        order: of the solver, 1 (Euler) to 3.
        shift: of the drawn levels, 3 for SD3.5.
        beta: inverse temperature.
        kl: weight of mean |v - v_base|^2 on all re-noised images; none published.
        updates: optimizer updates per iteration, whole levels dealt to them.
    """
    sg = check_sigmas("flow_dpo", sigmas)
    check_group("flow_dpo", group)
    count = check_times("flow_dpo", times, len(sg) - 1, shift)
    check_updates("flow_dpo", updates, count)
    solver = dpmpp(order, warm_up=True)

    def grow(t: Tree, at: Moment) -> None:
        leaves = t.leaf(t.chain(t.roots(group), sg[1:], solver))
        for j, level in enumerate(logit_normal(at.rng, count, shift)):
            update = j * updates // count
            t.grow(leaves, level, renoise, same_noise=True, train=True, label=j, update=update)

    return Recipe(
        name="flow_dpo",
        grow=grow,
        credit=pair_credit(),
        objective=Preference(beta=beta / 2.0, kl=kl),
        varies=True,
        updates=updates,
    )


PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(40).tolist(),
        options={},
        trainer=FLOW_GRPO_TRAINER,
        source="yifan123/flow_grpo config/dpo.py: 512 px, CFG 4.5, LoRA 32/64; offline in the "
        "paper, with lr 5e-6 and batches of 64",
    ),
}
