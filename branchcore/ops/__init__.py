"""The public ops: pure functions of tensors with checks, autograd and a conformance spec each."""

from branchcore.ops.branch_step import branch_step
from branchcore.ops.edge_dots import edge_dots
from branchcore.ops.philox_normal import philox_normal
from branchcore.ops.ratio_loss import ratio_loss
from branchcore.ops.sde_log_prob import sde_log_prob
from branchcore.reference import BranchStep, EdgeDots, RatioLoss, RatioStats

__all__ = [
    "BranchStep",
    "EdgeDots",
    "RatioLoss",
    "RatioStats",
    "branch_step",
    "edge_dots",
    "philox_normal",
    "ratio_loss",
    "sde_log_prob",
]
