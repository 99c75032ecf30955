"""DanceGRPO (arXiv 2505.07818): SDE chains from one root noise, a random 60 % of steps trained.

A = (r - mean_group) / (std_group + 1e-8) with the unbiased std; the image is the x0 read-out of the
last step, whose own noise no reward sees. Each sample trains its own random steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchcore.objective import ClippedRatio
from branchcore.prune import best_of_n
from branchcore.recipes.chains import check_group, grow_chains, ratio_of
from branchcore.recipes.credits import group_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import shifted_linear
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def dance_grpo(
    sigmas: Sequence[float],
    *,
    group: int = 12,
    sde: str = "dance_sde",
    eta: float = 0.3,
    fraction: float = 0.6,
    best_of: int | None = None,
    clip: float = 1e-4,
    kl: float = 0.0,
    same_noise: bool = True,
    separate: bool = False,
    updates: int = 1,
) -> Recipe:
    """Builds DanceGRPO; defaults are FLUX's but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; FLUX: shifted_linear(16, 3).
        group: chains per prompt.
        sde: "dance_sde"; others see `steps.named_sde`.
        eta: diffusion of the SDE, or the a or eta of another.
        fraction: share of the first T - 1 steps that a sample trains.
        best_of: train only the best and the worst best_of / 2 leaves of a group; statistics still
            come from all. None = all; 8 of 24 in the HunyuanVideo script. Biased.
        clip: PPO clip range.
        kl: weight of the KL to the base model; none in the paper.
        same_noise: all chains of a prompt start from one root noise.
        separate: one clipped loss per reward, as its multi-reward scripts do.
        updates: optimizer updates per iteration; 3 in the 16-GPU script.
    """
    sg = check_sigmas("dance_grpo", sigmas)
    num_steps = len(sg) - 2
    num_trained = int(num_steps * fraction)
    if not 1 <= num_trained <= num_steps:
        raise ValueError(
            f"dance_grpo: fraction must select 1 to {num_steps} steps, got {fraction} "
            f"({num_trained} steps)"
        )
    check_group("dance_grpo", group)
    check_updates("dance_grpo", updates, group)
    kept = group if best_of is None else best_of
    if not 2 <= kept <= group:
        raise ValueError(f"dance_grpo: best_of must be in 2..{group}, got {best_of}")
    step = named_sde(sde, eta, sg)

    def grow(t: Tree, at: Moment) -> None:
        order = at.rng.permuted(np.tile(np.arange(num_steps), (group, 1)), axis=1)[:, :num_trained]
        train = (order == np.arange(num_steps)[:, None, None]).any(2)
        x = grow_chains(
            t,
            sg,
            step,
            range(num_steps),
            group=group,
            same_noise=same_noise,
            updates=updates,
            train=train,
        )
        t.leaf(x)

    return Recipe(
        name="dance_grpo",
        grow=grow,
        credit=group_credit(ddof=1, eps=1e-8, separate=separate),
        objective=ClippedRatio(ratio=ratio_of(sde), clip=(clip, clip), kl=kl),
        prune=lambda plan, value, _iteration: best_of_n(plan, value, kept),
        prune_by_value=kept < group,
        varies=num_trained < num_steps,
        updates=updates,
    )


_TRAINER = {"lr": 1e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0}
PRESETS = {
    "flux": Preset(
        sigmas=shifted_linear(16, 3.0).tolist(),
        options={"updates": 3},
        trainer={**_TRAINER, "prompts_per_iteration": 16},
        source="XueZeyue/DanceGRPO finetune_flux_grpo.sh (16 GPUs): 720 px, guidance 3.5, full "
        "fine-tune, HPSv2.1, 300 iterations",
    ),
    "flux-hps-clip": Preset(
        sigmas=shifted_linear(16, 3.0).tolist(),
        options={"separate": True, "updates": 3},
        trainer={
            **_TRAINER,
            "prompts_per_iteration": 16,
            "reward_weights": {"hps": 0.7, "clip": 1.4},
        },
        source="XueZeyue/DanceGRPO issue 19 (16 GPUs): 720 px, guidance 3.5, full fine-tune, "
        "HPSv2.1 and CLIP score, one loss each",
    ),
    "flux-8gpu": Preset(
        sigmas=shifted_linear(16, 3.0).tolist(),
        options={"updates": 2},
        trainer={
            **_TRAINER,
            "max_grad_norm": 0.01,
            "ema_decay": 0.995,
            "prompts_per_iteration": 16,
        },
        source="XueZeyue/DanceGRPO finetune_flux_grpo_8gpus.sh: 720 px, guidance 3.5, full "
        "fine-tune; its 2 updates hold one of two prompts each, here half of every group",
    ),
    "flux-lora": Preset(
        sigmas=shifted_linear(12, 3.0).tolist(),
        options={"updates": 2},
        trainer={**_TRAINER, "lr": 3e-4, "prompts_per_iteration": 16},
        source="XueZeyue/DanceGRPO finetune_flux_grpo_8gpus_lora.sh: 720 px, guidance 3.5, LoRA "
        "128/256; 2 updates as in flux-8gpu",
    ),
    "hunyuan-video": Preset(
        sigmas=shifted_linear(16, 5.0).tolist(),
        options={"group": 24, "eta": 0.25, "best_of": 8, "separate": True, "updates": 2},
        trainer={**_TRAINER, "prompts_per_iteration": 32},
        source="XueZeyue/DanceGRPO finetune_hunyuan_grpo.sh (32 GPUs): 480 x 480 x 53, full "
        "fine-tune, VideoAlign; updates of 4 of the 8 kept samples",
    ),
    "qwen-image": Preset(
        sigmas=shifted_linear(20, 3.0).tolist(),
        options={},
        trainer=_TRAINER,
        source="XueZeyue/DanceGRPO Qwen-Image script: 720 px, full fine-tune; group and number of "
        "updates differ between its versions and are left at the defaults",
    ),
}
