"""Accelerations of a model, each switched on by one call that says what it did and why.

None of them changes weights or their names, and all can be undone; see the functions.
"""

from branchcore.models.runtime.attention import set_attention
from branchcore.models.runtime.change import Change
from branchcore.models.runtime.checkpointing import checkpoint_blocks
from branchcore.models.runtime.compiled import compile_blocks
from branchcore.models.runtime.decoder import fuse_decoder
from branchcore.models.runtime.graphs import graph_rollout

__all__ = [
    "Change",
    "checkpoint_blocks",
    "compile_blocks",
    "fuse_decoder",
    "graph_rollout",
    "set_attention",
]
