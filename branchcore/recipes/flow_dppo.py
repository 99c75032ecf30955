"""Flow-DPPO (arXiv 2606.11025): Flow-GRPO whose clip gives way to a divergence mask.

A term is dropped where D = mean (mu - mu_old)^2 / (2 s^2) > delta and its advantage would push the
ratio further from 1. Stochastic and trained are a few steps of the first half, drawn without
contiguity once per iteration, alike for all prompts and ranks; Euler elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from branchcore.objective import MaskedRatio
from branchcore.recipes.chains import (
    check_group,
    grow_chains,
    ratio_of,
)
from branchcore.recipes.credits import gdpo_credit, group_credit
from branchcore.recipes.recipe import (
    Moment,
    Preset,
    Recipe,
    check_sigmas,
    check_updates,
    keeps_options,
)
from branchcore.schedule import flow_match_euler, flux_dynamic
from branchcore.steps import named_sde
from branchcore.tree import Tree


@keeps_options
def flow_dppo(
    sigmas: Sequence[float],
    *,
    group: int = 16,
    sde_steps: int = 3,
    sde: str = "flow_sde",
    noise_level: float = 0.8,
    trust: float | None = None,
    credit: str = "group",
    global_std: bool = False,
    kl: float = 0.0,
    updates: int = 1,
) -> Recipe:
    """Builds Flow-DPPO; defaults are the paper's but for one update per iteration.

    Args:
        sigmas: (T + 1,) schedule; SD3.5-M: flow_match_euler(10).
        group: chains per prompt, each from its own root noise.
        sde_steps: stochastic steps, drawn from the first T // 2.
        sde: "flow_sde" or "cps" in the paper; see `steps.named_sde`.
        noise_level: its a or eta.
        trust: delta per latent element; None = the paper's, 1e-6 for cps, else 1e-7. 1e-5 in the
            released configuration.
        credit: "group", or "gdpo" for several rewards (the paper's multi-reward runs).
        global_std: divide by the std over all prompts of a round; only with credit "group".
        kl: weight of the KL to the base model.
        updates: optimizer updates per iteration; 2 in the released configuration.
    """
    sg = check_sigmas("flow_dppo", sigmas)
    check_group("flow_dppo", group)
    check_updates("flow_dppo", updates, group)
    half = (len(sg) - 1) // 2
    if not 1 <= sde_steps <= half:
        raise ValueError(
            f"flow_dppo: sde_steps must be in 1..{half}, half of the steps, got {sde_steps}"
        )
    if credit not in ("group", "gdpo"):
        raise ValueError(f"flow_dppo: credit must be 'group' or 'gdpo', got {credit!r}")
    if global_std and credit == "gdpo":
        raise ValueError("flow_dppo: global_std must be False with credit 'gdpo', got True")
    step = named_sde(sde, noise_level, sg)

    def grow(t: Tree, at: Moment) -> None:
        drawn = set(at.shared_rng.choice(half, sde_steps, replace=False).tolist())
        t.leaf(grow_chains(t, sg, step, drawn, group=group, updates=updates))

    return Recipe(
        name="flow_dppo",
        grow=grow,
        credit=gdpo_credit()
        if credit == "gdpo"
        else group_credit(ddof=0, eps=1e-4, reward_first=True, global_std=global_std),
        objective=MaskedRatio(
            ratio=ratio_of(sde),
            trust=trust if trust is not None else (1e-6 if sde == "cps" else 1e-7),
            kl=kl,
        ),
        varies=sde_steps < half,
        updates=updates,
    )


_PAPER = {"lr": 3e-4, "prompts_per_iteration": 64}
PRESETS = {
    "sd3.5-m": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"credit": "gdpo"},
        trainer=_PAPER,
        source="Flow-DPPO, multi-reward: LoRA 32/64; number of updates not given",
    ),
    "sd3.5-m-cps": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"sde": "cps", "credit": "gdpo"},
        trainer=_PAPER,
        source="Flow-DPPO with CPS, multi-reward: LoRA 32/64; number of updates not given",
    ),
    "sd3.5-m-single": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={},
        trainer=_PAPER,
        source="Flow-DPPO, one reward (GenEval2): LoRA 32/64; number of updates not given",
    ),
    "sd3.5-m-released": Preset(
        sigmas=flow_match_euler(10).tolist(),
        options={"noise_level": 0.7, "trust": 1e-5, "global_std": True, "updates": 2},
        trainer={},
        source="Tencent-Hunyuan/UniRL FlowDPPO/config.yaml: 512 px, no CFG, LoRA",
    ),
    "flux-single": Preset(
        sigmas=flux_dynamic(14, 1024).tolist(),
        options={},
        trainer=_PAPER,
        source="Flow-DPPO, FLUX.1-dev, one reward (GenEval2): LoRA 64/128; 14 steps, here at 512 "
        "px; number of updates not given",
    ),
    "flux-cps": Preset(
        sigmas=flux_dynamic(14, 1024).tolist(),
        options={"sde": "cps", "credit": "gdpo"},
        trainer=_PAPER,
        source="Flow-DPPO with CPS, FLUX.1-dev, multi-reward: LoRA 64/128; 14 steps, here at 512 "
        "px; number of updates not given",
    ),
    "flux": Preset(
        sigmas=flux_dynamic(14, 1024).tolist(),
        options={"credit": "gdpo"},
        trainer=_PAPER,
        source="Flow-DPPO, FLUX.1-dev, multi-reward: LoRA 64/128; 14 steps, here at 512 px; number "
        "of updates not given",
    ),
}
