"""The public ops: pure functions of tensors with checks, autograd and a conformance spec each.

Three children of one parent of four latent elements, and how likely they are under that step:

>>> import torch
>>> from branchcore import ops
>>> from branchcore.noise import Noise
>>> from branchcore.steps import dance_sde
>>> row = dance_sde(0.3)([], 0.75, 0.5)
>>> rows_M4 = torch.tensor([[row.a, row.b, row.c, row.s]] * 3, dtype=torch.float64)
>>> child_start = torch.tensor([0, 3])
>>> names = torch.tensor([[0, -1, 7], [1, -1, 7], [2, -1, 7]], dtype=torch.int32)
>>> mix = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
>>> noise = Noise(torch.tensor([0, 0, 0]), names, mix)
>>> x_ND, v_ND = torch.zeros(1, 4), torch.ones(1, 4)
>>> step = ops.branch_step(x_ND, v_ND, rows_M4, child_start, noise)
>>> step.y_MD.shape
torch.Size([3, 4])
>>> again = ops.sde_log_prob(x_ND, v_ND, step.y_MD, rows_M4, child_start)
>>> torch.allclose(again, step.log_prob_M, atol=1e-5)
True

On policy the velocity has not changed, and every log-ratio, `k p - k^2 q / 2`, is exactly 0:

>>> ops.edge_dots(v_ND, v_ND.clone(), child_start, noise).p_E.tolist()
[0.0, 0.0, 0.0]
"""

from branchcore.ops.branch_step import branch_step
from branchcore.ops.edge_dots import edge_dots
from branchcore.ops.gate_norm_modulate import gate_norm_modulate
from branchcore.ops.group_norm_silu import group_norm_silu
from branchcore.ops.philox_normal import philox_normal
from branchcore.ops.qk_norm_rope import qk_norm_rope
from branchcore.ops.ratio_loss import ratio_loss
from branchcore.ops.sde_log_prob import sde_log_prob
from branchcore.reference import (
    BranchStep,
    EdgeDots,
    GateNormModulate,
    QKNormRope,
    RatioLoss,
    RatioStats,
)

__all__ = [
    "BranchStep",
    "EdgeDots",
    "GateNormModulate",
    "QKNormRope",
    "RatioLoss",
    "RatioStats",
    "branch_step",
    "edge_dots",
    "gate_norm_modulate",
    "group_norm_silu",
    "philox_normal",
    "qk_norm_rope",
    "ratio_loss",
    "sde_log_prob",
]
