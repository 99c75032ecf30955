"""Parents and children as index arithmetic. Letters: N parents, M children, D elements."""

import torch
from torch import Tensor


def parents(child_start: Tensor) -> Tensor:
    """Name the parent of each child: (N + 1,) int64 starts -> (M,) int64 indices."""
    nodes_N = torch.arange(child_start.numel() - 1, device=child_start.device)
    return nodes_N.repeat_interleave(child_start.diff())


def sum_children(values_MD: Tensor, child_start: Tensor) -> Tensor:
    """Add up the children of each parent: (M, ...) -> (N, ...), zero for a parent without any."""
    sums = values_MD.new_zeros(child_start.numel() - 1, *values_MD.shape[1:])
    return sums.index_add(0, parents(child_start), values_MD)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
