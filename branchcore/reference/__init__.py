"""The specification: every op in plain torch, any float dtype, differentiable, no checks."""

from branchcore.reference.branch_step import BranchStep, branch_step, branch_step_backward
from branchcore.reference.edge_dots import EdgeDots, edge_dots, edge_dots_backward
from branchcore.reference.philox_normal import philox_normal
from branchcore.reference.ratio_loss import RatioLoss, RatioStats, ratio_loss, ratio_loss_backward
from branchcore.reference.sde_log_prob import sde_log_prob, sde_log_prob_backward

__all__ = [
    "BranchStep",
    "EdgeDots",
    "RatioLoss",
    "RatioStats",
    "branch_step",
    "branch_step_backward",
    "edge_dots",
    "edge_dots_backward",
    "philox_normal",
    "ratio_loss",
    "ratio_loss_backward",
    "sde_log_prob",
    "sde_log_prob_backward",
]
