"""Samples a flow model by ODE chains of the engine's own rollout.

Letters: P prompts, K samples of each, L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from branchcore.models.flow_model import FlowModel
from branchcore.packing import balanced_chunks
from branchcore.passes import concat
from branchcore.rollout import rollout
from branchcore.steps import euler
from branchcore.tree import Tree

HELD_OUT_SEED = 4_000_000_000
STEPS = 28


@torch.no_grad()
def sample(
    model: FlowModel,
    prompts: Sequence[str],
    *,
    count: int = 4,
    steps: int = STEPS,
    seed: int = HELD_OUT_SEED,
    max_batch: int | None = None,
) -> Tensor:
    """Samples by Euler steps on the pipeline's own schedule, guidance included.

    Args:
        model: with the weights it has now.
        prompts: P texts.
        count: K samples per prompt.
        steps: model evaluations per sample.
        seed: the noise is a function of it, of the prompt's position and of the sample's number.
        max_batch: samples that are grown and decoded together, in whole prompts where they fit;
            None = all.

    Returns:
        (P, K, 3, H, W) images or (P, K, F, 3, H, W) videos in [0, 1], fp32 on the CPU.

    Raises:
        ValueError: count or steps below 1, no prompts, prompts that cannot be encoded.
        FloatingPointError: the model returned NaN or Inf.
    """
    if count < 1 or steps < 1 or not prompts:
        raise ValueError(
            f"sample: count and steps must be at least 1 and prompts not empty, got {count}, "
            f"{steps} and {len(prompts)} prompts"
        )
    tree = Tree()
    tree.leaf(tree.chain(tree.roots(count), model.sigmas(steps)[1:].tolist(), euler))
    chains = tree.plan()
    model.encode(prompts)
    together = None if max_batch is None else max(1, max_batch // count)
    rounds = balanced_chunks(len(prompts), together)
    found: list[Tensor] = []
    for lo, hi in tqdm(rounds, desc="sample", disable=len(rounds) < 4 or None):
        forest = rollout(
            concat([chains] * (hi - lo)),
            model.with_prompts(prompts[lo:hi]),
            range(lo, hi),
            seed=seed,
            max_batch=max_batch,
            device=model.device,
        )
        latents = forest.leaves.view(-1, *model.latent_shape).split(max_batch or (hi - lo) * count)
        found += [model.decode(x).cpu() for x in latents]
    return torch.cat(found).unflatten(0, (len(prompts), count))
