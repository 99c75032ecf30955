"""The public ops: pure functions of tensors with checks, autograd and a conformance spec each."""

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
