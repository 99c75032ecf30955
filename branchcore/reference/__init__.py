"""The specification: every op in plain torch, any float dtype, differentiable, no checks."""

from branchcore.reference.branch_step import BranchStep, branch_step, branch_step_backward
from branchcore.reference.edge_dots import EdgeDots, edge_dots, edge_dots_backward
from branchcore.reference.gate_norm_modulate import (
    GateNormModulate,
    gate_norm_modulate,
    gate_norm_modulate_backward,
)
from branchcore.reference.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_positions,
)
from branchcore.reference.pack import pack
from branchcore.reference.philox_normal import philox_normal
from branchcore.reference.qk_norm_rope import QKNormRope, qk_norm_rope, qk_norm_rope_backward
from branchcore.reference.ratio_loss import RatioLoss, RatioStats, ratio_loss, ratio_loss_backward
from branchcore.reference.sde_log_prob import sde_log_prob, sde_log_prob_backward

__all__ = [
    "BranchStep",
    "EdgeDots",
    "GateNormModulate",
    "QKNormRope",
    "RatioLoss",
    "RatioStats",
    "branch_step",
    "branch_step_backward",
    "edge_dots",
    "edge_dots_backward",
    "gate_norm_modulate",
    "gate_norm_modulate_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
    "group_norm_silu_positions",
    "pack",
    "philox_normal",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "ratio_loss",
    "ratio_loss_backward",
    "sde_log_prob",
    "sde_log_prob_backward",
]
